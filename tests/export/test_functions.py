"""Every ``deepstitch`` operator: the ONNX body in ONNX Runtime equals the PyTorch definition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from deepstitch.export.functions import (
    DOMAIN,
    OPSET,
    VERSION,
    function_proto,
    parse_functions,
)
from deepstitch.export.lower import ort_cpu
from deepstitch.export.passes.cached_attention_to_ort import CachedAttentionToOrt
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.models import ops

from .graphs import session

ORT_CPU = parse_functions((ort_cpu._SEGMENT_ATTENTION,), com_microsoft=1)
OPERATORS = ("MRotaryCosSin", "CachedAttention", "SegmentAttention", "MoEExperts", "DeepStackAdd")
TOLERANCE = 1e-5  # of the largest magnitude


def run_operator(
    proto: onnx.FunctionProto,
    feeds: dict[str, np.ndarray],
    outputs: dict[str, int],
    lower: Sequence[ir.passes.InPlacePass] = (),
    **attributes: Any,
) -> list[np.ndarray]:
    """One node of an operator with its body, in ONNX Runtime; ``outputs`` gives their ranks."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [*[None] * (array.ndim - 1), array.shape[-1]]
        )
        for name, array in feeds.items()
    ]
    results = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank) for name, rank in outputs.items()
    ]
    node = helper.make_node(proto.name, list(feeds), list(outputs), domain=DOMAIN, **attributes)
    imports = {(entry.domain, entry.version) for entry in proto.opset_import} | {
        ("", OPSET),
        (DOMAIN, VERSION),
    }
    model = helper.make_model(
        helper.make_graph([node], "one", inputs, results),
        functions=[proto],
        opset_imports=[helper.make_opsetid(*entry) for entry in sorted(imports)],
        ir_version=11,
    )
    if lower:
        lowered = ir.serde.deserialize_model(model)
        for each in lower:
            each(lowered)
        model = ir.serde.serialize_model(lowered)
    return session(model.SerializeToString()).run(list(outputs), feeds)


def assert_close(actual: np.ndarray, expected: torch.Tensor | np.ndarray, tolerance: float = TOLERANCE) -> None:
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=1e-30))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def tensors(feeds: dict[str, np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in feeds.values()]


def test_every_operator_is_tested_here() -> None:
    for name in OPERATORS:
        proto = function_proto(name)
        assert proto.domain == DOMAIN
        bodies_use = {node.domain for node in proto.node}
        assert bodies_use == {""}, "a definition is standard ONNX"
    from deepstitch.export import functions

    assert set(functions._definitions()) == set(OPERATORS)
    with pytest.raises(KeyError):
        function_proto("NoSuchOperator")


@pytest.mark.parametrize("section", [(24, 20, 20), (6, 5, 5), (12, 10, 10), (16, 0, 0), (4, 6, 6)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7)], ids=str)
def test_m_rotary_cos_sin(section: tuple[int, int, int], shape: tuple[int, int]) -> None:
    pairs = sum(section)
    positions = np.random.default_rng(0).integers(0, 20_000, (3, *shape))
    feeds = {"position_ids": positions, "inv_freq": (1e6 ** -np.linspace(0, 1, pairs)).astype(np.float32)}
    outputs = run_operator(function_proto("MRotaryCosSin"), feeds, {"cos": 3, "sin": 3}, mrope_section=section)
    expected = ops.mrope_cos_sin(*tensors(feeds), section)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted)
    if shape == (2, 7) and section[1]:  # the rows differ, so each of them must have been read
        for row in range(3):
            other = positions.copy()
            other[row] += 1
            assert not torch.equal(
                ops.mrope_cos_sin(torch.from_numpy(other), tensors(feeds)[1], section)[0], expected[0]
            )


LENGTHS = {
    "prefill": ((0, 0), (4, 4)),
    "ragged prefill": ((0, 0, 0), (5, 1, 3)),
    "decode": ((7, 0, 3), (1, 1, 1)),
    "one row continues": ((6,), (4,)),
    "one token": ((0,), (1,)),
    "several rows continue": ((7, 2), (3, 3)),
    "ragged rows continue": ((7, 2), (1, 3)),
    "one token after many": ((300,), (1,)),
    "several tokens after many": ((300,), (5,)),
    "one token of several rows after many": ((300, 180), (1, 1)),
}


