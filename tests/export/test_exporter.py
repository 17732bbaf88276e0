"""Whole exports of tiny checkpoints: what lies in the bundle, and what its graphs compute."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import ExternalDataInfo

from deepstitch.errors import CheckpointError, ConfigError, DeepstitchError, OutputError, UnsupportedError
from deepstitch.export import exporter
from deepstitch.export.contract import decoder_contract, vision_contract
from deepstitch.export.exporter import ExportConfig, export_checkpoint
from deepstitch.manifest import Manifest, file_sha256
from deepstitch.models import load_model
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.bundle import Bundle
from deepstitch.tensorfile import TensorFile

from .conftest import Exported
from .graphs import (
    CALLS,
    assert_close,
    decoder_feeds,
    decoder_reference,
    run,
    session,
    valid_parts,
    vision_feeds,
    vision_reference,
)

Checkpoints = Callable[..., Checkpoint]
GRIDS = [(1, 4, 6), (2, 4, 4), (1, 2, 2)]
FP16 = 5e-3  # half precision keeps 11 bits; four layers add up

# checkpoint and export options of every bundle made here
BUNDLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "portable": ({}, {"target": "portable"}),
    "ort-cpu": ({}, {"target": "ort-cpu"}),
    "tied, fp16, transformers layout": (
        {"layout": "transformers", "dtype": "BF16", "tied": True, "shards": 2},
        {"target": "ort-cpu", "weights": "fp16"},
    ),
    "by reference": ({"dtype": "BF16", "shards": 3}, {"target": "ort-cpu", "by_reference": True}),
    "by reference, tied": ({"tied": True}, {"target": "portable", "by_reference": True}),
    "text": ({"family": "qwen3_moe", "dtype": "F16", "norm_topk_prob": False}, {"target": "ort-cpu"}),
}


@pytest.fixture(params=BUNDLES)
def exported(request: pytest.FixtureRequest, checkpoints: Checkpoints, export: Callable[..., Exported]) -> Exported:
    source, options = BUNDLES[request.param]
    return export(checkpoints(**source), **options)


def named(name: str, checkpoints: Checkpoints, export: Callable[..., Exported]) -> Exported:
    source, options = BUNDLES[name]
    return export(checkpoints(**source), **options)


def external_data(path: Path) -> dict[str, tuple[str, int, int]]:
    """Initializer to (file, offset, length)."""
    model = onnx.load(path, load_external_data=False)
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(tensor)
            found[tensor.name] = (info.location, info.offset, info.length)
    return found


class TestEveryBundle:
    def test_opens(self, exported: Exported) -> None:
        bundle = Bundle.open(exported.bundle, verify="full")
        assert bundle.manifest.target == exported.config.target

    def test_manifest_lists_every_file(self, exported: Exported) -> None:
        manifest = Manifest.read(exported.bundle)
        files = {str(path.relative_to(exported.bundle)) for path in exported.bundle.rglob("*") if path.is_file()}
        assert files == {*manifest.files, "manifest.json"}
        for name, record in manifest.files.items():
            path = exported.bundle / name
            assert (record.size, record.sha256) == (path.stat().st_size, file_sha256(path)), name

    def test_graphs_have_the_contract(self, exported: Exported) -> None:
        manifest, config = Manifest.read(exported.bundle), exported.checkpoint.config
        contracts = {"decoder": decoder_contract(config)}
        contracts |= {"vision_encoder": vision_contract(config.vision)} if config.vision else {}
        assert manifest.graphs.keys() == contracts.keys()
        for name, (inputs, outputs) in contracts.items():
            graph = manifest.graphs[name]
            assert (graph.inputs, graph.outputs) == (inputs, outputs)
            loaded = session(exported.bundle / graph.file)
            for specs, values in ((inputs, loaded.get_inputs()), (outputs, loaded.get_outputs())):
                assert [(s.name, list(s.shape)) for s in specs] == [(v.name, v.shape) for v in values]
                kinds = {"float32": "tensor(float)", "int64": "tensor(int64)", "int32": "tensor(int32)"}
                assert [kinds[spec.dtype] for spec in specs] == [value.type for value in values]

    @pytest.mark.parametrize("call", CALLS)
    def test_decoder_computes_what_the_model_computes(self, exported: Exported, call: str) -> None:
        manifest = Manifest.read(exported.bundle)
        if CALLS[call].needs_batched_continuation and not manifest.model.batched_continuation:
            pytest.skip("the runtime goes row by row here")
        feeds = decoder_feeds(exported.checkpoint.config, CALLS[call])
        expected = decoder_reference(load_model(exported.checkpoint.folder), feeds)
        tolerance = FP16 if exported.config.weights == "fp16" else 1e-5
        assert_close(run(exported.bundle / "decoder.onnx", feeds), expected, feeds, tolerance)

    def test_vision_encoder_computes_what_the_model_computes(self, exported: Exported) -> None:
        if exported.checkpoint.config.vision is None:
            assert not (exported.bundle / "vision_encoder.onnx").exists()
            return
        feeds = vision_feeds(exported.checkpoint.config, GRIDS)
        expected = vision_reference(load_model(exported.checkpoint.folder), feeds)
        tolerance = FP16 if exported.config.weights == "fp16" else 1e-5
        assert_close(run(exported.bundle / "vision_encoder.onnx", feeds), expected, feeds, tolerance)

    def test_weights_are_stored_once(self, exported: Exported) -> None:
        """No two names for the same bytes, no matrix in two places, nothing stored that nobody reads."""
        manifest = Manifest.read(exported.bundle)
        places = {}
        for graph in manifest.graphs.values():
            places |= external_data(exported.bundle / graph.file)
        assert len(set(places.values())) == len(places)
        table = TensorFile.open(exported.bundle / manifest.embedding.file)[manifest.embedding.tensor]
        read = {*places.values(), (manifest.embedding.file, table.offset, table.nbytes)}
        stored = {
            (name, entry.offset, entry.nbytes)
            for name in manifest.files
            if name.endswith(".safetensors")
            for entry in TensorFile.open(exported.bundle / name).values()
        }
        assert read <= stored
        if not exported.config.by_reference:
            assert read == stored
        inside = sum(path.stat().st_size for path in exported.bundle.glob("*.onnx"))
        assert inside < 200_000, "graphs hold no weights"

    def test_embedding_table_is_the_checkpoints(self, exported: Exported) -> None:
        manifest = Manifest.read(exported.bundle)
        model = load_model(exported.checkpoint.folder)
        from deepstitch.tensorfile import to_float32

        entry = TensorFile.open(exported.bundle / manifest.embedding.file)[manifest.embedding.tensor]
        expected = model.embed_tokens.weight.detach().numpy()
        if exported.config.weights == "fp16":
            expected = expected.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(to_float32(entry.read(), entry.dtype), expected)

    def test_nodes_are_named_after_modules(self, exported: Exported) -> None:
        model = onnx.load(exported.bundle / "decoder.onnx", load_external_data=False)
        names = [node.name for node in model.graph.node]
        assert all(names) and len(set(names)) == len(names)
        assert not [name for name in names if name.startswith(("node_", "val_"))]
        assert {"layers.3.self_attn.o_proj/MatMul", "norm/RMSNormalization", "lm_head/MatMul"} <= set(names)
        assert not model.functions and {entry.domain for entry in model.opset_import} <= {"", "com.microsoft"}

    def test_nothing_of_this_machine_is_in_the_bundle(self, exported: Exported) -> None:
        for path in (*exported.bundle.glob("*.onnx"), exported.bundle / "manifest.json"):
            content = path.read_bytes()
            assert str(exported.bundle.parent).encode() not in content
            assert str(exported.checkpoint.folder.parent).encode() not in content


def test_a_tied_head_reads_the_embedding(checkpoints: Checkpoints, export: Callable[..., Exported]) -> None:
    for name in ("tied, fp16, transformers layout", "by reference, tied"):
        exported = named(name, checkpoints, export)
        manifest = Manifest.read(exported.bundle)
        places = external_data(exported.bundle / "decoder.onnx")
        assert "lm_head.weight" not in places
        entry = TensorFile.open(exported.bundle / manifest.embedding.file)[manifest.embedding.tensor]
        place = (manifest.embedding.file, entry.offset, entry.nbytes)
        assert places["model.language_model.embed_tokens.weight"] == place


def test_by_reference_makes_no_second_copy(checkpoints: Checkpoints, export: Callable[..., Exported]) -> None:
    exported = named("by reference", checkpoints, export)
    linked = sorted((exported.bundle / "checkpoint").iterdir())
    assert [path.name for path in linked] == [path.name for path in exported.checkpoint.files]
    assert all(path.samefile(shard) for path, shard in zip(linked, exported.checkpoint.files, strict=True))
    copied = TensorFile.open(exported.bundle / "weights.safetensors")
    assert all(len(entry.shape) == 1 or name.endswith(".mlp.gate.weight") for name, entry in copied.items())
    assert Manifest.read(exported.bundle).weights == "checkpoint"


def test_in_place_cache(checkpoints: Checkpoints, export: Callable[..., Exported]) -> None:
    """The manifest says that present may be bound to the memory of the past: it may."""
    import onnxruntime as ort

    for name in ("portable", "ort-cpu"):
        exported = named(name, checkpoints, export)
        assert Manifest.read(exported.bundle).model.kv_cache_in_place
        feeds = decoder_feeds(exported.checkpoint.config, CALLS["decode"])
        separate = run(exported.bundle / "decoder.onnx", feeds)
        loaded = session(exported.bundle / "decoder.onnx")
        values = {key: ort.OrtValue.ortvalue_from_numpy(array.copy()) for key, array in feeds.items()}
        binding = loaded.io_binding()
        for key, value in values.items():
            binding.bind_ortvalue_input(key, value)
            if key.startswith("past_key_values."):
                binding.bind_ortvalue_output(key.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        loaded.run_with_iobinding(binding)
        shared = {
            key.replace("past_key_values", "present"): value.numpy()
            for key, value in values.items()
            if key.startswith("past_key_values.")
        }
        shared["logits"] = binding.get_outputs()[-1].numpy()
        expected = valid_parts(separate, feeds)
        assert expected.keys() == valid_parts(shared, feeds).keys()
        for key, array in valid_parts(shared, feeds).items():
            np.testing.assert_array_equal(array, expected[key], err_msg=key)


def test_manifest_facts(checkpoints: Checkpoints, export: Callable[..., Exported]) -> None:
    exported = named("ort-cpu", checkpoints, export)
    manifest, model = Manifest.read(exported.bundle), load_model(exported.checkpoint.folder)
    facts = manifest.model
    assert facts.num_parameters == sum(p.numel() for p in model.parameters())
    idle = 4 * (6 - 2) * (3 * 64 * 48)  # layers, experts a token does not visit, their size
    assert facts.num_active_parameters == facts.num_parameters - idle
    assert (facts.num_deepstack, facts.head_dim, facts.mrope_section) == (3, 32, (6, 5, 5))
    assert facts.batched_continuation is False
    assert Manifest.read(named("portable", checkpoints, export).bundle).model.batched_continuation is True
    assert manifest.vision is not None and manifest.vision.num_grid_per_side == 8
    words = shlex.split(manifest.command)
    assert words[:2] == ["deepstitch", "export"] and "ort-cpu" in words
    assert {"torch", "onnx", "onnxruntime"} <= manifest.versions.keys()
    for name, graph in manifest.graphs.items():
        count = _count_nodes(onnx.load(exported.bundle / graph.file, load_external_data=False).graph)
        assert (graph.file, graph.nodes) == (f"{name}.onnx", count)


def _count_nodes(graph: onnx.GraphProto) -> int:
    inner = (a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    return len(graph.node) + sum(map(_count_nodes, inner))


def test_export_is_deterministic(checkpoints: Checkpoints, export: Callable[..., Exported], tmp_path: Path) -> None:
    for name in ("ort-cpu", "tied, fp16, transformers layout"):
        first = named(name, checkpoints, export)
        again = tmp_path / name / first.bundle.name
        export_checkpoint(
            ExportConfig(checkpoint=first.checkpoint.folder, output=again, progress=False, **BUNDLES[name][1])
        )
        manifest = Manifest.read(again)
        assert (again / str(manifest.checkpoint)).samefile(first.checkpoint.folder)
        assert dataclasses.replace(manifest, checkpoint=None) == dataclasses.replace(
            Manifest.read(first.bundle), checkpoint=None
        )


class TestNothingIsLeftBehind:
    def config(self, checkpoints: Checkpoints, tmp_path: Path, **options: Any) -> ExportConfig:
        checkpoint = checkpoints("qwen3_vl_moe")
        return ExportConfig(checkpoint=checkpoint.folder, output=tmp_path / "out", progress=False, **options)

    @pytest.mark.parametrize("step", ["write_weights", "copy_files", "_write_graph", "Manifest"])
    def test_failure_in_the_middle(
        self, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError(step)

        monkeypatch.setattr(exporter, step, fail)
        with pytest.raises(RuntimeError, match=step):
            export_checkpoint(self.config(checkpoints, tmp_path))
        assert list(tmp_path.iterdir()) == []

    def test_disk_full_while_writing_weights(
        self, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half of the file is there when the disk runs out."""
        import errno

        from deepstitch.export.weights import PlannedTensor

        original, blocks = PlannedTensor.blocks, []

        def until_full(tensor: PlannedTensor) -> Any:
            for block in original(tensor):
                blocks.append(block.nbytes)
                if len(blocks) > 20:
                    raise OSError(errno.ENOSPC, "No space left on device")
                yield block

        monkeypatch.setattr(PlannedTensor, "blocks", until_full)
        with pytest.raises(OutputError, match="the disk is full; nothing was written"):
            export_checkpoint(self.config(checkpoints, tmp_path))
        assert len(blocks) == 21 and list(tmp_path.iterdir()) == []

    def test_fp16_overflow(self, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
        from ..damage import edit_tensors

        folder = tiny_checkpoint("qwen3_vl_moe")
        name = "model.language_model.layers.2.self_attn.o_proj.weight"
        edit_tensors(lambda tensors: tensors[name].__setitem__((3, 4), 1e5))(folder)
        config = ExportConfig(checkpoint=folder, output=tmp_path / "out", weights="fp16", progress=False)
        with pytest.raises(CheckpointError, match=rf"'{name}' reaches 1e\+05"):
            export_checkpoint(config)
        assert list(tmp_path.iterdir()) == []

    def test_existing_folder(self, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Refused before any tracing."""
        monkeypatch.setattr(exporter, "canonical_graph", lambda name, config: pytest.fail("traced"))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(OutputError):
                export_checkpoint(self.config(checkpoints, tmp_path, overwrite=overwrite))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int5"}, UnsupportedError, "--weights int5: must be one of fp32, fp16"),
        (
            {"weights": "fp16", "by_reference": True},
            ConfigError,
            "--by-reference keeps the checkpoint's own dtype",
        ),
        (
            {"expert_layout": "sideways"},
            UnsupportedError,
            "--expert-layout sideways: must be one of hub, transformers",
        ),
        (
            {"target": "ort_cpu"},
            UnsupportedError,
            r"--target ort_cpu: not a target \(did you mean 'ort-cpu'\?\)",
        ),
    ],
)
def test_flags(tmp_path: Path, options: dict[str, Any], error: type[DeepstitchError], message: str) -> None:
    with pytest.raises(error, match=message):
        export_checkpoint(ExportConfig(checkpoint=tmp_path, output=tmp_path / "out", progress=False, **options))


def test_progress_goes_nowhere_when_off(
    checkpoints: Checkpoints, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoints("qwen3_vl_moe")
    export_checkpoint(ExportConfig(checkpoint=checkpoint.folder, output=tmp_path / "out", progress=False))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))["format_version"] == 1
