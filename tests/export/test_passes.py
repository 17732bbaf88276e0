"""Each pass alone: what it does to the graph, and that the graph computes the same before and after."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from deepstitch.export.functions import DOMAIN, OPSET
from deepstitch.export.lower import target
from deepstitch.export.passes.constant_reshapes import ConstantReshapes
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.moe_to_ort import MoEToOrt
from deepstitch.export.passes.name_nodes import NameNodes
from deepstitch.export.passes.transpose_weights import TransposeWeights
from deepstitch.export.weights import WeightPlan
from deepstitch.models import ModelConfig
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.engine.ort import ORT_TARGETS

from .graphs import (
    CALLS,
    Arrays,
    assert_close,
    decoder_feeds,
    op_counts,
    run,
    vision_feeds,
    weight_plan,
    with_weights,
)

Trace = Callable[[ModelConfig], ir.Model]
Pass = ir.passes.InPlacePass
GRIDS = [(1, 4, 6), (2, 4, 4), (1, 2, 2)]
LAYERS = 4


class Rewritten:
    """A decoder or vision encoder before and after some passes."""

    def __init__(
        self, checkpoint: Checkpoint, trace: Trace, *passes: Callable[[WeightPlan], Pass], **plan: bool
    ) -> None:
        self.checkpoint = checkpoint
        self.before = trace(checkpoint.config)
        self.after = trace(checkpoint.config)
        self.plan = weight_plan(checkpoint, **plan)
        self.modified = [make(self.plan)(self.after).modified for make in passes]

    def assert_same_results(self, feeds: Arrays, tolerance: float = 1e-5) -> None:
        before = with_weights(self.before, weight_plan(self.checkpoint))
        assert_close(run(with_weights(self.after, self.plan), feeds), run(before, feeds), feeds, tolerance)

    def assert_decoder_is_the_same(self, tolerance: float = 1e-5) -> None:
        for call in ("ragged prefill", "chunk", "decode"):
            self.assert_same_results(decoder_feeds(self.checkpoint.config, CALLS[call]), tolerance)


@pytest.fixture
def moe(checkpoints: Callable[..., Checkpoint]) -> Checkpoint:
    return checkpoints("qwen3_vl_moe")


@pytest.fixture
def text_moe(checkpoints: Callable[..., Checkpoint]) -> Checkpoint:
    """Probabilities are not renormalised here."""
    return checkpoints("qwen3_moe", norm_topk_prob=False)


class TestConstantReshapes:
    def test_vision_encoder(self, moe: Checkpoint, traced_vision_encoder: Trace) -> None:
        rewritten = Rewritten(moe, traced_vision_encoder, lambda plan: ConstantReshapes())
        before, after = op_counts(rewritten.before), op_counts(rewritten.after)
        assert rewritten.modified == [True] and sum(after.values()) < sum(before.values())
        assert after["Reshape"] == before["Reshape"]
        for node in rewritten.after.graph:
            if node.op_type == "Reshape":
                assert node.inputs[1].is_initializer()
        rewritten.assert_same_results(vision_feeds(moe.config, GRIDS), tolerance=0)
        rewritten.assert_same_results(vision_feeds(moe.config, GRIDS[2:]), tolerance=0)

    @staticmethod
    def reshape(before: list[int | str], after: list[int | str]) -> ir.Node:
        data = ir.Value(name="x", shape=ir.Shape(before), type=ir.TensorType(ir.DataType.FLOAT))
        shape = ir.Value(name="to", shape=ir.Shape([len(after)]), type=ir.TensorType(ir.DataType.INT64))
        node = ir.node("Reshape", [data, shape], {"allowzero": 1})
        node.outputs[0].shape, node.outputs[0].name = ir.Shape(after), "y"
        graph = ir.Graph([data, shape], node.outputs, nodes=[node], opset_imports={"": OPSET}, name="g")
        ConstantReshapes()(ir.Model(graph, ir_version=11))
        return node

    @pytest.mark.parametrize(
        ("before", "after", "target"),
        [
            (["B", "S", 64], ["B", "S", 4, 16], [0, 0, 4, 16]),
            (["P", 32], ["T", 128], [-1, 128]),
            (["B", "S", 4, 16], ["B", "S", 64], [0, 0, 64]),
            (["S", "B"], ["B", "S"], None),  # two unknown sizes
            (["B", 8], [0, 8], None),  # 0 would mean copy
        ],
    )
    def test_rules(self, before: list[int | str], after: list[int | str], target: list[int] | None) -> None:
        node = self.reshape(before, after)
        value = node.inputs[1].const_value
        assert (None if value is None else value.numpy().tolist()) == target
        assert ("allowzero" in node.attributes) == (target is None)


class TestMoEToOrt:
    @pytest.mark.parametrize("by_reference", [False, True])
    def test_vision_language(self, moe: Checkpoint, traced_decoder: Trace, by_reference: bool) -> None:
        rewritten = Rewritten(moe, traced_decoder, MoEToOrt, by_reference=by_reference)
        counts = op_counts(rewritten.after)
        assert rewritten.modified == [True]
        assert counts["com.microsoft.MoE"] == LAYERS and f"{DOMAIN}.MoEExperts" not in counts
        rewritten.assert_decoder_is_the_same()

    def test_without_renormalisation(self, text_moe: Checkpoint, traced_decoder: Trace) -> None:
        """The kernel's own way of saying it returns garbage inside a graph."""
        rewritten = Rewritten(text_moe, traced_decoder, MoEToOrt)
        kernels = [node for node in rewritten.after.graph if node.op_type == "MoE"]
        assert {node.attributes.get_int("normalize_routing_weights") for node in kernels} == {1}
        rewritten.assert_decoder_is_the_same()

    def test_weights_are_laid_out_for_the_kernel(self, moe: Checkpoint, traced_decoder: Trace) -> None:
        """Row 2j is gate j, row 2j+1 is up j."""
        plan = Rewritten(moe, traced_decoder, MoEToOrt).plan
        name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
        stored = np.concatenate(list(plan.tensors[name].blocks()))
        source = moe.sources()[name].read_float32()  # (E, H, 2I)
        np.testing.assert_array_equal(stored[:, 0::2], source[..., :48].swapaxes(1, 2))
        np.testing.assert_array_equal(stored[:, 1::2], source[..., 48:].swapaxes(1, 2))

    def test_a_dense_model_is_left_alone(self, checkpoints: Callable[..., Checkpoint], traced_decoder: Trace) -> None:
        rewritten = Rewritten(checkpoints("qwen3"), traced_decoder, MoEToOrt)
        assert rewritten.modified == [False] and op_counts(rewritten.before) == op_counts(rewritten.after)


