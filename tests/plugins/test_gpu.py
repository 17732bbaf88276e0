"""On a GPU: every case of every operator against its reference. Without one: the benchmark script on a stand-in.

``pytest -m gpu tests/plugins/test_gpu.py`` on a machine with an NVIDIA GPU. ``DEEPSTITCH_PLUGINS_LIBRARY`` names a
library that was built elsewhere; else one is built for that card.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plugins_gpu
from benchmarks.gpu.shapes import FULL, TINY, kept_blocks, measurements
from deepstitch.plugins.common.case import Case, nmse
from deepstitch.plugins.common.cuda_driver import CudaDriver
from deepstitch.plugins.common.roofline import Work
from deepstitch.plugins.common.schema import PluginError
from deepstitch.plugins.library import DeviceLibrary
from deepstitch.plugins.registry import OPS, load

from .gpu_tools import build, fake_driver, needs_nvrtc, run_with_driver

CASES = [pytest.param(op, case, id=f"{op}-{case.name}") for op in OPS for case in load(op).cases]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceLibrary]:
    try:
        driver = CudaDriver()
    except PluginError as error:
        pytest.skip(str(error))
    named = os.environ.get("DEEPSTITCH_PLUGINS_LIBRARY")
    if named:
        path = Path(named)
    else:
        major, minor = driver.capability
        path = build(tmp_path_factory.mktemp("gpu"), (61, 10 * major + minor)).library
    yield DeviceLibrary.open(path)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), CASES)
def test_case_on_the_gpu(library: DeviceLibrary, op: str, case: Case) -> None:
    loaded, inputs = load(op), case.make()
    found, again = (library.run(loaded.schema.name, case.attributes, inputs) for _ in range(2))
    for name, wanted in loaded.reference(loaded.schema.resolve(case.attributes), inputs).items():
        assert found[name].tobytes() == again[name].tobytes(), "two runs differ"
        assert nmse(found[name], wanted) <= case.nmse, name
        if case.max_abs is not None:
            assert np.abs(found[name] - wanted).max(initial=0) <= case.max_abs, name


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_what_is_refused_on_the_gpu(library: DeviceLibrary, op: str) -> None:
    loaded = load(op)
    for each in loaded.refused:
        with pytest.raises(PluginError, match=re.escape(each.text)):
            library.run(loaded.schema.name, each.attributes, each.inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("case", load("kv_cache_append").cases, ids=lambda each: each.name)
def test_the_cache_in_place_on_the_gpu(library: DeviceLibrary, case: Case) -> None:
    inputs, op = case.make(), OPS["kv_cache_append"]
    apart = library.run(op, case.attributes, inputs)
    with (
        library.create(op, case.attributes) as instance,
        instance.prepare(inputs, shared={name: name.replace("present", "past") for name in apart}) as call,
    ):
        call.enqueue()
        assert {n: each.tobytes() for n, each in call.outputs().items()} == {n: a.tobytes() for n, a in apart.items()}


# The script, without a GPU


SCRIPT = "import sys; from benchmarks.plugins_gpu import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, Any]:
    """What the script writes when kernels run through the host shim and PyTorch on the CPU."""
    needs_nvrtc()
    folder = tmp_path_factory.mktemp("script")
    plugins_gpu.prepare(folder, (61,))
    fake_driver(folder)
    words = ["--prepared", folder, "--output", folder / "report.json", "--tiny", "--seconds", "0.001"]
    words += ["--megabytes", "1", "--rounds", "1", "--peer-device", "cpu"]
    finished = run_with_driver(
        folder, SCRIPT, *map(str, words), PYTHONPATH=os.pathsep.join([str(repository), *sys.path])
    )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return found


def test_the_script_checks_every_case(report: dict[str, Any]) -> None:
    assert {op: each["passed"] for op, each in report["cases"].items()} == {op: len(load(op).cases) for op in OPS}
    assert all(each["failed"] == {} for each in report["cases"].values())


def test_the_script_measures_every_call(report: dict[str, Any]) -> None:
    names = [(call.op, call.name) for call in measurements(TINY)]
    assert [(each["op"], each["name"]) for each in report["measurements"]] == names and "not_measured" not in report
    assert len(set(names)) == len(names)
    for each in report["measurements"]:
        assert each["finite"] and each["milliseconds"]["median"] > 0 and each["of_bound"] > 0
    assert all(value > 0 for value in report["ceilings"].values()) and len(report["ceilings"]) == 4


def test_pytorch_does_the_same_work(report: dict[str, Any]) -> None:
    """In float32 it differs from the kernels by their rounding of activations alone."""
    for each in report["measurements"]:
        if each.get("pattern") != "dynamic":
            quantized = each.get("format") in ("int4", "int8") and each["op"] != "sparse_attention"
            assert each["peers"], each["name"]
            for name, peer in each["peers"].items():
                limit = 1e-3 if quantized else 1e-5 if "float16" in name else 1e-9
                assert peer["same"] and peer["nmse"] < limit, (each["name"], name)


def test_every_shape_of_the_models_is_there() -> None:
    calls = list(measurements(FULL))
    facts = [call.facts for call in calls]
    for tokens in (1, 2, 4, 8):
        assert sum(each["phase"] == "decode" and each["tokens"] == tokens for each in facts) >= 5
    for tokens in (128, 512, 2048):
        assert sum(each["phase"] == "prefill" and each["tokens"] == tokens for each in facts) >= 5
    for context in (1024, 8192, 32768):
        found = {(each["pattern"], each["fraction"]) for each in facts if each.get("context") == context}
        assert found == {("dense", 1.0), *((kind, part) for kind in ("layout", "dynamic") for part in (0.1, 0.25))}
    assert {call.op for call in calls} == set(OPS)


def test_blocks_kept() -> None:
    kept = kept_blocks(32768, 2048, "layout", 0.1)
    assert kept.shape == (32, 512)
    for row in range(32):
        newest = 480 + row
        assert (
            kept[row, newest] == 1
            and not kept[row, newest + 1 :].any()
            and kept[row].sum() == round(0.1 * (newest + 1))
        )
    assert kept_blocks(300, 1, "dense", 1.0).tolist() == [[1, 1, 1, 1, 1]]
    assert kept_blocks(128, 128, "dense", 1.0).tolist() == [[1, 0], [1, 1]]


def test_bounds_and_goals() -> None:
    ceilings = {"copy_bytes_per_second": 100.0, "float_ops_per_second": 10.0, "dp4a_ops_per_second": 40.0}
    assert plugins_gpu.bound_seconds(Work(nbytes=200), ceilings) == (2.0, "memory")
    assert plugins_gpu.bound_seconds(Work(nbytes=200, float_ops=20, integer_ops=80), ceilings) == (4.0, "arithmetic")
    decode = {"op": "moe_experts", "name": "m", "phase": "decode", "bound_by": "memory", "of_copy_bandwidth": 0.6}
    dense = {"op": "sparse_attention", "name": "d", "phase": "prefill", "pattern": "dense", "fraction": 1.0,
             "context": 32768, "milliseconds": {"median": 6.0}}  # fmt: skip
    sparse = dense | {"name": "s", "pattern": "layout", "fraction": 0.1, "milliseconds": {"median": 1.0}}
    found = list(plugins_gpu.goals([decode | {"times_the_best_peer": 1.5}, dense, sparse]))
    assert [(each["name"], each["value"], each["reached"]) for each in found] == [
        ("m", 0.6, False),
        ("m", 1.5, True),
        ("s", 6.0, True),
    ]
    assert plugins_gpu.file_name("NVIDIA GeForce GTX 1080 Ti") == "plugins_nvidia_geforce_gtx_1080_ti.json"
