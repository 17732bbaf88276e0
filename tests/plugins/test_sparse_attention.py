"""SparseAttention: against PyTorch and the models' operators, what is never read, and what must not depend on what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from deepstitch.models import ops
from deepstitch.plugins.common.case import Array, nmse
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.sparse_attention.cases import CASES, NMSE, REFUSED, causal_inputs, segment_inputs
from deepstitch.plugins.sparse_attention.reference import kept_blocks, reference
from deepstitch.plugins.sparse_attention.schema import HEAD_DIMS, KV_FORMATS, PATTERNS, SCHEMA

from .single_node import plugin_node, run

BLOCK = 64


def node(heads: int = 4, kv_heads: int = 2, dim: int = 64, **more: Any) -> dict[str, Any]:
    return {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": dim, "scale": float(dim**-0.5), **more}


def three(library: PluginLibrary, attributes: dict[str, Any], inputs: dict[str, Array]) -> list[Array]:
    """The kernel, the reference and the definition."""
    return [
        library.run("SparseAttention", attributes, inputs)["output"],
        reference(SCHEMA.resolve(attributes), inputs)["output"],
        run(plugin_node(SCHEMA, attributes, inputs), inputs)["output"],
    ]


def heads_first(packed: Array, dim: int) -> torch.Tensor:
    """``[S, heads * D]`` to ``[heads, S, D]`` float64."""
    return torch.from_numpy(packed).double().reshape(packed.shape[0], -1, dim).transpose(0, 1)


@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_dense_is_the_attention_of_torch(host_library: PluginLibrary, tokens: int) -> None:
    attributes = node()
    inputs = causal_inputs(np.random.default_rng(1), attributes, tokens=tokens, past=(30, 7))
    for output in three(host_library, attributes, inputs):
        for row, past in enumerate((30, 7)):
            keys, values = (
                torch.from_numpy(inputs[name][row, :, : past + tokens]).double().repeat_interleave(2, dim=0)
                for name in ("key_cache", "value_cache")
            )
            sees = torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
            expected = functional.scaled_dot_product_attention(
                heads_first(inputs["query"][row], 64), keys, values, attn_mask=sees
            )
            assert nmse(output[row], expected.transpose(0, 1).reshape(tokens, -1).numpy()) < NMSE


def test_segments_are_the_operator_of_the_models(host_library: PluginLibrary) -> None:
    attributes = node(2, 2, 72, mode="segment")
    inputs = segment_inputs(np.random.default_rng(2), attributes, bounds=(0, 17, 18, 90))
    tensors = [torch.from_numpy(inputs[name]).double() for name in ("query", "key", "value")]
    expected = ops.segment_attention(*tensors, torch.from_numpy(inputs["cu_seqlens"]), 2).numpy()
    for output in three(host_library, attributes, inputs):
        assert nmse(output, expected) < NMSE


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_stored_formats_are_their_values(host_library: PluginLibrary, kv_format: str) -> None:
    """A cache in a smaller format gives what the numbers it stands for give in float32."""
    attributes = node(kv_format=kv_format)
    inputs = causal_inputs(np.random.default_rng(3), attributes, tokens=3, past=(80,))
    plain = {name: inputs[name] for name in ("query", "past_lengths", "query_lengths")}
    for name in ("key", "value"):
        scales = inputs[f"{name}_scales"][..., None] if kv_format == "int8" else 1
        plain[f"{name}_cache"] = (inputs[f"{name}_cache"].astype(np.float32) * scales).astype(np.float32)
    ordered = {spec.name: plain[spec.name] for spec in SCHEMA.inputs(SCHEMA.resolve(node()))}
    for stored, values in zip(
        three(host_library, attributes, inputs), three(host_library, node(), ordered), strict=True
    ):
        assert nmse(stored, values) < NMSE


def poison(inputs: dict[str, Array], head: int, keys: slice) -> None:
    for name in ("key", "value"):
        if f"{name}_scales" in inputs:
            inputs[f"{name}_scales"][:, head, keys] = np.nan
            inputs[f"{name}_cache"][:, head, keys] = 127
        else:
            inputs[f"{name}_cache"][:, head, keys] = np.nan


def same_when_poisoned(
    library: PluginLibrary, attributes: dict[str, Any], inputs: dict[str, Array], unseen: list[tuple[int, slice]]
) -> None:
    before = three(library, attributes, inputs)
    for head, keys in unseen:
        poison(inputs, head, keys)
    for clean, poisoned in zip(before, three(library, attributes, inputs), strict=True):
        assert np.isfinite(clean).all() and np.abs(clean).max() > 0
        np.testing.assert_array_equal(clean, poisoned)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("tokens", [2, 70])
@pytest.mark.parametrize("chosen_by", ["layout", "gate_scores", "pooled_keys"])
def test_skipped_blocks_are_not_read(host_library: PluginLibrary, kv_format: str, tokens: int, chosen_by: str) -> None:
    """Pattern dynamic without gate and pooled_keys makes means of all keys, read once."""
    attributes = node(kv_format=kv_format, pattern="layout" if chosen_by == "layout" else "dynamic", block_size=BLOCK)
    past, query_blocks = 5 * BLOCK, -(-tokens // BLOCK)
    rng = np.random.default_rng(4)
    inputs = causal_inputs(rng, attributes, tokens=tokens, past=(past,), capacity=past + 2 * BLOCK)
    kept = np.zeros((1, 2, query_blocks, 7), np.int32)
    kept[..., [0, 5, 6]] = 1
    kept[:, 0, :, 2] = kept[:, 1, :, 3] = 1
    if chosen_by == "layout":
        inputs["layout"] = kept
    elif chosen_by == "pooled_keys":
        attributes |= {"top_n": 3, "has_pooled_keys": 1}  # the first block, the diagonal and one more
        means = inputs["query"][0].reshape(tokens, 2, 2, 64).mean(axis=(0, 2))  # of highest score with themselves
        inputs["pooled_keys"] = kept.max(axis=2)[..., None].astype(np.float32) * means[:, None]
    else:
        attributes |= {"top_n": 3, "gate": 1}
        inputs["gate_scores"] = kept.astype(np.float32) + rng.random(kept.shape, dtype=np.float32) / 2
    unseen = [(head, slice(n * BLOCK, (n + 1) * BLOCK)) for head in (0, 1) for n in range(1, 5) if n != (2, 3)[head]]
    same_when_poisoned(host_library, attributes, inputs, unseen)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_keys_outside_the_window_are_not_read(host_library: PluginLibrary, kv_format: str, tokens: int) -> None:
    attributes = node(kv_format=kv_format, pattern="window", window=20, sink=7)
    inputs = causal_inputs(np.random.default_rng(5), attributes, tokens=tokens, past=(300,))
    same_when_poisoned(host_library, attributes, inputs, [(head, slice(7, 281)) for head in (0, 1)])


@pytest.mark.parametrize("pattern", ["dense", "window"])
def test_a_prompt_in_pieces_is_the_prompt(host_library: PluginLibrary, pattern: str) -> None:
    """Prefill at once, in chunks of other sizes, and token by token see the same keys."""
    attributes = node(pattern=pattern, **({"window": 25, "sink": 3} if pattern == "window" else {}))
    inputs = causal_inputs(np.random.default_rng(6), attributes, tokens=70, past=(0,))
    whole = host_library.run("SparseAttention", attributes, inputs)["output"]
    begin = 0
    for size in (33, 1, 30, 2, 4):
        piece = inputs | {
            "query": np.ascontiguousarray(inputs["query"][:, begin : begin + size]),
            "past_lengths": np.array([begin], np.int32),
            "query_lengths": np.array([size], np.int32),
        }
        output = host_library.run("SparseAttention", attributes, piece)["output"]
        assert nmse(output, whole[:, begin : begin + size]) < 1e-12
        begin += size


@pytest.mark.parametrize("pattern", ["dense", "dynamic"])
def test_a_segment_does_not_depend_on_its_neighbours(host_library: PluginLibrary, pattern: str) -> None:
    more = {"pattern": "dynamic", "block_size": BLOCK, "top_n": 2} if pattern == "dynamic" else {}
    attributes = node(2, 1, mode="segment", **more)
    packed = segment_inputs(np.random.default_rng(7), attributes, bounds=(0, 13, 213, 250))
    alone = {name: np.ascontiguousarray(packed[name][13:213]) for name in ("query", "key", "value")}
    alone["cu_seqlens"] = np.array([0, 200], np.int32)
    both = [host_library.run("SparseAttention", attributes, inputs)["output"] for inputs in (packed, alone)]
    np.testing.assert_array_equal(both[0][13:213], both[1])


WILD = [-(2**31), -7, 0, 3, 64, 500, 2**31 - 1]


@pytest.mark.parametrize("pattern", ["dense", "window", "dynamic"])
@pytest.mark.parametrize("tokens", [2, 70])
def test_wild_lengths_stay_inside_the_tensors(host_library: PluginLibrary, pattern: str, tokens: int) -> None:
    """The host cannot see them. The numbers mean nothing then; that nothing else is touched shows under sanitizers."""
    more = {"dynamic": {"block_size": BLOCK, "top_n": 2}, "window": {"window": 9, "sink": 2}}.get(pattern, {})
    attributes = node(pattern=pattern, **more)
    inputs = causal_inputs(np.random.default_rng(10), attributes, tokens=tokens, past=(5,) * len(WILD))
    for past, new in ((WILD, WILD), (WILD, WILD[::-1])):
        lengths = {"past_lengths": np.array(past, np.int32), "query_lengths": np.array(new, np.int32)}
        host_library.run("SparseAttention", attributes, inputs | lengths)


@pytest.mark.parametrize("pattern", ["dense", "dynamic"])
@pytest.mark.parametrize("bounds", [WILD, WILD[::-1], [0, 300] * 20, [300, 0] * 20])
def test_wild_bounds_stay_inside_the_tensors(host_library: PluginLibrary, pattern: str, bounds: list[int]) -> None:
    more = {"pattern": "dynamic", "block_size": BLOCK, "top_n": 2} if pattern == "dynamic" else {}
    attributes = node(1, 1, mode="segment", **more)
    inputs = segment_inputs(np.random.default_rng(11), attributes, bounds=[0, 300])
    host_library.run("SparseAttention", attributes, inputs | {"cu_seqlens": np.array(bounds, np.int32)})


def kept_by(gate: list[float], *, top_n: int, position: int, queries: int = 1) -> list[int]:
    """Key blocks that a query block of a decode keeps."""
    attributes = SCHEMA.resolve(node(1, 1, pattern="dynamic", block_size=BLOCK, top_n=top_n, gate=1))
    inputs = {"gate_scores": np.array(gate, np.float32).reshape(1, 1, 1, -1)}
    key = np.zeros((position + queries, 64))
    return np.flatnonzero(kept_blocks(attributes, inputs, 0, 0, np.zeros((queries, 1, 64)), key, position)[0]).tolist()


def test_what_is_always_kept_counts() -> None:
    last = 5 * BLOCK + 10
    gate = [0, 4, 9, 9, 1, 0, 99]
    assert kept_by(gate, top_n=1, position=last) == [0, 5]
    assert kept_by(gate, top_n=2, position=last) == [0, 5]
    assert kept_by(gate, top_n=3, position=last) == [0, 2, 5]
    assert kept_by(gate, top_n=4, position=last) == [0, 2, 3, 5]
    assert kept_by(gate, top_n=9, position=last) == [0, 1, 2, 3, 4, 5]
    assert kept_by(gate, top_n=3, position=6 * BLOCK - 1, queries=2) == [0, 5, 6]
    assert kept_by([0, np.nan, -1e30, 0], top_n=3, position=3 * BLOCK) == [0, 2, 3]


def test_mean_keys_as_an_input_are_the_mean_keys(host_library: PluginLibrary) -> None:
    attributes = node(pattern="dynamic", block_size=BLOCK, top_n=3)
    inputs = causal_inputs(np.random.default_rng(9), attributes, tokens=2, past=(7 * BLOCK,))
    blocks = inputs["key_cache"].reshape(1, 2, 8, BLOCK, 64)
    given = {**inputs, "pooled_keys": blocks.mean(axis=3)}  # not a number for the last: it is always kept
    assert np.isnan(given["pooled_keys"][:, :, 7]).all()
    for own, same in zip(
        three(host_library, attributes, inputs),
        three(host_library, {**attributes, "has_pooled_keys": 1}, given),
        strict=True,
    ):
        np.testing.assert_array_equal(own, same)


@pytest.mark.parametrize("scores", ["random", "ties", "negative", "zeros"])
def test_many_blocks_are_ranked(host_library: PluginLibrary, scores: str) -> None:
    """More key blocks than threads of a block, and far more than are kept."""
    attributes = node(2, 2, kv_format="int8", pattern="dynamic", block_size=BLOCK, top_n=20, gate=1)
    rng = np.random.default_rng(8)
    inputs = causal_inputs(rng, attributes, tokens=1, past=(299 * BLOCK + 17,))
    gate = rng.standard_normal((1, 2, 1, 300), dtype=np.float32)
    made = {"random": gate, "ties": np.round(gate), "negative": -np.abs(gate) * 1e30, "zeros": gate * 0}  # and -0
    inputs["gate_scores"] = made[scores]
    kernel = host_library.run("SparseAttention", attributes, inputs)["output"]
    assert nmse(kernel, reference(SCHEMA.resolve(attributes), inputs)["output"]) < NMSE


@pytest.mark.parametrize("pattern", ["dense", "dynamic"])
def test_the_workspace_of_large_shapes_is_enough_for_small_ones(host_library: PluginLibrary, pattern: str) -> None:
    """TensorRT asks once, with the largest shapes of a profile."""
    more = {"pattern": "dynamic", "block_size": BLOCK, "top_n": 3} if pattern == "dynamic" else {}
    attributes = node(8, 1, kv_format="float16", **more)
    with host_library.create("SparseAttention", attributes) as instance:

        def needed(batch: int, tokens: int, capacity: int) -> int:
            lengths = np.zeros(batch, np.int32)
            cache = np.zeros((batch, 1, capacity, 64), np.float16)
            inputs = {"query": np.zeros((batch, tokens, 512), np.float32), "key_cache": cache, "value_cache": cache}
            inputs |= {"past_lengths": lengths, "query_lengths": lengths}
            with instance.prepare(inputs) as call:
                return call.workspace_bytes

        largest = needed(4, 200, 2000)
        smaller = [(1, 1, 2000), (4, 1, 2000), (4, 8, 2000), (3, 7, 1900), (4, 9, 2000), (2, 200, 300), (4, 3, 64)]
        assert all(0 <= needed(*shape) <= largest for shape in smaller)
        assert needed(1, 1, 2000) > 0


def test_the_table_covers_what_was_promised() -> None:
    seen = [SCHEMA.resolve(case.attributes) for case in CASES]
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert {(each["kv_format"], each["head_dim"]) for each in seen} >= {(f, d) for f in KV_FORMATS for d in HEAD_DIMS}
    assert {(each["kv_format"], each["pattern"]) for each in seen} >= {(f, p) for f in KV_FORMATS for p in PATTERNS}
    assert {(each["mode"], each["pattern"]) for each in seen} == {
        (m, p) for m in ("causal", "segment") for p in PATTERNS
    }
    assert {each["num_heads"] // each["kv_num_heads"] for each in seen} >= {1, 4, 8, 16, 64}
    assert len({each.name for each in REFUSED}) == len(REFUSED) > 20
