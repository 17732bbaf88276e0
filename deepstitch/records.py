"""From parsed JSON to frozen dataclasses, with every entry's name and type checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from deepstitch.errors import BundleError, did_you_mean

__all__ = ["parse_record"]


def parse_record(kind: Any, value: Any, where: str, edited: str) -> Any:
    """Build ``kind`` (a dataclass, container or scalar annotation) from parsed JSON.

    Args:
        kind: what is expected.
        value: what was found.
        where: file and entry, for messages.
        edited: how it may have come about and what to do, for messages.

    Raises:
        BundleError: an entry is unknown, missing or of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        chosen = next((option for option in options if isinstance(option, type) and type(value) is option), options[0])
        return parse_record(chosen, value, where, edited)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where, edited)
    if origin is tuple:
        return _tuple(arguments, value, where, edited)
    if origin is dict:
        _expect(dict, value, where, edited)
        return {key: parse_record(arguments[1], item, f"{where}.{key}", edited) for key, item in value.items()}
    if kind is float and type(value) is int:
        value = float(value)
    _expect(kind, value, where, edited)
    return value


def _tuple(arguments: tuple[Any, ...], value: Any, where: str, edited: str) -> tuple[Any, ...]:
    _expect(list, value, where, edited)
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(value) != len(kinds):
        raise BundleError(f"{where}: expected {len(kinds)} entries, found {len(value)}; {edited}")
    return tuple(
        parse_record(each, item, f"{where}[{place}]", edited)
        for place, (each, item) in enumerate(zip(kinds, value, strict=True))
    )


def _expect(kind: type, value: Any, where: str, edited: str) -> None:
    if type(value) is not kind:
        raise BundleError(f"{where}: expected {kind.__name__}, found {value!r}; {edited}")


def _dataclass(kind: Any, value: Any, where: str, edited: str) -> Any:
    _expect(dict, value, where, edited)
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise BundleError(f"{where}: unknown entry '{key}'{did_you_mean(key, hints)}; {edited}")
    required = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for key in sorted(required - set(value)):
        raise BundleError(f"{where}: entry '{key}' is missing; {edited}")
    return kind(**{key: parse_record(hints[key], item, f"{where}.{key}", edited) for key, item in value.items()})
