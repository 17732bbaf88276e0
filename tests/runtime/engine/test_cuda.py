"""The module of the driver, through the real bindings, over a driver that is a stand-in."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from .conftest import Card

pytest.importorskip("cuda.bindings", reason="the extra cuda is not installed")


def test_values_go_where_they_should(card: Card) -> None:
    found = card.scenario("copies")
    assert [name for name, right in found.items() if not right] == []
    assert len(found) == 10


def test_work_is_in_order_and_can_be_recorded(card: Card, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert card.scenario("recording", FAKE_CUDA_LOG=str(log)) == {
        "not waited for": [0.0] * 4,
        "waited for": [1.0] * 4,
        "before launch 2": [1.0] * 4,  # recorded is not done
        "before launch 3": [2.0] * 4,
        "after": [3.0] * 4,
        "refused": [900.0],  # waiting cannot be recorded
    }
    calls = [line.split()[0] for line in log.read_text().splitlines()]
    assert calls.count("cuGraphLaunch") == 2
    # what is made is given back, also where the recording failed
    assert calls.count("cuGraphInstantiateWithFlags") == calls.count("cuGraphExecDestroy") == 1
    assert calls.count("cuStreamBeginCapture_v2") == calls.count("cuStreamEndCapture") == 2


def test_errors_name_the_call_and_the_remedy(card: Card) -> None:
    said = card.scenario("driver_errors")
    assert said["call"].startswith("CudaError: CUDA: cuStreamSynchronize failed with CUDA_ERROR_FAKE (700); ")
    assert "OutOfDeviceMemory: the card (No GPU (host shim)) has no 4.0 MiB for a tensor: 2.0 MiB" in said["memory"]
    assert "--max-context" in said["memory"]
    assert "finds no card (cuInit: 100)" in said["no card"] and "CUDA_VISIBLE_DEVICES" in said["no card"]
    assert "does not start (cuInit: 999)" in said["broken"]


def test_no_driver(driver: Path, tmp_path: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a driver")
    code = "from deepstitch.runtime.engine.cuda import Cuda\ntry: Cuda()\nexcept Exception as error: print(error)"
    said = Card(None).run(["-c", code]).stdout
    assert said.startswith("there is no NVIDIA driver here (libcuda.so.1:") and "--target ort-cpu" in said


def test_no_bindings(card: Card, tmp_path: Path) -> None:
    (tmp_path / "cuda" / "bindings").mkdir(parents=True)
    (tmp_path / "cuda" / "bindings" / "__init__.py").write_text("raise ImportError")
    code = "from deepstitch.runtime.engine.cuda import Cuda\ntry: Cuda()\nexcept Exception as error: print(error)"
    said = card.run(["-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]).stdout
    assert "needs the package 'cuda-bindings': pip install 'deepstitch[cuda]'" in said
