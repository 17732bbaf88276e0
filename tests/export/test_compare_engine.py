"""``deepstitch compare --engine``: what an engine computes, and Polygraphy's loaders and runners for bundles."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.cli import main
from deepstitch.engine_manifest import EngineGraph, EngineManifest, EngineProfile, Limits, PluginRecord
from deepstitch.errors import InputError
from deepstitch.export.compare import comparison
from deepstitch.export.compare.cases import select_cases
from deepstitch.export.compare.comparison import compare_bundle, default_reference
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import EngineLimits, open_engine
from deepstitch.runtime.engine.ort import OrtEngine

from .graphs import vision_feeds
from .trt8_models import fitting

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]

GRIDS = [(1, 4, 6), (2, 2, 4)]


@pytest.fixture
def bundle(checkpoints: Checkpoints, export: Export) -> Path:
    return Path(export(checkpoints(), target="ort-cpu").bundle)


@pytest.fixture
def plugins(checkpoints: Checkpoints, export: Export) -> Path:
    """A bundle for TensorRT."""
    return Path(export(fitting(checkpoints, "qwen3_vl_moe"), target="trt8").bundle)


def test_the_engine_that_is_asked_for(bundle: Path, plugins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(bundle), "--engine", "ort", "--case", "text", "--json", "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["engine"], said["against"], said["polygraphy"]) == ("ort", "pytorch", {})
    assert main(["compare", str(bundle), "--engine", "ort", "--case", "text", "--quiet"]) == 0
    assert "run by the engine ort" in capsys.readouterr().out
    assert default_reference(Bundle.open(plugins), "tensorrt") == "definitions"
    assert default_reference(Bundle.open(plugins), None) == "pytorch"


class Short(OrtEngine):
    """An engine that gives the logits of one token per row and call, takes short chunks, and has room for one row."""

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(logits=1, chunk=4)

    @property
    def decoder(self) -> Any:
        whole = super().decoder

        class Counted:
            def run(self, inputs: Any) -> Any:
                raise NotImplementedError

            def bind(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
                rows, tokens = inputs["inputs_embeds"].shape[:2]
                assert inputs["logit_index"].shape == (rows, 1) and tokens <= 4
                if rows > 1:
                    raise InputError(f"{rows} rows in one call; the engine was built with --batch 1")
                return whole.bind(inputs, outputs)

        return Counted()


def test_an_engine_with_limits(
    checkpoints: Checkpoints, export: Export, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for no more than it gives at a time; what does not fit it is left out, and said."""
    portable = export(checkpoints(), target="portable").bundle
    monkeypatch.setattr(comparison, "open_engine", lambda name, bundle: Short(bundle, threads=1))
    found = compare_bundle(Bundle.open(portable), engine="short", progress=False)
    assert found.passed and found.engine == "short"
    whole = compare_bundle(Bundle.open(portable), progress=False)
    assert list(found.skipped) == ["batch-2"] and "--batch 1" in found.skipped["batch-2"]
    rows, every = ({(each.case, each.stage): each.rows for each in one.results} for one in (found, whole))
    assert rows == {place: count for place, count in every.items() if place[0] != "batch-2"}


def test_no_case_fits(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any) -> Any:
        raise InputError("12 tokens; the engine was built with --max-context 8")

    monkeypatch.setattr(comparison.Candidate, "run", refusing)
    with pytest.raises(InputError, match=r"no case fits the engine; does not fit the engine: .*--max-context 8"):
        compare_bundle(Bundle.open(bundle), engine="ort", cases=select_cases(["text"]), progress=False)