@pytest.mark.parametrize("body", ["definition", "ort-cpu"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_cached_attention(lengths: str, heads: tuple[int, int], body: str) -> None:
    past, new = LENGTHS[lengths]
    rows, longest, width = len(past), max(new), 8
    exactly_full = lengths in ("one row continues", "one token after many")
    capacity = max(past) + longest + (0 if exactly_full else 3)
    num_heads, kv_heads = heads
    feeds = {
        "query": normal(rows, longest, num_heads * width, seed=1),
        "key": normal(rows, longest, kv_heads * width, seed=2),
        "value": normal(rows, longest, kv_heads * width, seed=3),
        "past_key": normal(rows, kv_heads, capacity, width, seed=4),
        "past_value": normal(rows, kv_heads, capacity, width, seed=5),
        "past_lengths": np.array(past, np.int32),
        "query_lengths": np.array(new, np.int32),
    }
    proto = function_proto("CachedAttention")
    lower = [CachedAttentionToOrt(), InlineFunctions()] if body == "ort-cpu" else []
    attributes = {"num_heads": num_heads, "kv_num_heads": kv_heads, "scale": width**-0.5}
    ranks = {"output": 3, "present_key": 4, "present_value": 4}
    if body == "ort-cpu" and len(past) > 1 and max(new) > 1 and max(past) > 0:
        with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="batch_size must be 1"):
            run_operator(proto, feeds, ranks, lower, **attributes)
        assert not ort_cpu.TARGET.batched_continuation
        return
    outputs = run_operator(proto, feeds, ranks, lower, **attributes)
    expected = [tensor.numpy() for tensor in ops.cached_attention(*tensors(feeds))]
    for row in range(rows):
        assert_close(outputs[0][row, : new[row]], expected[0][row, : new[row]])
        for actual, wanted in zip(outputs[1:], expected[1:], strict=True):
            end = past[row] + new[row]
            np.testing.assert_array_equal(actual[row, :, :end], wanted[row, :, :end])


@pytest.mark.parametrize("body", ["definition", "ort-cpu"])
@pytest.mark.parametrize("bounds", [(0, 8), (0, 4, 8, 12), (0, 4, 5, 16), (0, 4, 12, 16), (0, 1)], ids=str)
def test_segment_attention(bounds: tuple[int, ...], body: str) -> None:
    heads, width = 2, 8
    feeds = {name: normal(bounds[-1], heads * width, seed=i) for i, name in enumerate(("query", "key", "value"))}
    feeds["cu_seqlens"] = np.array(bounds, np.int32)
    proto = function_proto("SegmentAttention") if body == "definition" else ORT_CPU["SegmentAttention"]
    (output,) = run_operator(proto, feeds, {"output": 2}, num_heads=heads, scale=width**-0.5)
    assert_close(output, ops.segment_attention(*tensors(feeds), heads))
    for begin, end in pairwise(bounds):  # row for row what each segment gives alone
        alone = {name: array[begin:end] for name, array in feeds.items() if name != "cu_seqlens"}
        alone["cu_seqlens"] = np.array([0, end - begin], np.int32)
        assert_close(output[begin:end], ops.segment_attention(*tensors(alone), heads))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("routing", ["random", "one token", "two experts get all", "underflow"])
def test_moe_experts(routing: str, top_k: int, norm_topk_prob: bool) -> None:
    experts, hidden, width = 6, 16, 12
    rows, length = (1, 1) if routing == "one token" else (2, 5)
    logits = normal(rows, length, experts, seed=1)
    if routing == "two experts get all":
        logits[..., [1, 4]] += 50.0
    elif routing == "underflow":
        logits[..., 3] += 300.0  # every other probability is exactly zero
    feeds = {
        "x": normal(rows, length, hidden),
        "router_logits": logits,
        "gate_up_proj": normal(experts, hidden, 2 * width) * 0.3,
        "down_proj": normal(experts, width, hidden) * 0.3,
    }
    (output,) = run_operator(
        function_proto("MoEExperts"), feeds, {"output": 3}, top_k=top_k, norm_topk_prob=int(norm_topk_prob)
    )
    assert_close(output, ops.moe_experts(*tensors(feeds), top_k, norm_topk_prob))
    assert_close(output, dense_experts(feeds, top_k, norm_topk_prob))


def dense_experts(feeds: dict[str, np.ndarray], top_k: int, norm_topk_prob: bool) -> np.ndarray:
    """The textbook form: every expert for every token, weighted; a third way to compute it."""
    x, logits = feeds["x"].astype(np.float64), feeds["router_logits"].astype(np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    kept = np.argsort(-probabilities, axis=-1, kind="stable")[..., :top_k]
    weights = np.zeros_like(probabilities)
    np.put_along_axis(weights, kept, np.take_along_axis(probabilities, kept, -1), -1)
    if norm_topk_prob:
        weights /= weights.sum(-1, keepdims=True)
    gate, up = np.split(np.einsum("bsh,ehi->bsei", x, feeds["gate_up_proj"]), 2, axis=-1)
    each = np.einsum("bsei,eih->bseh", gate / (1 + np.exp(-gate)) * up, feeds["down_proj"])
    return np.einsum("bse,bseh->bsh", weights, each).astype(np.float32)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_deep_stack_add(layer: int, rows: int) -> None:
    embeds = normal(rows, 3 * 16)
    embeds[0] = 0
    index = np.random.default_rng(layer).integers(0, rows, (2, 7)).astype(np.int32)
    feeds = {"hidden_states": normal(2, 7, 16, seed=9), "deepstack_embeds": embeds, "deepstack_index": index}
    (output,) = run_operator(function_proto("DeepStackAdd"), feeds, {"output": 3}, layer=layer)
    hidden, rows_tensor, index_tensor = tensors(feeds)
    expected = ops.deepstack_add(hidden, ops.CompactDeepStack(rows_tensor, index_tensor), layer)
    np.testing.assert_array_equal(output, expected.numpy())
    np.testing.assert_array_equal(output[index == 0], feeds["hidden_states"][index == 0])
