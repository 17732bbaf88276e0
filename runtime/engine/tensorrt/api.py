"""NVIDIA's Python package ``tensorrt``: its version and what differs by it, its log, its plugin registry."""

from __future__ import annotations

import importlib
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deepstitch.errors import DeviceError, UnsupportedError
from deepstitch.manifest import file_sha256

__all__ = ["ContextRules", "TensorRT", "import_tensorrt", "version_of"]

_LOG = logging.getLogger("deepstitch.tensorrt")
_LEVELS: Mapping[str, int] = MappingProxyType(
    {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.WARNING,
        "INFO": logging.DEBUG,  # a build writes thousands of lines of it
        "VERBOSE": logging.DEBUG - 5,
    }
)
_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "FLOAT": "float32",
        "HALF": "float16",
        "BF16": "bfloat16",
        "INT8": "int8",
        "UINT8": "uint8",
        "INT32": "int32",
        "INT64": "int64",
        "BOOL": "bool",
    }
)
_KEPT_ERRORS = 3
_ERROR_LENGTH = 300
# The bindings of 8.6.1 can be installed alone, under the second name.
_MODULES = ("tensorrt", "tensorrt_bindings")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextRules:
    """How a version takes device memory for its execution contexts.

    Attributes:
        strategy: a context without memory is asked for by a strategy; else by a method of its own.
        size: the attribute of an engine that says how much memory its contexts need.
        sized: the memory is given with its size.
    """

    strategy: bool
    size: str
    sized: bool


# By the first version each holds for.
_RULES: tuple[tuple[tuple[int, int], ContextRules], ...] = (
    ((8, 6), ContextRules(strategy=False, size="device_memory_size", sized=False)),
    ((10, 0), ContextRules(strategy=True, size="device_memory_size", sized=False)),
    ((10, 1), ContextRules(strategy=True, size="device_memory_size_v2", sized=True)),
)


def import_tensorrt() -> Any:
    """NVIDIA's package.

    Raises:
        UnsupportedError: it is not installed, or its libraries do not load.
    """
    failures = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                failures.append(f"{name}: {error}")
        except (ImportError, OSError) as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise UnsupportedError(
            f"NVIDIA's Python package does not load ({'; '.join(failures)}); install it again, with the libraries it "
            "names"
        )
    raise UnsupportedError(
        "NVIDIA's Python package tensorrt is not installed; for cards of compute capability 6.1 install TensorRT 8.6 "
        "(pip install --extra-index-url https://pypi.nvidia.com tensorrt==8.6.1 'nvidia-cudnn-cu12<9'), for 7.5 and "
        "newer 10 or 11 (pip install tensorrt-cu12)"
    )


def version_of(module: Any) -> tuple[int, ...]:
    """The numbers of its version, without what stands behind them."""
    numbers = []
    for part in str(module.__version__).split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _logger(module: Any) -> Any:
    """A logger of TensorRT's that writes to Python's and keeps the last errors."""

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT_ERRORS)

        def log(self, severity: Any, msg: str) -> None:
            level = _LEVELS.get(severity.name, logging.ERROR)
            # errors come back as exceptions: the log says them where somebody listens, and never twice on a terminal
            _LOG.log(level if level < logging.ERROR else logging.DEBUG, "%s", msg)
            if level >= logging.ERROR:
                self.errors.append(" ".join(msg.split())[:_ERROR_LENGTH])

    return Logger()


class TensorRT:
    """The package, opened; :meth:`load` is the way to it.

    Attributes:
        module: the package.
        version: as text, for people and folders.
        rules: of this version.
        logger: for objects that TensorRT makes.
    """

    def __init__(self) -> None:
        """Import it.

        Raises:
            UnsupportedError: it is not installed, or too old.
        """
        self.module = import_tensorrt()
        self.version = str(self.module.__version__)
        known = [rules for first, rules in _RULES if version_of(self.module) >= first]
        if not known:
            raise UnsupportedError(f"TensorRT {self.version} is too old; 8.6 is the first that works")
        self.rules = known[-1]
        self.logger = _logger(self.module)
        self._plugins: str | None = None

    @classmethod
    @cache
    def load(cls) -> TensorRT:
        """The one of this program: TensorRT has one registry and one logger for all its objects.

        Raises:
            UnsupportedError: it is not installed, or too old.
        """
        return cls()

    def failure(self, what: str, remedy: str) -> DeviceError:
        """An error with what TensorRT logged last."""
        said = "; ".join(self.logger.errors) or "without saying why"
        self.logger.errors.clear()
        return DeviceError(f"TensorRT {self.version} {what}: {said}; {remedy}")

    def load_plugins(self, library: Path) -> None:
        """Load a plugin library into the registry, unless it is there already.

        Raises:
            DeviceError: it does not load, or this program has another one.
        """
        sha256 = file_sha256(library)
        if sha256 == self._plugins:
            return
        if self._plugins is not None:  # its creators would take the places of those that engines hold
            raise DeviceError(
                f"{library}: this program has loaded another plugin library already; engines that were built with "
                "different ones need programs of their own"
            )
        # One of two ways, and the only one for a library that lists its creators; ctypes would register nothing.
        if self.module.get_plugin_registry().load_library(str(library)) is None:
            raise self.failure(
                f"does not load the plugin library {library}",
                "build it for this TensorRT with 'deepstitch plugins build', and the engines again with it",
            )
        self._plugins = sha256

    def dtype(self, kind: Any) -> str:
        """numpy's name of one of TensorRT's types."""
        return _DTYPES.get(kind.name, kind.name.lower())
