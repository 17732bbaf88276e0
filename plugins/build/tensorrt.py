"""Finds TensorRT's headers, and says how the adapters are compiled against them.

The headers are the user's: TensorRT's own folder, or ``include/`` of a release of NVIDIA/TensorRT. Nothing of CUDA is
needed, and nothing is linked: an adapter only derives from classes that are whole in the headers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepstitch.plugins.build.toolchain import ToolchainError, package_root
from deepstitch.plugins.registry import OPS

__all__ = ["INCLUDE_VARIABLE", "ROOT_VARIABLE", "TensorRT", "find_tensorrt", "read_version"]

INCLUDE_VARIABLE, ROOT_VARIABLE = "TENSORRT_INCLUDE_DIR", "TENSORRT_ROOT"
_HEADER, _VERSION_HEADER = "NvInferRuntime.h", "NvInferVersion.h"
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+(\w+)", re.MULTILINE)
_ROUTE = "set TENSORRT_INCLUDE_DIR to the folder that holds NvInferRuntime.h"
_SYSTEM = ("usr/include/x86_64-linux-gnu", "usr/include/aarch64-linux-gnu", "usr/include", "usr/local/tensorrt/include")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRT:
    """Headers of one TensorRT.

    Attributes:
        include: the folder that holds them.
        number: major, minor, patch.
    """

    include: Path
    number: tuple[int, int, int]

    @property
    def version(self) -> str:
        """For example ``8.6.1``."""
        return ".".join(map(str, self.number))

    @property
    def generation(self) -> int:
        """Of the plugin interface: 2 (IPluginV2DynamicExt) before TensorRT 10, 3 (IPluginV3) from there on."""
        return 3 if self.number[0] >= 10 else 2

    @property
    def suffix(self) -> str:
        """Of a library's name: it serves one major version."""
        return f"_trt{self.number[0]}"

    @property
    def sources(self) -> tuple[Path, ...]:
        """The adapters: one file per operator, and what the registry looks for."""
        adapters = (package_root() / folder / "tensorrt" / f"v{self.generation}.cpp" for folder in OPS)
        return (package_root() / "common" / "tensorrt" / "library.cpp", *adapters)

    @property
    def headers(self) -> tuple[Path, ...]:
        """Of ours, that the adapters include."""
        return tuple(sorted((package_root() / "common" / "tensorrt").rglob("*.h")))

    @property
    def compile_flags(self) -> tuple[str, ...]:
        """For the adapters. TensorRT marks the interface of 8.6 as deprecated; it is the one that has SM 6.1."""
        ours = package_root() / "common" / "tensorrt" / "cuda"
        return ("-isystem", str(self.include), "-isystem", str(ours), "-Wno-deprecated-declarations")

    @property
    def link_flags(self) -> tuple[str, ...]:
        """None: the library has no undefined symbol of TensorRT, hence needs no search path for it."""
        return ()


def find_tensorrt(root: Path | None = None) -> TensorRT | None:
    """The headers to compile the adapters against.

    Args:
        root: TensorRT's folder, or the one of its headers. If None, ``TENSORRT_INCLUDE_DIR``, ``TENSORRT_ROOT`` and
            the system's folders are looked at, in this order.

    Returns:
        None if nothing was named and the system has none.

    Raises:
        ToolchainError: a folder was named and holds no headers, or headers of a version that is not supported.
    """
    for folder, named_by in _named(root):
        include = next((each for each in (folder, folder / "include") if (each / _HEADER).is_file()), None)
        if include is None:
            raise ToolchainError(f"{named_by}: there is no {_HEADER} in {folder} or {folder / 'include'}; {_ROUTE}")
        return _checked(include)
    for folder in (Path("/") / each for each in _SYSTEM):
        if (folder / _HEADER).is_file():
            return _checked(folder)
    return None


def _named(root: Path | None) -> Iterator[tuple[Path, str]]:
    if root is not None:
        yield root, "--tensorrt-root"
    for variable in (INCLUDE_VARIABLE, ROOT_VARIABLE):
        if os.environ.get(variable):
            yield Path(os.environ[variable]), variable


def _checked(include: Path) -> TensorRT:
    number = read_version(include)
    if number < (8, 6, 0):
        shown = ".".join(map(str, number))
        raise ToolchainError(f"{include} is of TensorRT {shown}; the adapters need 8.6 or later, {_ROUTE} of one")
    return TensorRT(include=include.resolve(), number=number)


def read_version(include: Path) -> tuple[int, int, int]:
    """Major, minor and patch of the headers in a folder.

    Raises:
        ToolchainError: ``NvInferVersion.h`` does not say.
    """
    try:
        defined: dict[str, str] = dict(_DEFINE.findall((include / _VERSION_HEADER).read_text("utf-8", "replace")))
    except OSError as error:
        raise ToolchainError(f"{include / _VERSION_HEADER}: {error.strerror}; {_ROUTE}") from None
    numbers = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = defined.get(f"NV_TENSORRT_{part}", "")
        value = defined.get(value, value)  # from TensorRT 10 on the name of another definition
        if not value.isdigit():
            raise ToolchainError(f"{include / _VERSION_HEADER} defines no NV_TENSORRT_{part}; {_ROUTE}")
        numbers.append(int(value))
    return numbers[0], numbers[1], numbers[2]
