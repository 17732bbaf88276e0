"""The passes that make ``ort-cpu`` fast: each computes what the graph computed before it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from deepstitch.export.functions import DOMAIN, parse_functions
from deepstitch.export.lower import ort_cpu, target
from deepstitch.export.passes.cached_attention_to_ort import CachedAttentionToOrt
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.scatter_deepstack import ScatterDeepStack
from deepstitch.export.passes.split_sequences import SplitSequences
from deepstitch.models import ModelConfig
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.engine.ort import ORT_TARGETS

from .graphs import (
    CALLS,
    Arrays,
    Call,
    assert_close,
    decoder_feeds,
    op_counts,
    run,
    session,
    vision_feeds,
    weight_plan,
    with_weights,
)

Trace = Callable[[ModelConfig], ir.Model]
Checkpoints = Callable[..., Checkpoint]
LAYERS = 4
LONG = {
    "decode": Call(past=(299,), new=(1,)),
    "as short as it gets": Call(past=(255,), new=(1,)),
    "too short": Call(past=(254,), new=(1,)),
    "chunk": Call(past=(290,), new=(3,)),
    "rows": Call(past=(300, 280), new=(1, 1)),
}


class Runnable:
    """A decoder or vision encoder before and after some passes, with its weights."""

    def __init__(self, checkpoint: Checkpoint, trace: Trace, *passes: ir.passes.InPlacePass) -> None:
        self.config = checkpoint.config
        before, after = trace(checkpoint.config), trace(checkpoint.config)
        self.modified = [each(after).modified for each in passes]
        plan = weight_plan(checkpoint)
        self.before, self.after = with_weights(before, plan), with_weights(after, plan)

    def assert_same(self, feeds: Arrays, tolerance: float = 1e-5) -> None:
        assert_close(run(self.after, feeds), run(self.before, feeds), feeds, tolerance)


@pytest.fixture
def moe(checkpoints: Checkpoints) -> Checkpoint:
    return checkpoints("qwen3_vl_moe")


@pytest.fixture
def sharing(checkpoints: Checkpoints) -> Checkpoint:
    """Four query heads per key/value head."""
    return checkpoints("qwen3", num_attention_heads=8)


def subgraph_nodes(model: ir.Model, branch: str) -> list[ir.Node]:
    """Nodes of one branch of every If."""
    return [node for each in model.graph if each.op_type == "If" for node in each.attributes.get_graph(branch)]


class TestCachedAttentionToOrt:
    @pytest.mark.parametrize("call", CALLS)
    def test_few_heads_share(self, moe: Checkpoint, traced_decoder: Trace, call: str) -> None:
        if CALLS[call].needs_batched_continuation:
            pytest.skip("the kernel refuses it")
        rewritten = Runnable(moe, traced_decoder, CachedAttentionToOrt(), InlineFunctions())
        counts = op_counts(rewritten.after)
        assert rewritten.modified[0] and counts["com.microsoft.GroupQueryAttention"] == LAYERS
        assert "If" not in counts and "TensorScatter" not in counts
        assert counts["ReduceMax"] == 1, "lengths are computed once"
        rewritten.assert_same(decoder_feeds(moe.config, CALLS[call]))

    @pytest.mark.parametrize("call", LONG)
    def test_many_heads_share(self, sharing: Checkpoint, traced_decoder: Trace, call: str) -> None:
        rewritten = Runnable(sharing, traced_decoder, CachedAttentionToOrt(), InlineFunctions())
        counts = op_counts(rewritten.after)
        assert counts["If"] == LAYERS and counts["com.microsoft.GroupQueryAttention"] == 2 * LAYERS
        assert counts["ReduceProd"] == counts["ReduceMax"] == 1, "what layers share is computed once"
        rewritten.assert_same(decoder_feeds(sharing.config, LONG[call]))

    @pytest.mark.parametrize("call", LONG)
    def test_which_form_is_taken(self, sharing: Checkpoint, traced_decoder: Trace, call: str) -> None:
        """Only calls that take the kernel as it is notice that its scale was changed."""
        rewritten = Runnable(sharing, traced_decoder, CachedAttentionToOrt(), InlineFunctions())
        for node in subgraph_nodes(rewritten.after, "else_branch"):
            node.attributes["scale"] = ir.AttrFloat32("scale", 3.0)
        feeds = decoder_feeds(sharing.config, LONG[call])
        if call in ("decode", "as short as it gets"):
            rewritten.assert_same(feeds)
        else:
            with pytest.raises(AssertionError):
                rewritten.assert_same(feeds)

    @pytest.mark.parametrize("call", ["decode", "chunk"])
    def test_cache_in_place(self, sharing: Checkpoint, traced_decoder: Trace, call: str) -> None:
        """Past and present bound to the same memory: the new tokens are written there and nothing else."""
        rewritten = Runnable(sharing, traced_decoder, CachedAttentionToOrt(), InlineFunctions())
        feeds = decoder_feeds(sharing.config, LONG[call])
        expected = run(rewritten.before, feeds)
        bound = {name: array.copy() for name, array in feeds.items()}
        logits = np.empty_like(expected["logits"])
        loaded = session(ir.serde.serialize_model(rewritten.after).SerializeToString())
        binding = loaded.io_binding()
        for name, array in bound.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name in expected:
            array = logits if name == "logits" else bound[name.replace("present", "past_key_values")]
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        loaded.run_with_iobinding(binding)
        actual = {n: logits if n == "logits" else bound[n.replace("present", "past_key_values")] for n in expected}
        assert_close(actual, expected, feeds)
        first, last = feeds["past_lengths"][0], feeds["past_lengths"][0] + feeds["query_lengths"][0]
        for name, array in bound.items():
            if name.startswith("past_key_values"):
                untouched = np.delete(array, np.s_[first:last], axis=2)
                np.testing.assert_array_equal(untouched, np.delete(feeds[name], np.s_[first:last], axis=2))

    def test_the_vision_encoder_is_left_alone(self, moe: Checkpoint, traced_vision_encoder: Trace) -> None:
        assert not CachedAttentionToOrt()(traced_vision_encoder(moe.config)).modified


class TestScatterDeepStack:
    @pytest.mark.parametrize("call", ["ragged prefill", "chunk", "decode"])
    def test_decoder(self, moe: Checkpoint, traced_decoder: Trace, call: str) -> None:
        rewritten = Runnable(moe, traced_decoder, ScatterDeepStack())
        counts = op_counts(rewritten.after)
        assert rewritten.modified == [True] and f"{DOMAIN}.DeepStackAdd" not in counts
        assert counts["ScatterND"] == 3 and counts["NonZero"] == 1
        feeds = decoder_feeds(moe.config, CALLS[call])
        assert feeds["deepstack_index"].any()
        rewritten.assert_same(feeds, tolerance=0)

    @pytest.mark.parametrize("call", ["ragged prefill", "decode"])
    def test_text_reads_no_rows(self, moe: Checkpoint, traced_decoder: Trace, call: str) -> None:
        rewritten = Runnable(moe, traced_decoder, ScatterDeepStack())
        feeds = decoder_feeds(moe.config, CALLS[call])
        feeds["deepstack_index"][:] = 0
        expected = run(rewritten.before, feeds)
        feeds["deepstack_embeds"][:] = np.nan  # the row that says "nothing" too
        assert_close(run(rewritten.after, feeds), expected, feeds, tolerance=0)

    def test_a_text_model_is_left_alone(self, checkpoints: Checkpoints, traced_decoder: Trace) -> None:
        assert not ScatterDeepStack()(traced_decoder(checkpoints("qwen3").config)).modified


class TestSplitSequences:
    def test_vision_encoder(self, moe: Checkpoint, traced_vision_encoder: Trace) -> None:
        rewritten = Runnable(moe, traced_vision_encoder, SplitSequences())
        counts = op_counts(rewritten.after)
        assert rewritten.modified == [True] and counts["Split"] == LAYERS
        assert not {"SplitToSequence", "SequenceAt"} & set(counts)
        rewritten.assert_same(vision_feeds(moe.config, [(1, 4, 6), (2, 4, 4)]), tolerance=0)

    def test_a_sequence_read_otherwise_is_left_alone(self, moe: Checkpoint, traced_vision_encoder: Trace) -> None:
        model = traced_vision_encoder(moe.config)
        for node in list(model.graph):
            if node.op_type == "SplitToSequence":
                length = ir.node("SequenceLength", [node.outputs[0]])
                model.graph.insert_after(node, length)
        assert not SplitSequences()(model).modified


@pytest.mark.parametrize(
    ("grids", "same"), [([(1, 4, 6)], True), ([(3, 4, 4), (1, 2, 8)], True), ([(1, 4, 6), (2, 4, 4)], False)]
)
def test_equal_segments_are_one_batch(
    grids: list[tuple[int, int, int]], same: bool, moe: Checkpoint, traced_vision_encoder: Trace
) -> None:
    """Only segments of different lengths notice that the scale was changed inside the loop."""
    override = InlineFunctions(parse_functions((ort_cpu._SEGMENT_ATTENTION,), com_microsoft=1))
    rewritten = Runnable(moe, traced_vision_encoder, override)
    feeds = vision_feeds(moe.config, grids)
    rewritten.assert_same(feeds)
    loops = [node for node in subgraph_nodes(rewritten.after, "else_branch") if node.op_type == "Loop"]
    kernels = [node for loop in loops for node in loop.attributes.get_graph("body") if "Attention" in node.op_type]
    assert len(kernels) == LAYERS
    for node in kernels:
        node.attributes["scale"] = ir.AttrFloat32("scale", 3.0)
    changed = run(rewritten.after, feeds)["image_embeds"]
    assert np.allclose(changed, run(rewritten.before, feeds)["image_embeds"], atol=1e-4) == same


@pytest.mark.parametrize("name", ORT_TARGETS)
def test_only_wanted_rows_reach_the_head(name: str, moe: Checkpoint, traced_decoder: Trace) -> None:
    """From the choice of rows on, every shape has L where it had S."""
    model = traced_decoder(moe.config)
    plan = weight_plan(moe)
    for each in target(name).passes(plan):
        each(model)
    logits = model.graph.outputs[0]
    assert logits.name == "logits" and logits.shape == ["B", "L", moe.config.text.vocab_size]
    behind, value = [], logits
    while (node := value.producer()) is not None and node.op_type != "GatherND":
        behind.append(node.op_type)
        value = node.inputs[0]
    assert node is not None and node.attributes.get_int("batch_dims") == 1
    norm = ["Mul", "Div"] if name == "ort-cuda" else ["RMSNormalization"]  # written out: x / root * weight
    assert behind == ["MatMul", *norm], "the head, and the final norm"
    assert node.outputs[0].shape == ["B", "L", moe.config.text.hidden_size]


@pytest.mark.parametrize("name", ORT_TARGETS)
def test_logits_of_a_row_do_not_depend_on_the_others(name: str, moe: Checkpoint, traced_decoder: Trace) -> None:
    model = traced_decoder(moe.config)
    plan = weight_plan(moe)
    for each in target(name).passes(plan):
        each(model)
    runnable = with_weights(model, plan)
    feeds = decoder_feeds(moe.config, CALLS["chunk"])
    feeds["logit_index"] = np.array([[0, 1, 2, 3]])
    every = run(runnable, feeds)["logits"]
    feeds["logit_index"] = np.array([[3]])
    np.testing.assert_allclose(run(runnable, feeds)["logits"], every[:, 3:], rtol=0, atol=1e-5)
