"""The CMake route: nvcc instead of NVRTC. Skipped where there is no cmake or no nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deepstitch.plugins.build.contents import mismatches, read_library


def nvcc_architectures() -> list[int]:
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("cmake") is None:
        pytest.skip("needs cmake and nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return sorted(int(each) for each in re.findall(r"sm_(\d+)$", listed, re.MULTILINE))


def configure(repository: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(repository / "plugins"), "-B", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_nvcc_that_is_too_new_is_refused(repository: Path, tmp_path: Path) -> None:
    if 61 in nvcc_architectures():
        pytest.skip("this nvcc knows sm_61")
    finished = configure(repository, tmp_path, "-DDEEPSTITCH_SM=61")
    said = " ".join(finished.stderr.split())
    assert finished.returncode != 0 and "does not compile for sm_61. CUDA 12.9 is the last release" in said
    finished = configure(repository, tmp_path, "-DDEEPSTITCH_SM=52")
    assert finished.returncode != 0 and "the kernels need dp4a" in finished.stderr


def test_headers_that_are_not_there(repository: Path, tmp_path: Path) -> None:
    sm = next(each for each in nvcc_architectures() if each >= 61)
    finished = configure(repository, tmp_path, f"-DDEEPSTITCH_SM={sm}", "-DTENSORRT_ROOT=/nowhere")
    assert finished.returncode != 0 and "there is no NvInferRuntime.h" in finished.stderr


@pytest.mark.slow
def test_it_makes_the_same_library(repository: Path, tmp_path: Path) -> None:
    sm = next(each for each in nvcc_architectures() if each >= 61)
    finished = configure(repository, tmp_path, f"-DDEEPSTITCH_SM={sm}", "-DTENSORRT_ROOT=", "-DTENSORRT_INCLUDE_DIR=")
    assert finished.returncode == 0, finished.stderr
    finished = subprocess.run(["cmake", "--build", str(tmp_path), "-j2"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    contents = read_library(tmp_path / "libdeepstitch_plugins.so")
    assert contents.targets == (f"sm_{sm}", f"compute_{sm}") and mismatches(contents) == []
