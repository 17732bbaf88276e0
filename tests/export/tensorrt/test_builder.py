"""From bundles to engines, with the stand-in for TensorRT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deepstitch.cli import main
from deepstitch.engine_manifest import EngineManifest, built_engines
from deepstitch.errors import DeviceError, InputError
from deepstitch.export.compare import Comparison, Tolerance, comparison
from deepstitch.export.compare.comparison import measure
from deepstitch.export.split import split_bundle
from deepstitch.export.tensorrt import Subject, check_build
from deepstitch.export.tensorrt.build_machine import BuildMachine
from deepstitch.export.tensorrt.builder import BuildOrder, build_engines
from deepstitch.export.tensorrt.profiles import CORNERS, sizes_of
from deepstitch.manifest import MANIFEST_NAME, Manifest, file_sha256
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.plugins.common.schema import DOMAIN
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine.tensorrt.api import TensorRT

from .building import FLAGS, LIMITS, TRT10, Ampere, calls, left_in, order_of

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]


def test_the_command_builds(
    bundle: Path, library: Path, tensorrt: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with tensorrt() as module:
        words = ["build", str(bundle), "--target", "trt8", "--plugins", str(library), *FLAGS, "--json"]
        assert main(words) == 0
        said = json.loads(capsys.readouterr().out)
        folder = bundle / "engines" / "sm61-tensorrt8.6.1"
        assert said["engines"]["folder"] == str(folder) and said["passed"]
        assert [bundle / "engines" / "sm61-tensorrt8.6.1"] == built_engines(bundle)
        manifest = EngineManifest.read(folder / "engine.json")
        assert json.loads(json.dumps(said["engines"]["graphs"])) == json.loads(
            json.dumps(dataclasses.asdict(manifest)["graphs"])
        )
        assert (manifest.target, manifest.tensorrt, manifest.sm, manifest.card) == ("trt8", "8.6.1", 61, "Tesla P40")
        assert manifest.limits == LIMITS and manifest.bundle_sha256 == file_sha256(bundle / MANIFEST_NAME)
        assert manifest.created_by.startswith("deepstitch build bundle --target trt8 --images 2 --image-patches 64")
        files = {"engine.json", "timing.cache", library.name, "decoder.plan", "vision_encoder.plan"}
        assert {path.name for path in folder.iterdir()} == files
        assert manifest.plugins is not None and manifest.plugins.sha256 == file_sha256(library)
        assert manifest.plugins.targets == ("compute_61",) and manifest.plugins.version == "1"
        runtime = module.Runtime(TensorRT.load().logger)
        for name, graph in manifest.graphs.items():
            data = (folder / graph.file).read_bytes()
            assert (graph.size, graph.sha256) == (len(data), file_sha256(folder / graph.file))
            engine = runtime.deserialize_cuda_engine(data)
            for number, profile in enumerate(graph.profiles):
                for tensor, corners in profile.shapes.items():
                    assert engine.get_tensor_profile_shape(tensor, number) == list(corners), (name, tensor)
    assert [each.name for each in manifest.graphs["decoder"].profiles] == ["prefill", "decode"]
    assert Bundle.open(bundle, verify="full").manifest.target == "trt8"


def test_the_profiles_are_those_that_were_checked(
    order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path
) -> None:
    with tensorrt():
        built = build_engines(order, BuildMachine.find("trt8", None))
    for profile in order.check.profiles:
        graph = built.manifest.graphs[profile.graph]
        shapes = next(each.shapes for each in graph.profiles if each.name == profile.name)
        for place, corner in enumerate(CORNERS):
            expected = sizes_of(order.check.subject.contracts[profile.graph][0], profile.corners[corner])
            assert {name: corners[place] for name, corners in shapes.items()} == {
                name: typed.shape for name, typed in expected.items()
            }


def test_what_the_builder_is_told(order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path) -> None:
    with tensorrt() as module:
        built = build_engines(order, BuildMachine.find("trt8", 61))
        workspace = next(item.nbytes for item in order.check.plan.items if item.name == "workspace")
        assert calls(module, "Builder.create_network") == [{"flags": 1}] * 2
        assert [each["model"] for each in calls(module, "OnnxParser.parse_from_file")] == [
            str(bundle / f"{name}.onnx") for name in order.check.subject.graphs
        ]
        assert calls(module, "OnnxParser.parse") == []
        limit = {"pool": "WORKSPACE", "pool_size": workspace}
        assert calls(module, "IBuilderConfig.set_memory_pool_limit") == [limit] * 2
        assert calls(module, "IBuilderConfig.max_aux_streams=") == [{"value": 0}] * 2
        assert calls(module, "IBuilderConfig.clear_flag") == [{"flag": "TF32"}] * 2
        assert calls(module, "IBuilderConfig.set_flag") == [] and calls(module, "ILayer.precision=") == []
        assert len(calls(module, "IPluginRegistry.load_library")) == 1
    for name, line in built.trtexec.items():
        assert line.startswith("trtexec --onnx=") and f"--saveEngine={built.folder / name}.plan" in line
        assert f"--dynamicPlugins={built.folder}/libdeepstitch_plugins.so" in line and "--noTF32" in line
        first = built.manifest.graphs[name].profiles[0]
        for corner in range(3):
            sizes = ",".join(f"{n}:{'x'.join(map(str, shapes[corner]))}" for n, shapes in first.shapes.items())
            assert f"--{CORNERS[corner]}Shapes={sizes}" in line
        assert "--fp16" not in line and "--profile=" not in line


def test_half_precision_is_for_plugins_only(
    exported: Callable[..., Path], library: Path, tensorrt: Callable[..., Any]
) -> None:
    """A cache of fp16 is read by plugins, which are offered it where fp16 is on; all else is held to fp32."""
    half = order_of(exported(kv_cache="fp16"), library)
    with tensorrt() as module:
        built = build_engines(half, BuildMachine.find("trt8", None))
        assert calls(module, "IBuilderConfig.set_flag") == [{"flag": "FP16"}, {"flag": "OBEY_PRECISION_CONSTRAINTS"}]
        nodes = half.check.subject.graphs["decoder"].graph.node
        floats = [node for node in nodes if node.domain == "" and node.op_type in ("Add", "Mul", "MatMul", "Sigmoid")]
        whole = [node for node in nodes if node.op_type in ("Cast", "Shape") or node.domain == DOMAIN]
        pinned = len(calls(module, "ILayer.precision="))
        assert len(floats) <= pinned <= len(nodes) - len(whole)
        assert all(each == {"value": "FLOAT"} for each in calls(module, "ILayer.precision="))
    assert "--fp16" in built.trtexec["decoder"] and "--precisionConstraints=obey" in built.trtexec["decoder"]
    assert "--fp16" not in built.trtexec["vision_encoder"]


@pytest.mark.parametrize("version", ["10.0.1", TRT10, "11.1.0.106"])
def test_later_versions_are_strongly_typed(
    version: str, exported: Callable[..., Path], library: Path, tensorrt: Callable[..., Any]
) -> None:
    with tensorrt(version, Ampere) as module:
        machine = BuildMachine.find("trt10", None)
        built = build_engines(order_of(exported("trt10"), library, sm=86), machine)
        flag = int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert calls(module, "Builder.create_network") == [{"flags": 1 << flag}] * 2
        assert calls(module, "IBuilderConfig.set_flag") == []
        assert calls(module, "IBuilderConfig.clear_flag") == [{"flag": "TF32"}] * 2
        assert len(calls(module, "IBuilderConfig.progress_monitor=")) == 2
    assert built.folder.name == f"sm86-tensorrt{version}"
    line = built.trtexec["decoder"]
    assert "--profile=0 --minShapes=" in line and "--profile=1 --minShapes=" in line
    assert ("--stronglyTyped" in line) is version.startswith("10")


def test_a_rebuild_takes_the_place_of_the_old_one(
    order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tensorrt() as module:
        machine = BuildMachine.find("trt8", None)
        first = build_engines(order, machine)
        (first.folder / "old").touch()
        dead = bundle / "engines" / f".building-x-{2**22 + 1}"  # no such process can be
        dead.mkdir()
        module.calls.clear()
        monkeypatch.setenv("FAKE_TENSORRT_FAIL", "build")
        with pytest.raises(DeviceError, match="cannot build graph"):
            build_engines(order, machine)
        assert (first.folder / "old").is_file(), "the old engines stay until there are new ones"
        assert left_in(bundle) == [first.folder.name]
        monkeypatch.delenv("FAKE_TENSORRT_FAIL")
        assert build_engines(order, machine).folder == first.folder
        assert not (first.folder / "old").exists() and left_in(bundle) == [first.folder.name]


def test_what_was_measured_is_kept(
    order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tensorrt() as module:
        machine = BuildMachine.find("trt8", None)
        cache = build_engines(order, machine).folder / "timing.cache"
        timed = json.loads(cache.read_bytes())["timed"]
        assert len(timed) == 2
        module.calls.clear()
        build_engines(order, machine)
        begun = [each["serialized_timing_cache"] for each in calls(module, "IBuilderConfig.create_timing_cache")]
        assert begun[0] == f"{len(cache.read_bytes())} bytes"
        given = tmp_path / "given.cache"
        for content in (b"no cache", cache.read_bytes().replace(b"8.6.1", b"8.6.0")):
            given.write_bytes(content)
            caplog.clear()
            build_engines(dataclasses.replace(order, timing_cache=given), machine)
            assert "everything is measured again" in caplog.text
            assert json.loads(cache.read_bytes())["timed"] == timed
        given.unlink()
        with pytest.raises(InputError, match="there is no such file; leave the flag out"):
            build_engines(dataclasses.replace(order, timing_cache=given), machine)


def test_more_logits_in_one_call(bundle: Path, library: Path, tensorrt: Callable[..., Any]) -> None:
    limits = dataclasses.replace(LIMITS, logits=5)
    with tensorrt():
        built = build_engines(order_of(bundle, library, limits), BuildMachine.find("trt8", None))
    prefill, decode = built.manifest.graphs["decoder"].profiles
    assert [shape[-1] for shape in prefill.shapes["logit_index"]] == [1, 1, 5]
    assert [shape[-1] for shape in decode.shapes["logit_index"]] == [1, 1, 1]
    with pytest.raises(InputError, match="--logits 20 is more than the tokens of --prefill-chunk 16"):
        dataclasses.replace(LIMITS, logits=20).check(merge_size=2, context=4096)


def test_graphs_are_read_by_their_path(bundle: Path) -> None:
    """Their weights lie beside them: a graph handed over as bytes could not have more than 2 GB."""
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    assert any(each.data_location == onnx.TensorProto.EXTERNAL for each in model.graph.initializer)


@pytest.mark.parametrize(("side", "graph"), [("encode", "vision_encoder"), ("language", "decoder")])
def test_half_a_bundle(
    side: str, graph: str, bundle: Path, library: Path, tensorrt: Callable[..., Any], tmp_path: Path
) -> None:
    """A machine that only encodes, or only answers, needs one engine and its memory."""
    half = split_bundle(Bundle.open(bundle), side, tmp_path / side, progress=False)
    with tensorrt():
        built = build_engines(order_of(half, library), BuildMachine.find("trt8", None))
    assert list(built.manifest.graphs) == [graph]
    whole = check_build(Subject.from_bundle(bundle, "trt8"), LIMITS, 61, (1 << 20, "test")).plan
    check = check_build(Subject.from_bundle(half, "trt8"), LIMITS, 61, (1 << 20, "test"))
    assert check.plan is not None and whole is not None
    items = {item.name for item in check.plan.items}
    assert ("KV cache" in items, "decoder weights" in items) == (side == "language",) * 2
    assert ("vision weights" in items) == (side == "encode")
    assert check.plan.total_bytes < whole.total_bytes and check.plan.advice


def test_all_that_tensorrt_says_can_be_seen(
    bundle: Path, library: Path, tensorrt: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", str(bundle), "--target", "trt8", "--plugins", str(library), *FLAGS, "--quiet"]
    with tensorrt():
        assert main(["--debug", *words]) == 0
        assert capsys.readouterr().err.count("TensorRT: Detected ") == 2
        assert main(words) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("passed", [True, False])
def test_engines_are_compared_when_they_are_built(
    bundle: Path,
    library: Path,
    tensorrt: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    passed: bool,
) -> None:
    """Engines that differ stay, for whoever has to find out why."""
    tolerance = Tolerance.for_bundles(Manifest.read(bundle))
    values = {"logits": np.zeros((2, 5), np.float32)}
    others = values if passed else {"logits": np.ones((2, 5), np.float32)}
    asked: list[dict[str, Any]] = []

    def compare(opened: Bundle, **options: Any) -> Comparison:
        asked.append(options)
        results = tuple(measure("text", others, values, tolerance))
        return Comparison(
            bundle=str(opened.folder),
            target="trt8",
            weights="fp32",
            against="definitions",
            tolerance=tolerance,
            results=results,
            skipped={},
            polygraphy={},
            seconds=0.0,
        )

    monkeypatch.setattr(comparison, "compare_bundle", compare)
    words = ["build", str(bundle), "--target", "trt8", "--plugins", str(library), *FLAGS, "--compare", "--quiet"]
    with tensorrt():
        assert main(words) == (0 if passed else 1)
    captured = capsys.readouterr()
    assert [(each["against"], each["engine"]) for each in asked] == [("definitions", "tensorrt")]
    assert ("they do not compute what their graphs do" in captured.err) is not passed
    assert (bundle / "engines" / "sm61-tensorrt8.6.1" / "decoder.plan").is_file()
