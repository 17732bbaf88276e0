"""ONNX Runtime's CUDA engine, with stand-ins below: numbers, what moves where, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.manifest import Manifest

from .conftest import Card, assert_same
from .scenarios import answers, picture, sequences

pytest.importorskip("cuda.bindings", reason="the extra cuda is not installed")

Endless = Callable[[str], Path]
SCENARIOS = Path(__file__).with_name("ort_cuda_scenarios.py")


def scenario(card: Card, name: str, *arguments: str | Path, **environment: str) -> Any:
    finished = card.run([SCENARIOS, name, *arguments], **environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def bundle(endless: Endless) -> Path:
    return endless("ort-cuda")


def test_answers_are_those_of_the_cpu(bundle: Path, endless: Endless, card: Card) -> None:
    assert_same(scenario(card, "answers", bundle), answers(str(endless("portable")), "ort"))


def test_the_cache_is_right_through_all_that_happens_to_rows(bundle: Path, endless: Endless, card: Card) -> None:
    wanted, found = sequences(str(endless("portable")), "ort"), scenario(card, "sequences", bundle)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def run(bundle: Path, card: Card, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[str]]]:
    """A question about a picture, five tokens; and the calls of the driver."""
    log = tmp_path_factory.mktemp("trace") / "cuda"
    question = ("--image", picture("count"), "--prompt", "How many squares are there?")
    arguments = ("run", bundle, *question, "--max-tokens", "5", "--json")
    found = scenario(card, "command", *arguments, FAKE_CUDA_LOG=str(log))
    assert found["code"] == 0, found["error"]
    return found, [line.split() for line in log.read_text().splitlines()]


def test_the_target_chooses_the_engine_and_everything_is_on_one_stream(run: Any) -> None:
    calls = run[0]["calls"]
    sessions = [call[2] for call in calls if call[0] == "session"]
    assert len(sessions) == 2 and len({each["user_compute_stream"] for each in sessions}) == 1
    assert all(each["use_tf32"] == "0" for each in sessions)
    runs = [call for call in calls if call[0] == "run"]
    assert len(runs) == 1 + 1 + 4, "a picture, a prompt, and one run per further token"
    assert not any(waits for _, _, waits in runs), "ONNX Runtime does not wait for the card by itself"
    assert len(json.loads(run[0]["out"])["token_ids"]) == 5


def test_visual_rows_and_the_cache_stay_on_the_card(run: Any, bundle: Path) -> None:
    found, driver = run
    model = Manifest.read(bundle).model
    downloads = [int(line[1]) for line in driver if line[0] == "cuMemcpyDtoHAsync_v2"]
    assert set(downloads) == {4 * model.vocab_size} and len(downloads) == 5, "logits, and nothing else"
    runs = [call[1] for call in found["calls"] if call[0] == "run"]
    vision, prefill, *steps = runs
    assert "pixel_values" in vision
    caches = [{pointer for name, pointer in each.items() if "past_key" in name} for each in (prefill, *steps)]
    assert all(cache == caches[0] for cache in caches), "one cache, where it was"
    copied = {int(line[2], 16) for line in driver if line[0] == "cuMemcpyDtoDAsync_v2"}
    rows = {"inputs_embeds": json.loads(found["out"])["prompt_tokens"], "deepstack_embeds": 2 * model.num_deepstack}
    for name, count in rows.items():
        memory = range(prefill[name], prefill[name] + 4 * count * model.hidden_size)
        assert any(target in memory for target in copied), f"visual rows go to {name} within the card"


def test_what_does_not_fit_is_refused(bundle: Path, endless: Endless, card: Card) -> None:
    said = scenario(card, "refusals", bundle, endless("portable"))
    patterns = {
        "another target": "BundleError: .*--target portable.*no CUDA kernel.*--target ort-cuda",
        "too new for Pascal": r"DeviceError: onnxruntime-gpu 1\.23\.2 .*6\.1\): pip install onnxruntime-gpu==1\.20\.2",
        "not too new for Turing": "nothing was refused",
        "CUDA left out": "DeviceError: .*cannot load its CUDA kernels .*LD_LIBRARY_PATH",
        "no code": r"DeviceError: .*no code for this card .*6\.1\): install",
        "no memory": "OutOfDeviceMemory: the card .*GiB. has no memory",
        "a node on the CPU": r"BundleError: .*\.onnx: onnxruntime .* no CUDA kernel for some node of graph",
        "damaged": r"BundleError: .*\.onnx: onnxruntime cannot load graph .*Protobuf parsing failed",
        "int8 in 1.20.2": "DeviceError: .*int8 weights.*takes for four bits; pip install onnxruntime-gpu==1.22.0",
        "int8 in 1.22.0": "nothing was refused",
        "no CUDA": "DeviceError: the installed onnxruntime .*pip uninstall onnxruntime.*onnxruntime-gpu==1.20.2",
        "runs out": "OutOfDeviceMemory: ",
        "fails": "DeviceError: onnxruntime failed on the card .*CUDNN_STATUS_EXECUTION_FAILED",
    }
    assert said.keys() == patterns.keys()
    for name, pattern in patterns.items():
        assert "\n" not in said[name]
        assert re.match(pattern, said[name]), (name, said[name])


def test_libraries_of_pip_packages_are_found(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or pytest.skip("gcc is not installed")
    for package, name in (("a", "libcurand"), ("b", "libcublasLt")):
        folder = tmp_path / "nvidia" / package / "lib"
        folder.mkdir(parents=True)
        (folder / "empty.c").write_text(f"int {name}_of_a_test;")
        output = ("-o", folder / f"{name}.so.77", f"-Wl,-soname,{name}.so.77")
        subprocess.run([compiler, "-shared", folder / "empty.c", *output], check=True)
    code = "import ctypes, pathlib, sys; from deepstitch.runtime.engine.ort_cuda_session import preload; "
    code += "preload(pathlib.Path(sys.argv[1])); ctypes.CDLL(sys.argv[2])"
    for name, found in (("libcublasLt.so.77", True), ("libcurand.so.77", True), ("libcudnn.so.77", False)):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "nvidia", name], capture_output=True, check=False)
        assert (done.returncode == 0) == found, done.stderr


def test_without_a_driver_nothing_is_loaded(bundle: Path) -> None:
    said = scenario(Card(driver=None), "command", "run", bundle, "--prompt", "Hello")
    assert said["code"] == 2 and "no NVIDIA driver" in said["error"] and not said["calls"]
