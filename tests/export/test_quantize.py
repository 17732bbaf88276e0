"""Integer weights: rounding, storage, lowering, the choice of bits, and interruptions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from deepstitch.blockwise import WeightFormat, dequantize, pack, unpack, unpack_zero_points
from deepstitch.cli import main
from deepstitch.errors import BundleError, ConfigError, InputError, UnsupportedError
from deepstitch.export import ExportConfig, QuantizationConfig, export_checkpoint
from deepstitch.export.compare.comparison import compare_bundle
from deepstitch.export.kv_functions import kind_of_graph
from deepstitch.export.passes import moe_to_ort
from deepstitch.export.quantize import stored as stored_module
from deepstitch.export.quantize.gptq import InputStatistics, gptq
from deepstitch.export.quantize.recipe import Recipe, block_for
from deepstitch.export.quantize.rounding import round_to_nearest
from deepstitch.export.quantize.walk import QuantizedStack
from deepstitch.manifest import Graph, TensorSpec
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.embedding import EmbeddingTable

from .. import tiny

FORMATS = [
    WeightFormat(bits=bits, block=block, symmetric=symmetric)
    for bits, block, symmetric in itertools.product((4, 8), (16, 32), (True, False))
]

SLOW_PORTABLE = pytest.param("portable", marks=pytest.mark.slow)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 96, generator=torch.Generator().manual_seed(0))


class TestStorage:
    def test_four_bits_low_half_first(self) -> None:
        assert pack(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
        assert unpack(np.array([0x21], np.uint8), 4).tolist() == [1, 2]

    @pytest.mark.parametrize("stored", FORMATS, ids=str)
    def test_a_value_is_q_minus_zero_times_scale(self, stored: WeightFormat) -> None:
        random = np.random.default_rng(0)
        numbers = random.integers(0, stored.largest + 1, (6, 3, stored.block), np.uint8)
        scales = random.standard_normal((6, 3)).astype(np.float32)
        zeros = random.integers(0, stored.largest + 1, (6, 3), np.uint8)
        points = None if stored.symmetric else zeros
        expected = (numbers - np.float32(stored.middle if stored.symmetric else zeros[..., None])) * scales[..., None]
        values = pack(numbers, stored.bits)
        assert values.shape == stored.values_shape((6, 3 * stored.block))
        np.testing.assert_array_equal(dequantize(values, scales, points, stored), expected.reshape(6, -1))

    @pytest.mark.parametrize("padded_rows", [True, False])
    def test_zero_points_of_odd_rows(self, padded_rows: bool) -> None:
        points = np.arange(15, dtype=np.uint8).reshape(5, 3)
        packed = pack(points, 4) if padded_rows else pack(points.reshape(-1), 4)
        np.testing.assert_array_equal(unpack_zero_points(packed, (5, 3), 4), points)

    @pytest.mark.parametrize("stored", FORMATS, ids=str)
    def test_formats_as_text(self, stored: WeightFormat) -> None:
        assert WeightFormat.parse(str(stored)) == stored
        with pytest.raises(ValueError, match="int5/32"):
            WeightFormat.parse("int5/32")


class TestRounding:
    @pytest.mark.parametrize("stored", FORMATS, ids=str)
    def test_what_is_representable_stays(self, stored: WeightFormat) -> None:
        steps = torch.arange(stored.block).repeat(4, 2) % (stored.largest + 1)
        steps[:, :: stored.block], steps[:, 1 :: stored.block] = 0, stored.largest  # the whole grid is in use
        weight = 0.25 * (steps - (stored.middle if stored.symmetric else 3)).float()
        for search in (False, True):
            result = round_to_nearest(weight, stored, search=search)
            torch.testing.assert_close(result.dequantized(), weight, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("stored", FORMATS, ids=str)
    def test_errors_are_half_a_step(self, stored: WeightFormat, weight: torch.Tensor) -> None:
        result = round_to_nearest(weight, stored, search=False)
        errors = (result.dequantized() - weight).unflatten(-1, (-1, stored.block)).abs()
        limit = 1.0 if stored.symmetric else 0.51  # symmetric: one end has a step less
        assert (errors <= limit * result.scales.abs()[..., None] + 1e-6).all()

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_a_searched_scale_is_never_worse(self, symmetric: bool, weight: torch.Tensor) -> None:
        stored = WeightFormat(bits=4, block=32, symmetric=symmetric)
        errors = [
            (round_to_nearest(weight, stored, search=search).dequantized() - weight).square().sum()
            for search in (False, True)
        ]
        assert errors[1] < 0.97 * errors[0]

    def test_zeros_and_tiny_values_stay_finite(self) -> None:
        for stored in FORMATS:
            for value in (0.0, 1e-38):
                result = round_to_nearest(torch.full((2, 32), value), stored)
                assert torch.isfinite(result.dequantized()).all() and result.dequantized().abs().max() < 1e-6

    @pytest.mark.parametrize("stored", FORMATS, ids=str)
    def test_gptq_beats_rounding_on_correlated_inputs(self, stored: WeightFormat, weight: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(500, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
        inputs += 0.1 * torch.randn(500, 96, generator=generator)
        statistics = InputStatistics(96)
        statistics.add(inputs)
        errors = [
            (inputs @ (result.dequantized() - weight).T).square().sum()
            for result in (round_to_nearest(weight, stored), gptq(weight, stored, statistics))
        ]
        assert errors[1] < 0.3 * errors[0]

    @pytest.mark.parametrize("stored", FORMATS, ids=str)
    def test_packed_experts_mean_the_same(self, stored: WeightFormat, weight: torch.Tensor) -> None:
        results = [round_to_nearest(expert, stored) for expert in (weight, -2 * weight)]
        stack = QuantizedStack(stored, (2, *weight.shape))
        for expert in (1, 0):
            stack.put(expert, results[expert])
        for expert, result in enumerate(results):
            assert torch.equal(stack[expert], result.dequantized().T)
            assert all(np.array_equal(stack.arrays[suffix][expert], part) for suffix, part in result.arrays().items())

    def test_an_expert_without_tokens_is_rounded(self, weight: torch.Tensor) -> None:
        stored = FORMATS[1]
        result = gptq(weight, stored, InputStatistics(96))
        torch.testing.assert_close(result.dequantized(), round_to_nearest(weight, stored).dequantized())


def integers(**options: Any) -> dict[str, Any]:
    return {"quantization": QuantizationConfig(**options)}


CASES = [
    ("qwen3_vl_moe", {"weights": "int4"}),
    ("qwen3_vl_moe", {"weights": "int8", **integers(symmetric=False)}),
    ("qwen3_vl_moe", {"weights": "int4", **integers(symmetric=False, method="rtn")}),
    ("qwen3_vl", {"weights": "int4", **integers(block=64)}),
    ("qwen3_moe", {"weights": "int8"}),
    ("qwen3", {"weights": "int4", **integers(symmetric=False)}),
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=[f"{family}-{o['weights']}" for family, o in CASES])
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_bundles_compute_what_their_integers_say(
    family: str, options: dict[str, Any], target: str, export: Callable[..., Any], checkpoints: Callable[..., Any]
) -> None:
    exported = export(checkpoints(family), target=target, vision_weights="fp32", **options)
    found = compare_bundle(Bundle.open(exported.bundle), progress=False)
    assert found.passed, [result for result in found.results if not result.passed]
    if target == "portable":
        assert max(result.max_rel for result in found.results if result.stage != "weights") < 1e-4


def test_experts_that_are_not_renormalised(export: Callable[..., Any], checkpoints: Callable[..., Any]) -> None:
    exported = export(checkpoints("qwen3_moe", norm_topk_prob=False), target="ort-cpu", weights="int8")
    assert compare_bundle(Bundle.open(exported.bundle), progress=False).passed


def test_a_tied_head_shares_the_table(export: Callable[..., Any], checkpoints: Callable[..., Any]) -> None:
    for target in ("portable", "ort-cpu"):
        exported = export(checkpoints("qwen3_vl_moe", tied=True), target=target, weights="int4", vision_weights="fp32")
        bundle = Bundle.open(exported.bundle)
        assert compare_bundle(bundle, progress=False).passed
        names = list(bundle.manifest.quantization.formats) if bundle.manifest.quantization else []
        assert "lm_head.weight" not in names and bundle.manifest.embedding.tensor in names


def test_kernels_of_the_cpu_target(export: Callable[..., Any], checkpoints: Callable[..., Any]) -> None:
    exported = export(checkpoints("qwen3_vl_moe"), target="ort-cpu", weights="int4")
    nodes = onnx.load(exported.bundle / "decoder.onnx", load_external_data=False).graph.node
    counts = {kind: sum(node.op_type == kind for node in nodes) for kind in ("MatMulNBits", "QMoE", "MatMul", "MoE")}
    assert counts["QMoE"] == 4 and counts["MoE"] == 0
    assert counts["MatMul"] == 4, "only the routers stay in float"
    levels = [
        attribute.i
        for node in nodes
        if node.op_type in ("MatMulNBits", "QMoE")
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert len(levels) == counts["MatMulNBits"] + counts["QMoE"] and set(levels) == {4}


def test_embedding_rows(export: Callable[..., Any], checkpoints: Callable[..., Any]) -> None:
    from deepstitch.export.quantize.as_stored import stored_parameters

    for symmetric in (True, False):
        exported = export(checkpoints("qwen3_vl_moe"), weights="int4", **integers(symmetric=symmetric))
        bundle = Bundle.open(exported.bundle)
        expected = dict(stored_parameters(bundle))[bundle.manifest.embedding.tensor]
        ids = np.array([3, 0, 899, 3])
        np.testing.assert_array_equal(EmbeddingTable.open(bundle)(ids), expected[ids])


class TestFaults:
    """Mistakes of the lowering, made on purpose, turn the comparison red."""

    def failed(self, checkpoint: Checkpoint, output: Path) -> set[str]:
        asked = integers(symmetric=False)
        config = ExportConfig(checkpoint=checkpoint.folder, output=output, weights="int8", progress=False, **asked)
        export_checkpoint(config)
        found = compare_bundle(Bundle.open(output), progress=False)
        return {result.stage for result in found.results if not result.passed}

    def test_rows_that_do_not_alternate(
        self, checkpoints: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stored_module.QuantizedTensor, "_arranged", lambda self, part: part)
        assert "weights" in self.failed(checkpoints("qwen3_vl_moe"), tmp_path / "bundle")

    def test_zero_points_of_the_next_row(
        self, checkpoints: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arranged = stored_module.QuantizedTensor._arranged

        def shifted(self: Any, part: Any) -> Any:
            part = arranged(self, part)
            return np.roll(part, 1, axis=0) if self.name.endswith("o_proj.weight.zero_points") else part

        monkeypatch.setattr(stored_module.QuantizedTensor, "_arranged", shifted)
        assert "weights" in self.failed(checkpoints("qwen3_vl_moe"), tmp_path / "bundle")

    def test_a_kernel_told_another_activation(
        self, checkpoints: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = moe_to_ort.ir.node

        def silu(op: str, inputs: Any, attributes: Any = None, **rest: Any) -> Any:
            return node(op, inputs, {**attributes, "activation_alpha": 1.702} if op == "QMoE" else attributes, **rest)

        monkeypatch.setattr(moe_to_ort.ir, "node", silu)
        failed = self.failed(checkpoints("qwen3_vl_moe"), tmp_path / "bundle")
        assert failed & {"logits", "decode"} and "weights" not in failed


BAD = [
    ({"weights": "int3"}, "int4"),
    ({"weights": "int4", "quantization": {"block": 48}}, "32, 64, 128"),
    ({"weights": "int4", "quantization": {"method": "gtpq"}}, "did you mean 'gptq'"),
    ({"weights": "int4", "quantization": {"method": "gptq"}}, "--calibration FILE"),
    ({"weights": "fp16", "quantization": {"block": 64}}, "--weights fp16"),
    ({"weights": "mixed"}, "--budget"),
    ({"weights": "int4", "quantization": {"budget": "9GB"}}, "--weights mixed"),
    ({"weights": "int4", "vision_weights": "mixed"}, "--vision-weights mixed"),
    ({"weights": "int4", "by_reference": True}, "--by-reference"),
    ({"vision_weights": "int4", "quantization": {"calibration": Path("a")}}, "--weights fp32 leaves nothing to calibr"),
    (
        {"weights": "fp16", "vision_weights": "int8", "quantization": {"calibration": Path("a"), "method": "gptq"}},
        "--weights fp16 leaves nothing to calibr",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_refused_flags(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = dict(options)
    with pytest.raises((ConfigError, InputError, UnsupportedError), match=message):
        options |= {"quantization": QuantizationConfig(**options.get("quantization", {}))}
        ExportConfig(checkpoint=tmp_path, output=tmp_path / "bundle", **options)


def test_widths_that_no_block_divides(
    checkpoints: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoints("qwen3_vl_moe").folder)
    flags = ["--weights", "int4", "--vision-weights", "int8", "-o", str(tmp_path / "b"), "--quiet"]
    assert main(["export", folder, *flags]) == 2
    message = capsys.readouterr().err
    assert "linear_fc2.weight' has 56 inputs" in message and "export this model with --vision-weights fp16" in message
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        UnsupportedError, match=r"down_proj.weight' has 88 inputs, .* export this model with --weights fp16"
    ):
        block_for("model.layers.0.mlp.down_proj.weight", (64, 88), 32)


METHODS = [
    ("int4", {}, (4,), "search"),
    ("int8", {}, (8,), "rtn"),  # eight bits are not searched
    ("int8", {"method": "search"}, (8,), "rtn"),
    ("int8", {"method": "search"}, (8, 4), "search"),
    ("int4", {"method": "rtn"}, (4,), "rtn"),
    ("int8", {"calibration": Path("a")}, (8,), "gptq"),
    ("mixed", {"calibration": Path("a"), "budget": "6bits"}, (8, 4), "gptq"),
    ("mixed", {"calibration": Path("a"), "budget": "6bits", "method": "search"}, (8, 4), "search"),
    ("fp32", {"calibration": Path("a")}, (4,), "search"),  # the calibration set is for the KV cache
    ("fp32", {"calibration": Path("a")}, (8,), "rtn"),
]


@pytest.mark.parametrize(("weights", "asked", "bits", "done"), METHODS)
def test_the_method_on_record_is_what_was_done(
    weights: str, asked: dict[str, Any], bits: tuple[int, ...], done: str
) -> None:
    recipe = Recipe({str(width): WeightFormat(bits=width, block=32) for width in bits})
    assert QuantizationConfig(**asked).method_for(weights, recipe) == done


@pytest.fixture(scope="module")
def even_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The usual one, with a vision encoder whose widths a block divides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.VISION, "intermediate_size", 64)
        return Checkpoint.open(tiny.write_tiny_checkpoint(tmp_path_factory.mktemp("even")))


class TestVisionEncoder:
    @pytest.mark.parametrize(("bits", "method"), [("int8", "rtn"), ("int4", "search")])
    @pytest.mark.parametrize("target", [SLOW_PORTABLE, "ort-cpu"])
    def test_alone(
        self, bits: str, method: str, target: str, even_checkpoint: Checkpoint, export: Callable[..., Any]
    ) -> None:
        bundle = Bundle.open(export(even_checkpoint, target=target, vision_weights=bits).bundle)
        found = compare_bundle(bundle, progress=False)
        assert found.passed, [result for result in found.results if not result.passed]
        if target == "portable":
            assert max(result.max_rel for result in found.results if result.stage != "weights") < 1e-4
        quantization = bundle.manifest.quantization
        assert quantization is not None and quantization.method == method and quantization.calibration_tokens == 0
        assert all(name.startswith("model.visual.") for name in quantization.formats)
        assert {text.split("/")[0] for text in quantization.formats.values()} == {bits}
        assert f"--method {method}" in bundle.manifest.command
        graph = onnx.load(bundle.folder / "vision_encoder.onnx", load_external_data=False).graph
        kernels = sum(node.op_type in ("MatMulNBits", "DequantizeLinear") for node in graph.node)
        assert kernels == len(quantization.formats) == 4 * 4 + 2 + 3 * 2


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("target", [SLOW_PORTABLE, "ort-cpu"])
def test_large_blocks(block: int, target: str, export: Callable[..., Any], checkpoints: Callable[..., Any]) -> None:
    widths = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2}
    exported = export(
        checkpoints("qwen3_moe", **widths), target=target, weights="int4", **integers(block=block, symmetric=False)
    )
    bundle = Bundle.open(exported.bundle)
    assert bundle.manifest.quantization is not None
    assert set(bundle.manifest.quantization.formats.values()) == {f"int4/{block}+zp"}
    found = compare_bundle(bundle, progress=False)
    assert found.passed, [result for result in found.results if not result.passed]
    if target == "portable":
        assert max(result.max_rel for result in found.results if result.stage != "weights") < 1e-4


def decoder_with_cache(*dtypes: str) -> Graph:
    inputs = tuple(TensorSpec(name=f"past_key_values.{i}.key", dtype=dtype, shape=()) for i, dtype in enumerate(dtypes))
    return Graph(file="decoder.onnx", opset=23, nodes=1, inputs=inputs, outputs=())


def test_kinds_of_cache_that_are_none() -> None:
    assert kind_of_graph(decoder_with_cache("uint8", "uint8")).name == "int4"
    for dtypes, words in ((("int16",), "int16"), (("int8", "uint8"), "int8 and uint8"), ((), "missing")):
        with pytest.raises(
            BundleError, match=rf"decoder.onnx: dtype {words}, must be one of float32, .* export the che"
        ):
            kind_of_graph(decoder_with_cache(*dtypes))


def test_disk_space_is_not_taken_twice_for_long(export: Callable[..., Any], checkpoints: Callable[..., Any]) -> None:
    exported = export(checkpoints("qwen3_vl_moe"), target="ort-cpu", weights="int4")
    assert not [path for path in exported.bundle.parent.iterdir() if "quantize" in path.name]
