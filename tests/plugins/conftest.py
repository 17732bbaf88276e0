"""Libraries of the operators, compiled once and kept between runs by a hash of their sources."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deepstitch.plugins.build.host import build_host_library
from deepstitch.plugins.library import PluginLibrary

from .shim import SOURCES, Shim

SANITIZERS = ("address", "undefined")


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("g++ is not installed")
    return found


@pytest.fixture(scope="session")
def host_library(compiler: str) -> PluginLibrary:
    """Every operator, on the CPU through the host shim."""
    return PluginLibrary.open(build_host_library())


@pytest.fixture(scope="session")
def sanitized_library(compiler: str) -> Path:
    """The same, under the address and undefined-behaviour sanitizers; for a process of its own."""
    return build_host_library(sanitizers=SANITIZERS, optimise="-O0")


@pytest.fixture(scope="session")
def sanitized_shim(compiler: str) -> Path:
    """The test kernels under the sanitizers; for a process of its own."""
    return build_host_library(ops=(), sanitizers=SANITIZERS, optimise="-O0", extra=SOURCES)


@pytest.fixture(scope="module", params=["native", "portable"])
def shim(request: pytest.FixtureRequest, compiler: str) -> Shim:
    """The test kernels: as on this CPU, and as on one that is not x86-64 (ucontext, no vector instructions)."""
    defines = ("DEEPSTITCH_SHIM_PORTABLE",) if request.param == "portable" else ()
    return Shim(build_host_library(ops=(), extra=SOURCES, defines=defines))


@pytest.fixture(scope="session")
def sanitized_environment(compiler: str) -> dict[str, str]:
    """What a Python needs to open a library compiled with the sanitizers."""
    # libstdc++ as well: the sanitizer looks for __cxa_throw when it is loaded, and Python does not bring it
    names = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    if not all(Path(each).is_file() for each in found):
        pytest.skip("this compiler has no address sanitizer")
    runtime = ":".join(found)
    options = "detect_leaks=0:allocator_may_return_null=1"  # leaks of Python itself
    return {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.fixture(scope="session")
def run_sanitized(sanitized_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_sanitized(arguments)``: a Python with the sanitizers' runtime."""

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, env=sanitized_environment, capture_output=True, text=True, check=False, timeout=600
        )

    return run
