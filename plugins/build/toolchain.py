"""Where the compilers are: NVRTC and nvFatbin from pip or the system, g++, a disassembler that still reads sm_61.

Nothing is loaded on import. Every search that fails names what to install.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from deepstitch.errors import DeepstitchError

__all__ = ["ToolchainError", "cuda_library", "cxx", "nvdisasm", "package_root"]

# CUDA 12.9 is the last release that compiles for sm_61: the wheels and the system's libraries of that major are used.
_LIBRARIES = {
    "nvrtc": ("nvidia-cuda-nvrtc-cu12==12.9.86", "cuda_nvrtc", "libnvrtc.so.12"),
    "nvfatbin": ("nvidia-nvfatbin-cu12==12.9.82", "nvfatbin", "libnvfatbin.so.12"),
}
_SYSTEM_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")


class ToolchainError(DeepstitchError):
    """A compiler or one of its libraries is missing, too old, or failed."""


def package_root() -> Path:
    """The folder that holds the operators, whether it is installed or a working tree."""
    return Path(__file__).resolve().parent.parent


def _nvidia_wheels() -> Iterator[Path]:
    """The folders ``nvidia/`` that NVIDIA's wheels share, without importing any of them."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield Path(folder)


def _toolkits() -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    yield from (Path("/") / "usr/local/cuda", *sorted((Path("/") / "usr/local").glob("cuda-12*"), reverse=True))


def _candidates(folder: str, file: str) -> Iterator[str]:
    for root in _nvidia_wheels():
        yield str(root / folder / "lib" / file)
    for root in _toolkits():
        yield from (str(root / each / file) for each in _SYSTEM_FOLDERS)


@functools.cache
def cuda_library(name: str) -> ctypes.CDLL:
    """Open ``nvrtc`` or ``nvfatbin``.

    Raises:
        ToolchainError: neither a wheel nor a CUDA 12 toolkit has it.
    """
    wheel, folder, file = _LIBRARIES[name]
    found = next((path for path in _candidates(folder, file) if Path(path).is_file()), file)
    try:
        return ctypes.CDLL(found)
    except OSError as error:
        raise ToolchainError(
            f"compiling for GPUs needs {file}, which was not found ({error}): pip install {wheel}, or all of it with "
            "pip install 'deepstitch[plugins]'; CUDA 12.9 is the last release that compiles for sm_61"
        ) from None


def cxx() -> str:
    """The C++ compiler: ``CXX``, else g++, else c++.

    Raises:
        ToolchainError: there is none.
    """
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++"]:
        found = shutil.which(str(name))
        if found:
            return found
    raise ToolchainError(
        f"no C++ compiler: {chosen or 'g++'} is not on the PATH; install g++ (Debian: apt-get install g++) or set CXX"
    )


@functools.cache
def nvdisasm() -> str | None:
    """A disassembler for sm_61 code, or None: releases after 13.0 refuse that architecture.

    ``DEEPSTITCH_NVDISASM`` names one; else the PATH, a CUDA toolkit, or the one inside triton's wheel is taken.
    """
    triton = importlib.util.find_spec("triton")
    named = [os.environ.get("DEEPSTITCH_NVDISASM"), shutil.which("nvdisasm")]
    named += [str(root / "bin" / "nvdisasm") for root in _toolkits()]
    named += [str(Path(each) / "backends/nvidia/bin/nvdisasm") for each in (triton.submodule_search_locations or ())
              ] if triton else []  # fmt: skip
    return next((path for path in named if path and _reads_sm_61(path)), None)


def _reads_sm_61(path: str) -> bool:
    if not os.access(path, os.X_OK):
        return False
    finished = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"release (\d+)\.(\d+)", finished.stdout)
    return version is not None and (int(version[1]), int(version[2])) <= (13, 0)
