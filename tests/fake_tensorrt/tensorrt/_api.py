"""The API of one version: every class here is cut down to what that version has, every call is checked and recorded.

``api.json`` is read from NVIDIA's own bindings; see ``../read_api.py``.
"""

from __future__ import annotations

import enum
import json
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

TABLE = json.loads(Path(__file__).with_name("api.json").read_text("utf-8"))
ASKED = os.environ.get("FAKE_TENSORRT_VERSION", "8.6.1")
VERSION = next((each for each in TABLE["versions"] if each.startswith(ASKED)), "")
if not VERSION:
    raise ImportError(f"FAKE_TENSORRT_VERSION is {ASKED}; there are {', '.join(TABLE['versions'])}")
MAJOR = int(VERSION.split(".")[0])

calls: list[tuple[str, dict[str, Any]]] = []
classes: dict[str, type] = {}
_ARGUMENT = re.compile(r"(\w+): ([\w.\[\]]+)( = .+)?")


def record(name: str, arguments: dict[str, Any] | None = None) -> None:
    """Remember a call; with ``FAKE_TENSORRT_LOG`` also as a line of JSON in that file, for other processes."""
    shown = {key: _shown(value) for key, value in (arguments or {}).items()}
    calls.append((name, shown))
    if path := os.environ.get("FAKE_TENSORRT_LOG"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, shown]) + "\n")


def fails(what: str) -> bool:
    """Whether ``FAKE_TENSORRT_FAIL``, words with commas between, names this."""
    return what in os.environ.get("FAKE_TENSORRT_FAIL", "").split(",")


def _shown(value: Any) -> Any:
    if isinstance(value, bool | str | float) or value is None:
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{memoryview(value).nbytes} bytes"
    if isinstance(value, list | tuple | Object) and hasattr(value, "__len__"):
        return [_shown(each) for each in value]
    try:
        return operator.index(value)
    except TypeError:
        return type(value).__name__


def of_version(entries: dict[str, Any]) -> Any:
    """The entry of this version, None where it has none."""
    return next((value for versions, value in entries.items() if VERSION in versions.split()), None)


class _Kind(type):
    """As pybind11: the base's ``__init__`` has to have run."""

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        made = super().__call__(*arguments, **named)
        if not getattr(made, "_alive", False):
            raise TypeError(f"tensorrt.{cls.__base__.__name__}.__init__() must be called when overriding __init__")
        return made


class Object(metaclass=_Kind):
    """A native object: attributes are those of the API and no others, as far as no Python class derives from it."""

    __slots__ = ("__weakref__", "_alive", "_state")

    def __setattr__(self, name: str, value: Any) -> None:
        if classes.get(type(self).__name__) is type(self) and not hasattr(type(self), name):
            raise AttributeError(f"'tensorrt.{type(self).__name__}' object has no attribute '{name}'")
        super().__setattr__(name, value)


class State:
    """What an object holds behind its API."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def make(kind: type, **state: Any) -> Any:
    """An object of a class that has no constructor in the API."""
    made = kind.__new__(kind)
    made._alive = True
    made._state = State(**state)
    return made


def native(cls: type) -> type:
    """Cut a class down to this version, check and record the calls of what is left."""
    entry = TABLE["classes"][cls.__name__]
    members = {name: of_version(each) for name, each in entry["members"].items()}
    for name, value in list(vars(cls).items()):
        if name.startswith("_") and name not in members:
            continue
        known = members.get(name)
        if known is None:
            delattr(cls, name)
        elif isinstance(value, property):
            setattr(cls, name, _property(f"{cls.__name__}.{name}", value, known))
        else:
            setattr(cls, name, _method(cls, name, value, known))
    if "__init__" not in vars(cls):
        cls.__init__ = _no_constructor
    if VERSION in entry["versions"].split():
        classes[cls.__name__] = cls
    return cls


def _no_constructor(self: Any, *_: Any, **__: Any) -> None:
    raise TypeError(f"tensorrt.{type(self).__name__}: No constructor defined!")


def _property(name: str, value: property, known: str) -> property:
    def write(self: Any, given: Any) -> None:
        record(f"{name}=", {"value": given})
        value.fset(self, given)

    return property(value.fget, write if known == "rw" and value.fset is not None else None)


def _method(cls: type, name: str, body: Callable[..., Any], signatures: list[str]) -> Callable[..., Any]:
    overloads = [_ARGUMENT.findall(each) for each in signatures]

    def called(self: Any, *arguments: Any, **named: Any) -> Any:
        if name == "__init__":
            self._alive = True
            if not hasattr(self, "_state"):
                self._state = State()
        bound = bind(f"{cls.__name__}.{name}", overloads, arguments, named)
        if not name.startswith("__") or name == "__init__":
            record(f"{cls.__name__}.{name}", bound)
        return body(self, **bound)

    called.__name__ = name
    return called


def bind(
    name: str, overloads: list[list[tuple[str, str, str]]], given: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name, by the first overload they fit.

    Raises:
        TypeError: they fit none.
    """
    for arguments in overloads:
        rest = dict(named)
        bound = dict(zip((each for each, _, _ in arguments), given, strict=False))
        left = [each for each in arguments if each[0] not in bound]
        bound |= {each: rest.pop(each) for each, _, _ in left if each in rest}
        complete = all(each in bound or default for each, _, default in arguments)
        fits = all(_fits(bound[each], kind, default) for each, kind, default in arguments if each in bound)
        if not rest and len(given) <= len(arguments) and complete and fits:
            return bound
    lists = (", ".join(f"{each}: {kind}" for each, kind, _ in arguments) for arguments in overloads)
    kinds = " or ".join(f"({each})" for each in lists)
    shown = [*map(repr, given), *(f"{key}={value!r}" for key, value in named.items())]
    raise TypeError(f"{name}(): incompatible function arguments; supported: {kinds}; invoked with: {', '.join(shown)}")


def _fits(value: Any, kind: str, default: str) -> bool:
    if value is None:
        return default.endswith("None") or kind.split(".")[0] in ("object", "capsule")
    if kind == "int":
        return hasattr(value, "__index__") and not isinstance(value, enum.Enum)
    if kind == "Dims":
        return isinstance(value, list | tuple | classes["Dims"]) and all(hasattr(each, "__index__") for each in value)
    if kind == "buffer":
        return isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "__buffer__")
    if kind.startswith("list["):
        return isinstance(value, list | tuple)
    simple = {"str": str, "bool": bool, "float": (int, float), "tuple": tuple, "list": list}
    if kind in simple:
        return isinstance(value, simple[kind])
    if kind in ("object", "capsule", "function"):
        return True
    if kind == "ILogger.Severity":
        return isinstance(value, classes["ILogger"].Severity)
    return isinstance(value, classes.get(kind, ()))


class ApiEnum(enum.Enum):
    """An enum of pybind11: a number on request, but none itself."""

    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return int(self.value)


def enum_of(name: str) -> type[enum.Enum] | None:
    """An enum with the members of this version; None where it has no such enum."""
    entry = TABLE["enums"][name]
    if VERSION not in entry["versions"].split():
        return None
    values = {each: of_version(value) for each, value in entry["members"].items()}
    made = ApiEnum(name, {each: value for each, value in values.items() if value is not None})
    classes[name] = made
    return made