def test_refusals(bundle: Path, plugins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusals = {
        "--against definitions: ": [str(bundle), "--against", "definitions"],
        "there are no engines yet; make some with 'deepstitch build": [
            *(str(plugins), "--polygraphy-script", str(plugins / "script.py"))
        ],
        "engine 'tensorr' does not exist (did you mean 'tensorrt'?)": [str(plugins), "--engine", "tensorr"],
    }
    for text, words in refusals.items():
        assert main(["compare", *words, "--quiet"]) == 2, text
        captured = capsys.readouterr()
        assert text in captured.err and captured.err.count("\n") == 1 and captured.out == "", captured.err


def with_engines(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle with engines for one row, chunks of 8 and 32 tokens, as its files say; the plans are none."""
    shutil.copytree(bundle, folder)
    axes = {"B": 1, "S": 8, "R": 9, "L": 1, "C": 32, "P": 96, "N+1": 25}
    graphs = {}
    for name, graph in Bundle.open(folder).manifest.graphs.items():
        shapes = {
            spec.name: (tuple(axes[axis] if isinstance(axis, str) else axis for axis in spec.shape),) * 3
            for spec in graph.inputs
        }
        profiles = tuple(EngineProfile(name=each, shapes=shapes) for each in ("prefill", "decode"))
        graphs[name] = EngineGraph(file=f"{name}.plan", size=0, sha256="", profiles=profiles)
    built = EngineManifest(
        target="trt8",
        tensorrt="8.6.1",
        sm=61,
        card="Tesla P40",
        created_by="deepstitch build",
        deepstitch="0",
        bundle_sha256="",
        plugins=PluginRecord(file="libplugins.so", version="1", sha256="", targets=("sm_61",)),
        limits=Limits(images=1, image_patches=96, max_context=32, batch=1, prefill_chunk=8),
        graphs=graphs,
    )
    engines = folder / "engines" / built.tag
    engines.mkdir(parents=True)
    built.write(engines / "engine.json")
    return folder


def test_the_script_runs_the_engines(plugins: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Its text; Polygraphy runs TensorRT only where there is a card. Calls are those that the engines take."""
    pytest.importorskip("polygraphy")
    from polygraphy.json import load_json

    checkpoint = fitting(checkpoints, "qwen3_vl_moe").folder
    bundle = with_engines(plugins, tmp_path / "bundle")
    script = tmp_path / "again.py"
    cases = select_cases(["text", "one-image", "batch-2"])
    found = compare_bundle(Bundle.open(bundle), checkpoint=checkpoint, cases=cases, script=script, progress=False)
    assert len(found.cases) == 3, "definitions have no limits"
    text = script.read_text("utf-8")
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert {"TrtRunner", "EngineFromBytes", "load_plugins", "tensorrt"} <= names and "onnxruntime" not in text
    assert "'engines/sm61-tensorrt8.6.1/libplugins.so'" in text
    assert "'decoder': 'engines/sm61-tensorrt8.6.1/decoder.plan'" in text
    assert "LEFT_OUT = ['batch-2']" in text and "deepstitch." not in text
    calls = load_json(str(tmp_path / "again.decoder.inputs.json"))
    assert {call["logit_index"].shape for call in calls} == {(1, 1)}
    assert max(call["inputs_embeds"].shape[1] for call in calls) == 8
    one_row = select_cases(["batch-2"])
    with pytest.raises(InputError, match=r"--polygraphy-script: no case fits .*sm61-tensorrt8.*; build with larger"):
        compare_bundle(Bundle.open(bundle), checkpoint=checkpoint, cases=one_row, script=script, progress=False)
    shutil.copytree(bundle / "engines/sm61-tensorrt8.6.1", bundle / "engines/sm75-tensorrt8.6.1")
    with pytest.raises(InputError, match=r"there are several engines \(sm61-.*, sm75-.*\)"):
        compare_bundle(Bundle.open(bundle), checkpoint=checkpoint, script=script, progress=False)


def test_loaders_and_runners_compose_with_polygraphys(checkpoints: Checkpoints, export: Export, plugins: Path) -> None:
    """One graph three ways: plugins by their definitions, portable by ONNX Runtime, and by an engine of ours."""
    pytest.importorskip("polygraphy")
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    from deepstitch.export.compare.polygraphy_loaders import BundleRunner, SessionFromBundle

    checkpoint = fitting(checkpoints, "qwen3_vl_moe")
    portable = Path(export(checkpoint, target="portable").bundle)
    feeds = vision_feeds(checkpoint.config, GRIDS)
    runners = [
        OnnxrtRunner(SessionFromBundle(plugins, "vision_encoder")),
        OnnxrtRunner(SessionFromBundle(portable, "vision_encoder")),
        BundleRunner(portable, "vision_encoder", "ort"),
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[feeds])
        assert len(results) == 3 and bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(1e-4)))
        with pytest.raises(InputError, match=r"no graph 'vision_encodr' \(did you mean 'vision_encoder'\?\)"):
            SessionFromBundle(portable, "vision_encodr")()
        with BundleRunner(portable, "vision_encoder") as runner:
            metadata = runner.get_input_metadata(use_numpy_dtypes=False)
            assert set(metadata) == set(feeds)
            assert metadata["cu_seqlens"].dtype.numpy() == np.int32
            wrong = {**feeds, "cu_seqlens": feeds["cu_seqlens"].astype(np.float32)}
            with pytest.raises(Exception, match="cu_seqlens"):
                runner.infer(wrong)
        engine = open_engine("ort", Bundle.open(portable))
        expected = engine.graph("vision_encoder").run(feeds)["image_embeds"]
        np.testing.assert_array_equal(results[2][1][0]["image_embeds"], expected)


@pytest.mark.slow
def test_polygraphys_command_line(checkpoints: Checkpoints, bundle: Path, tmp_path: Path) -> None:
    """The lines of the README."""
    pytest.importorskip("polygraphy")
    script = tmp_path / "again.py"
    words = ["--checkpoint", str(checkpoints().folder), "--case", "one-image", "--polygraphy-script", str(script)]
    assert main(["compare", str(bundle), *words, "--quiet"]) == 0
    run = [str(Path(sys.executable).with_name("polygraphy")), "run", str(bundle / "vision_encoder.onnx"), "--onnxrt"]
    run += ["--load-inputs", "again.vision_encoder.inputs.json"]
    for more in (
        ["--load-outputs", "again.vision_encoder.reference.json", "--atol", "1e-3", "--rtol", "0"],
        ["--save-outputs", "mine.json"],
    ):
        finished = subprocess.run([*run, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert finished.returncode == 0 and "PASSED" in finished.stdout, finished.stdout + finished.stderr
    assert (tmp_path / "mine.json").is_file()