class TestTransposeWeights:
    def test_decoder(self, moe: Checkpoint, traced_decoder: Trace) -> None:
        rewritten = Rewritten(moe, traced_decoder, TransposeWeights)
        before, after = op_counts(rewritten.before), op_counts(rewritten.after)
        assert rewritten.modified == [True]
        assert before["Transpose"] - after.get("Transpose", 0) == 5 * LAYERS + 1  # q k v o, router; and the head
        assert before["MatMul"] == after["MatMul"]
        name = "model.language_model.layers.0.self_attn.q_proj.weight"
        assert rewritten.plan.tensors[name].shape == (64, 128)
        rewritten.assert_decoder_is_the_same()

    def test_a_tied_head_reads_the_embedding_as_it_lies(
        self, checkpoints: Callable[..., Checkpoint], traced_decoder: Trace
    ) -> None:
        tied = checkpoints("qwen3_vl_moe", tied=True)
        rewritten = Rewritten(tied, traced_decoder, TransposeWeights)
        before, after = op_counts(rewritten.before), op_counts(rewritten.after)
        assert before["Transpose"] - after["Transpose"] == 5 * LAYERS
        assert not {"lm_head.weight", "model.language_model.embed_tokens.weight"} & set(rewritten.plan.tensors)
        rewritten.assert_decoder_is_the_same()

    def test_referenced_matrices_stay(self, moe: Checkpoint, traced_decoder: Trace) -> None:
        rewritten = Rewritten(moe, traced_decoder, TransposeWeights, by_reference=True)
        before, after = op_counts(rewritten.before), op_counts(rewritten.after)
        assert before["Transpose"] - after["Transpose"] == LAYERS, "routers are copied, so they may move"
        rewritten.assert_decoder_is_the_same()


