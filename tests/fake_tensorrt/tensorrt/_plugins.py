"""The plugin registry: creators of the libraries that were loaded into it."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

from ._api import MAJOR, Object, classes, make, native

_LIST = "getPluginCreators" if MAJOR < 10 else "getCreators"


class _Named:
    @property
    def name(self) -> str:
        return self._state.name

    @property
    def plugin_version(self) -> str:
        return self._state.version

    @property
    def plugin_namespace(self) -> str:
        return self._state.namespace


def _creator(name: str, base: type) -> type:
    return native(type(name, (base,), {key: value for key, value in vars(_Named).items() if not key.startswith("_")}))


if MAJOR < 10:
    CREATOR = _creator("IPluginCreator", Object)
else:
    IPluginCreatorInterface = native(type("IPluginCreatorInterface", (Object,), {}))
    IPluginCreator = _creator("IPluginCreator", IPluginCreatorInterface)
    CREATOR = _creator("IPluginCreatorV3One", IPluginCreatorInterface)


class Handle:
    """What ``load_library`` hands out."""


def _creators_of(path: Path) -> list[Object] | None:
    """Of a library that TensorRT can load; None of anything else."""
    try:
        library = ctypes.CDLL(str(path.resolve()))
        library[_LIST], library["setLoggerFinder"]
        describe = library["deepstitch_describe"]
    except (OSError, AttributeError):
        return None
    describe.restype = ctypes.c_char_p
    ops = json.loads(describe())["ops"]
    return [
        make(CREATOR, name=each["name"], version=str(each["version"]), namespace="deepstitch.plugins") for each in ops
    ]


@native
class IPluginRegistry(Object):
    def load_library(self, plugin_path: str) -> Handle | None:
        found = _creators_of(Path(plugin_path))
        if found is None:
            return None
        handle = Handle()
        self._state.loaded[handle] = found
        return handle

    def deregister_library(self, handle: Handle) -> None:
        del self._state.loaded[handle]

    @property
    def plugin_creator_list(self) -> list[Object]:
        return [each for creators in self._state.loaded.values() for each in creators]

    @property
    def all_creators(self) -> list[Object]:
        return [each for creators in self._state.loaded.values() for each in creators]

    def get_plugin_creator(self, type: str, version: str, plugin_namespace: str = "") -> Object | None:
        return find(type, version, plugin_namespace) if MAJOR < 10 else None  # those of V3 are no IPluginCreator

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Object | None:
        return find(type, version, plugin_namespace)


_REGISTRY = make(IPluginRegistry, loaded={})


def find(name: str, version: str, namespace: str) -> Object | None:
    """The creator that a node or a plan asks for."""
    creators = (each for loaded in _REGISTRY._state.loaded.values() for each in loaded)
    return next((each for each in creators if _address(each) == (name, version, namespace)), None)


def _address(creator: Object) -> tuple[str, str, str]:
    return creator._state.name, creator._state.version, creator._state.namespace


def get_plugin_registry() -> IPluginRegistry:
    return _REGISTRY


def init_libnvinfer_plugins(logger: Object | None, namespace: str) -> bool:
    if logger is not None and not isinstance(logger, classes["ILogger"]):
        raise TypeError("init_libnvinfer_plugins(): incompatible function arguments")
    return isinstance(namespace, str)
