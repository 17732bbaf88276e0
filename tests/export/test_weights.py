"""Streamed weights: the bytes that are written equal the reference arrays, a bounded block at a time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from deepstitch.errors import CheckpointError
from deepstitch.export import weights
from deepstitch.export.weights import PlannedTensor, Relayout, WeightPlan
from deepstitch.export.writer import write_weights
from deepstitch.manifest import file_sha256
from deepstitch.models.checkpoint import Checkpoint, StoredTensor
from deepstitch.tensorfile import TensorFile

Checkpoints = Callable[..., Checkpoint]
GATE_UP = "model.language_model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.language_model.layers.1.mlp.experts.down_proj"
EXPERTS, HIDDEN, WIDTH = 6, 64, 48
INTERLEAVE = Relayout((EXPERTS, HIDDEN, 2, WIDTH), (0, 3, 2, 1), (EXPERTS, 2 * WIDTH, HIDDEN))


def stored(tensor: PlannedTensor) -> np.ndarray:
    return np.concatenate([block.reshape(-1) for block in tensor.blocks()]).reshape(tensor.shape)


def source_of(path: Path, array: np.ndarray) -> StoredTensor:
    save_file({"x": array}, path)
    return StoredTensor(TensorFile.open(path)["x"])


@pytest.fixture(params=[None, 1 << 10, 1], ids=["one block", "1 KiB blocks", "a row at a time"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    if request.param:
        monkeypatch.setattr(weights, "_BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("target", ["F32", "F16"])
@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["F32", "F16", "BF16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix(tmp_path: Path, kind: type, target: str, transposed: bool, block_bytes: int | None) -> None:
    array = np.random.default_rng(0).standard_normal((37, 21)).astype(kind)
    relayout = Relayout.transpose(array.shape) if transposed else None
    tensor = PlannedTensor("x", source_of(tmp_path / "x.safetensors", array), target, relayout)
    expected = array.astype(np.float32).astype({"F32": np.float32, "F16": np.float16}[target])
    expected = expected.T if transposed else expected
    assert tensor.shape == expected.shape and tensor.nbytes == expected.nbytes
    actual = stored(tensor)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("options", [{}, {"dtype": "BF16"}, {"layout": "transformers", "dtype": "F16"}], ids=str)
def test_experts(checkpoints: Checkpoints, options: dict[str, str], block_bytes: int | None) -> None:
    sources = checkpoints("qwen3_vl_moe", **options).sources()
    gate_up, down = sources[GATE_UP].read_float32(), sources[DOWN].read_float32()
    np.testing.assert_array_equal(stored(PlannedTensor(GATE_UP, sources[GATE_UP], "F32")), gate_up)
    transposed = stored(PlannedTensor(DOWN, sources[DOWN], "F32", Relayout.transpose(down.shape)))
    np.testing.assert_array_equal(transposed, down.swapaxes(1, 2))
    interleaved = stored(PlannedTensor(GATE_UP, sources[GATE_UP], "F32", INTERLEAVE))
    gate, up = np.split(gate_up, 2, axis=-1)
    np.testing.assert_array_equal(interleaved[:, 0::2], gate.swapaxes(1, 2))
    np.testing.assert_array_equal(interleaved[:, 1::2], up.swapaxes(1, 2))


def test_separate_experts(checkpoints: Checkpoints, block_bytes: int | None) -> None:
    checkpoint = checkpoints("qwen3_moe")
    files = load_file(checkpoint.files[0])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    actual = stored(PlannedTensor(name, checkpoint.sources()[name], "F32", INTERLEAVE))
    for expert in range(EXPERTS):
        for offset, part in enumerate(("gate", "up")):
            np.testing.assert_array_equal(
                actual[expert, offset::2], files[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"]
            )


def test_relayout_as_nodes_is_the_same_order() -> None:
    """What a bundle by reference computes in the graph is what others have on disk."""
    from .graphs import run

    array = np.random.default_rng(0).standard_normal((EXPERTS, HIDDEN, 2 * WIDTH), dtype=np.float32)
    value = ir.Value(name="w", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    end = ir.node("Identity", [value])
    end.outputs[0].name, end.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([value], end.outputs, nodes=[end], opset_imports={"": 21}, name="g")
    end.replace_input_with(0, INTERLEAVE.emit(value, graph, end))
    result = run(ir.Model(graph, ir_version=10), {"w": array})["y"]
    np.testing.assert_array_equal(result, INTERLEAVE.apply(array))


class TestHalfPrecision:
    def test_overflow_is_refused_by_name(self, tmp_path: Path, block_bytes: int | None) -> None:
        array = np.ones((8, 4), np.float32)
        array[5, 1] = -70000.0
        tensor = PlannedTensor("lm_head.weight", source_of(tmp_path / "x.safetensors", array), "F16")
        with pytest.raises(
            CheckpointError, match=r"'lm_head\.weight' reaches 7e\+04, more than fp16 .* --weights fp32"
        ):
            stored(tensor)

    def test_largest_number_fits(self, tmp_path: Path) -> None:
        array = np.full((2, 2), 65504.0, np.float32)
        tensor = PlannedTensor("x", source_of(tmp_path / "x.safetensors", array), "F16")
        np.testing.assert_array_equal(stored(tensor), array.astype(np.float16))

    def test_infinities_of_the_checkpoint_are_kept(self, tmp_path: Path) -> None:
        array = np.array([[np.inf, 1.0], [np.nan, -np.inf]], np.float32)
        tensor = PlannedTensor("x", source_of(tmp_path / "x.safetensors", array), "F16")
        np.testing.assert_array_equal(stored(tensor), array.astype(np.float16))


def test_memory_is_bounded_by_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 1 << 18
    monkeypatch.setattr(weights, "_BLOCK_BYTES", block)
    array = np.ones((2048, 1024), ml_dtypes.bfloat16)  # 8 MiB as float32
    source = source_of(tmp_path / "x.safetensors", array)
    for relayout in (None, Relayout.transpose(array.shape)):
        sizes = []
        tracemalloc.start()
        for values in PlannedTensor("x", source, "F16", relayout).blocks():
            sizes.append(values.size * 4)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert max(sizes) <= block and sum(sizes) == array.size * 4
        assert peak < 6 * block, "a few copies of one block, not of the tensor"


class TestPlan:
    @pytest.fixture
    def sources(self, checkpoints: Checkpoints) -> dict[str, StoredTensor]:
        return checkpoints("qwen3_vl_moe", dtype="BF16").sources()

    def plan(self, sources: dict[str, StoredTensor], **options: object) -> WeightPlan:
        return WeightPlan(sources, **{"weights": "fp32", "by_reference": False, "tied": None, **options})

    def test_fp16_keeps_vectors_and_routers(self, sources: dict[str, StoredTensor]) -> None:
        plan = self.plan(sources, weights="fp16")
        kept = {name for name in sources if plan.add(name).dtype == "F32"}
        assert kept == {name for name, s in sources.items() if len(s.shape) == 1 or name.endswith(".mlp.gate.weight")}
        assert {tensor.dtype for tensor in plan.tensors.values()} == {"F32", "F16"}

    def test_by_reference_keeps_the_dtype_of_matrices(self, sources: dict[str, StoredTensor]) -> None:
        plan = self.plan(sources, by_reference=True)
        dtypes = {name: plan.add(name).dtype for name in sources}
        assert all((dtype == "BF16") == plan.is_referenced(name) for name, dtype in dtypes.items())
        assert plan.is_referenced(GATE_UP) and not plan.is_referenced("model.language_model.norm.weight")

    def test_a_tied_head_is_the_embedding(self, checkpoints: Checkpoints) -> None:
        embedding = "model.language_model.embed_tokens.weight"
        plan = self.plan(checkpoints("qwen3_vl_moe", tied=True).sources(), tied=embedding)
        assert plan.add("lm_head.weight") is plan.add(embedding)
        assert list(plan.tensors) == [embedding]

    def test_planning_twice_changes_nothing(self, sources: dict[str, StoredTensor]) -> None:
        plan = self.plan(sources)
        first = plan.add(DOWN, Relayout.transpose(sources[DOWN].shape))
        assert plan.add(DOWN) is first and first.relayout is not None


def test_weight_file(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """A valid safetensors file whose identity and offsets are what the writer says."""
    sources = checkpoints("qwen3_vl_moe", dtype="BF16").sources()
    plan = WeightPlan(sources, weights="fp16", by_reference=False, tied=None)
    for name in sources:
        plan.add(name)
    written: list[int] = []
    path = tmp_path / "weights.safetensors"
    entries, record = write_weights(plan.tensors.values(), path, written.append)
    assert (record.size, record.sha256) == (path.stat().st_size, file_sha256(path))
    assert sum(written) == sum(tensor.nbytes for tensor in plan.tensors.values())
    assert dict(TensorFile.open(path)) == entries
    assert min(entry.offset for entry in entries.values()) % 4096 == 0
    assert all(entry.offset % {"F32": 4, "F16": 2}[entry.dtype] == 0 for entry in entries.values())
    loaded = load_file(path)
    assert loaded.keys() == sources.keys()
    for name, tensor in plan.tensors.items():
        np.testing.assert_array_equal(loaded[name], stored(tensor), err_msg=name)
