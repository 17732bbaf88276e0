"""The script for a machine with a GPU, whole: stand-ins for the driver, TensorRT and ONNX Runtime's CUDA kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import engines_gpu
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.plugins.build.host import build_host_library

from ..fake_tensorrt.installed import FOLDER as FAKE_TENSORRT
from ..fake_tensorrt.installed import variables_of
from ..fake_tensorrt.plugin_library import stand_in_library

TESTS = Path(__file__).resolve().parents[1]


def run(*words: str | Path, driver: Path | None, **environment: str) -> subprocess.CompletedProcess[str]:
    libraries = os.pathsep.join(filter(None, [str(driver or ""), os.environ.get("LD_LIBRARY_PATH", "")]))
    modules = [str(FAKE_TENSORRT), str(TESTS / "fake_onnxruntime"), os.environ.get("PYTHONPATH", "")]
    changed = {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": os.pathsep.join(filter(None, modules)), **environment}
    command = [sys.executable, "-m", "benchmarks.engines_gpu", "--tiny", *map(str, words)]
    return subprocess.run(
        command, env=os.environ | changed, capture_output=True, text=True, check=False, cwd=TESTS.parent, timeout=600
    )


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("cuda.bindings", reason="the extra cuda is not installed")
    folder = tmp_path_factory.mktemp("driver")
    fake = TESTS / "plugins" / "fake_cuda.cpp"
    (folder / "libcuda.so.1").symlink_to(build_host_library(ops=("deepstack_add",), extra=(fake,)))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported where there is no card."""
    folder = tmp_path_factory.mktemp("work")
    alone = run("--work", folder, driver=None, **variables_of("8.6.1"))
    assert alone.returncode == 2 and "there is no card to measure: " in alone.stderr, alone.stderr
    prepared = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    assert prepared == ["sample-fp32/expected.npz", "sample-fp32/ort-cuda", "sample-fp32/portable", "sample-fp32/trt8"]
    return folder


def test_problems_of_a_check_are_the_reason(tmp_path: Path) -> None:
    """They are on stdout, nothing is on stderr."""
    library = stand_in_library(tmp_path, sm=90)
    words = ("build", CHECKPOINT, "--target", "trt8", "--check", "--weights", "fp32", "--plugins", library, "--json")
    found = engines_gpu._run([sys.executable, "-m", "deepstitch.cli", *map(str, words)])
    assert found["failed"].startswith("exit code 1: it has no code for sm_61"), found


@pytest.mark.slow
def test_the_whole_script(work: Path, driver: Path, tmp_path: Path) -> None:
    plugins, report = stand_in_library(tmp_path / "plugins"), tmp_path / "report.json"
    words = ("--work", work, "--prepared", "--plugins", plugins, "--output", report)
    done = run(*words, driver=driver, FAKE_ORT="1", **variables_of("8.6.1"))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text("utf-8"))
    assert found == json.loads(done.stdout)
    assert found["card"]["sm"] == 61 and found["card"]["bytes"] > 0
    for target in ("trt8", "ort-cuda"):
        each = found["models"]["sample-fp32"][target]
        compared, speed = each["compare"], each["speed"]
        assert compared["failed"] == [] and compared["stages"] >= 5 and compared["skipped"] == {}, each
        assert max(compared["worst_relative_error"].values()) < 1e-4
        assert speed["generated_tokens"] == 4 and speed["decode_tokens_per_second"]["min"] > 0
    built = found["models"]["sample-fp32"]["trt8"]["build"]
    assert "failed" not in built and set(built["engines"]["graphs"]) == {"decoder", "vision_encoder"}, built
    assert "transformers" not in found["models"]["sample-fp32"], "torch has no CUDA here"


@pytest.mark.slow
def test_what_fails_is_in_the_report_and_the_rest_goes_on(work: Path, driver: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = ("--work", work, "--prepared", "--output", report)
    done = run(*words, driver=driver, FAKE_ORT="1", FAKE_ORT_FAILS_TO_RUN="CUDA failure 700", **variables_of("8.6.1"))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text("utf-8"))["models"]["sample-fp32"]
    assert "plugin" in found["trt8"]["build"]["failed"], "no library was given"
    assert "CUDA failure 700" in found["ort-cuda"]["compare"]["failed"]
