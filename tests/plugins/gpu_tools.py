"""A GPU library and a driver to run it: the machine's own, or a stand-in whose kernels run through the host shim."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from deepstitch.plugins.build.host import build_host_library, ops_with_kernels
from deepstitch.plugins.build.library import BuildConfig, BuildReport, build_library
from deepstitch.plugins.build.toolchain import ToolchainError, cuda_library

FAKE = Path(__file__).with_name("fake_cuda.cpp")
CEILINGS = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "ceilings.cuh"


def needs_nvrtc() -> None:
    """Skip where the wheels of the extra ``plugins`` are not installed."""
    try:
        cuda_library("nvrtc")
        cuda_library("nvfatbin")
    except ToolchainError as error:
        pytest.skip(str(error))


def build(folder: Path, sms: tuple[int, ...] = (61,), ops: Sequence[str] | None = None) -> BuildReport:
    """The library for GPUs, of all operators that have a kernel."""
    needs_nvrtc()
    return build_library(BuildConfig(output=folder, sms=sms, ops=tuple(ops or ops_with_kernels())))


def fake_driver(folder: Path) -> Path:
    """A folder with a ``libcuda.so.1`` to put on the library path."""
    folder.mkdir(exist_ok=True)
    built = build_host_library(extra=(FAKE, CEILINGS))
    (folder / "libcuda.so.1").symlink_to(built)
    return folder


def run_with_driver(
    driver: Path, code: str, *arguments: str | Path, log: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that finds this driver first."""
    paths = os.pathsep.join(filter(None, [str(driver), os.environ.get("LD_LIBRARY_PATH")]))
    changed = {"LD_LIBRARY_PATH": paths, **environment} | ({"FAKE_CUDA_LOG": str(log)} if log else {})
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | changed, capture_output=True, text=True, check=False)
