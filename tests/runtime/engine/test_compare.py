"""``deepstitch compare --engine tensorrt`` and Polygraphy's loaders, with stand-ins below."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import LIMITS, Card

pytest.importorskip("cuda.bindings", reason="the extra cuda is not installed")
pytest.importorskip("polygraphy", reason="the extra compare is not installed")

Endless = Callable[[str], Path]

LOAD = """
import sys
from polygraphy.logger import G_LOGGER
from deepstitch.export.compare.polygraphy_loaders import BundleRunner, EngineFromBundle
with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
    engine = EngineFromBundle(sys.argv[1], "vision_encoder")()
    with BundleRunner(sys.argv[1], "vision_encoder") as runner:
        inputs = set(runner.get_input_metadata(use_numpy_dtypes=False))
print(engine.num_io_tensors, len(inputs))
"""

# What a script finds in place of Polygraphy's TrtRunner, which wants CUDA's runtime library: an engine as it was
# loaded, computed by the definitions; inputs must have the engine's types, and calls be those of the profile.
RUN_SCRIPT = """
import runpy, sys
from pathlib import Path
import polygraphy.backend.trt as backend
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from deepstitch.export.compare.polygraphy_engine import graph_session
from deepstitch.runtime.bundle import Bundle

class Runner:
    def __init__(self, engine, name):
        self.engine, self.name, self.profile = engine, name, 0

    def __enter__(self):
        import tensorrt
        self.engine, self.session = self.engine(), graph_session(Bundle.open(sys.argv[2]), self.name)
        names = [self.engine.get_tensor_name(place) for place in range(self.engine.num_io_tensors)]
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        self.dtypes = {name: tensorrt.nptype(self.engine.get_tensor_dtype(name)) for name in inputs}
        return self

    def __exit__(self, *_):
        self.session = None

    def set_profile(self, index):
        self.profile = index

    def get_input_metadata(self, use_numpy_dtypes):
        metadata = TensorMetadata()
        for name, dtype in self.dtypes.items():
            metadata.add(name, dtype=DataType.from_dtype(dtype), shape=None)
        return metadata

    def infer(self, feeds):
        assert {name: array.dtype.type for name, array in feeds.items()} == self.dtypes
        if self.name == "decoder":
            tokens, wanted = feeds["inputs_embeds"].shape[1], feeds["logit_index"].shape[1]
            assert wanted == 1 and (tokens == 1) == (self.profile == 1) and tokens <= 64
        given = {each.name: feeds[each.name].astype("int64") if "64" in each.type else feeds[each.name]
                 for each in self.session.get_inputs()}
        return dict(zip([each.name for each in self.session.get_outputs()], self.session.run(None, given)))

backend.TrtRunner = Runner
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_every_stage_is_that_of_the_definitions(built: Path, card: Card, tmp_path: Path) -> None:
    """The candidate runs on the card, the reference in ONNX Runtime; and the script that repeats it runs."""
    script, log = tmp_path / "again.py", tmp_path / "calls"
    cases = [word for case in ("batch-2", "multi-turn") for word in ("--case", case)]
    finished = card.deepstitch(
        "compare", built, "--engine", "tensorrt", "--json", "--quiet", *cases, "--polygraphy-script", script
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert (found["engine"], found["against"], found["passed"]) == ("tensorrt", "definitions", True)
    stages = {(each["case"], each["stage"]) for each in found["results"]}
    assert {("batch-2", "vision"), ("batch-2", "deepstack.2"), ("multi-turn", "decode")} <= stages
    assert set(found["polygraphy"]) == {case for case, _ in stages} and all(found["polygraphy"].values())
    assert len(found["polygraphy"]) == 2 and found["skipped"] == {}
    repeated = card.run(["-c", RUN_SCRIPT, script, built], FAKE_TENSORRT_LOG=str(log))
    assert repeated.returncode == 0, repeated.stdout + repeated.stderr
    lines = repeated.stdout.splitlines()
    assert lines.pop() == "case batch-2 is left out: the engines are too small for it"
    assert len(lines) == 7 and all(line.endswith(" of case multi-turn: passed") for line in lines)
    names = [json.loads(line)[0] for line in log.read_text().splitlines()]
    assert names.index("IPluginRegistry.load_library") < names.index("Runtime.deserialize_cuda_engine")
    without = Card(None, card.version).run([script])
    assert without.returncode == 1 and "there is no NVIDIA driver that works here" in without.stderr
    assert "Traceback" not in without.stderr


def test_a_polygraphy_loader_loads_the_plugins_first(built: Path, card: Card, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    finished = card.run(["-c", LOAD, built], FAKE_TENSORRT_LOG=str(log))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["8", "6"]
    names = [json.loads(line)[0] for line in log.read_text().splitlines()]
    assert names.count("IPluginRegistry.load_library") == 1
    assert names.index("IPluginRegistry.load_library") < names.index("Runtime.deserialize_cuda_engine")


def test_without_a_card(built: Path, card: Card) -> None:
    """The reference is not computed for nothing."""
    finished = Card(None, card.version).deepstitch("compare", built, "--engine", "tensorrt", "--quiet")
    assert finished.returncode == 2 and finished.stdout == ""
    assert "libcuda" in finished.stderr and finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_what_does_not_fit_is_left_out(endless: Endless, driver: Path, plugin_library: Path, tmp_path: Path) -> None:
    """Of a TensorRT 10 whose engines take one row."""
    card, bundle = Card(driver, "10.13.3.9"), Path(shutil.copytree(endless("trt10"), tmp_path / "bundle"))
    variables = {"FAKE_CUDA_SM": "75", "FAKE_TENSORRT_SM": "75"}
    limits = ("--max-context", "256", "--prefill-chunk", "64", "--image-patches", "64")
    order = ("build", bundle, "--target", "trt10", "--plugins", plugin_library, "--quiet", "--no-compare", *limits)
    assert card.deepstitch(*order, **variables).returncode == 0
    words = ("compare", bundle, "--engine", "tensorrt", "--case", "text", "--case", "batch-2", "--json", "--quiet")
    finished = card.deepstitch(*words, **variables)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["passed"] and {each["case"] for each in found["results"]} == {"text"}
    assert found["skipped"]["batch-2"].startswith("does not fit the engine: ")


@pytest.mark.slow
def test_a_build_is_compared(endless: Endless, card: Card, plugin_library: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "trt8"
    shutil.copytree(endless("trt8"), bundle, ignore=shutil.ignore_patterns("engines"))
    words = ["build", bundle, "--target", "trt8", "--plugins", plugin_library, "--quiet", "--json", *LIMITS]
    finished = card.deepstitch(*words)
    assert finished.returncode == 0, finished.stderr
    comparison = json.loads(finished.stdout)["comparison"]
    assert comparison["passed"] and comparison["against"] == "definitions" and comparison["engine"] == "tensorrt"
    assert {each["stage"] for each in comparison["results"]} >= {"vision", "logits"}