class TestNameNodes:
    @pytest.mark.parametrize("graph", ["decoder", "vision_encoder"])
    def test_names_show_the_module(
        self, graph: str, moe: Checkpoint, traced_decoder: Trace, traced_vision_encoder: Trace
    ) -> None:
        trace = traced_decoder if graph == "decoder" else traced_vision_encoder
        rewritten = Rewritten(moe, trace, lambda plan: NameNodes())
        nodes = list(rewritten.after.graph)
        names = [node.name for node in nodes]
        assert len(set(names)) == len(names) and all(names)
        assert all("scope" not in node.metadata_props for node in nodes)
        expected = {
            "decoder": {
                "layers.3.mlp/MoEExperts",
                "layers.1.self_attn.q_norm/RMSNormalization",
                "lm_head/MatMul",
            },
            "vision_encoder": {"blocks.2.attn/SegmentAttention", "deepstack_merger_list.1.linear_fc2/Gemm"},
        }[graph]
        assert expected <= set(names)
        assert not any("source" in name or "model." in name for name in names)


class TestInlineFunctions:
    def test_decoder(self, moe: Checkpoint, traced_decoder: Trace) -> None:
        rewritten = Rewritten(moe, traced_decoder, lambda plan: InlineFunctions())
        counts = op_counts(rewritten.after)
        assert rewritten.modified == [True] and not rewritten.after.functions
        assert not any("." in name for name in counts), "plain ONNX"
        assert counts["Loop"] == counts["TensorScatter"] // 2 == LAYERS
        assert counts["Cos"] == 1, "what layers share is computed once"
        assert "Constant" not in {node.op_type for node in rewritten.after.graph}
        assert rewritten.after.graph.opset_imports == {"": OPSET}
        rewritten.assert_decoder_is_the_same(tolerance=1e-6)

    def test_vision_encoder(self, moe: Checkpoint, traced_vision_encoder: Trace) -> None:
        rewritten = Rewritten(moe, traced_vision_encoder, lambda plan: InlineFunctions())
        rewritten.assert_same_results(vision_feeds(moe.config, GRIDS), tolerance=1e-6)

    def test_what_is_left_is_reported(self, moe: Checkpoint, traced_decoder: Trace) -> None:
        model = traced_decoder(moe.config)
        model.functions.clear()
        with pytest.raises(ir.passes.PostconditionError, match=r"not inlined: \['CachedAttention'"):
            InlineFunctions()(model)


@pytest.mark.parametrize("name", ORT_TARGETS)
@pytest.mark.parametrize("options", [{}, {"by_reference": True}], ids=["written", "by reference"])
def test_whole_pass_lists(
    name: str, options: dict[str, bool], moe: Checkpoint, traced_decoder: Trace, traced_vision_encoder: Trace
) -> None:
    """All passes of a target in order, on both graphs with one plan, as an export runs them."""
    plan = weight_plan(moe, **options)
    for trace, feeds in (
        (traced_decoder, decoder_feeds(moe.config, CALLS["ragged prefill"])),
        (traced_vision_encoder, vision_feeds(moe.config, GRIDS)),
    ):
        model = trace(moe.config)
        for each in target(name).passes(plan):
            each(model)
        assert not any(node.domain == DOMAIN for node in model.graph.all_nodes())
        before = run(with_weights(trace(moe.config), weight_plan(moe)), feeds)
        assert_close(run(with_weights(model, plan), feeds), before, feeds)
