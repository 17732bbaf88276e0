"""The table of cases of SparseAttention: what tests, GPU runs and benchmarks read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array, Case, Refused

__all__ = ["CASES", "REFUSED", "causal_inputs", "segment_inputs"]

# Sums and exponentials in float32 against float64; int8 and float16 are exact once they are stored.
NMSE = 1e-11
Given = Callable[[np.random.Generator], Array]


def _quantized(numbers: Array) -> tuple[Array, Array]:
    """int8 and one scale per token: ``[..., D]`` to ``[..., D]`` and ``[...]``."""
    scales = np.abs(numbers).max(axis=-1, initial=0) / np.float32(127)
    return np.rint(numbers / np.where(scales == 0, 1, scales)[..., None]).astype(np.int8), scales.astype(np.float32)


def causal_inputs(
    rng: np.random.Generator,
    attributes: dict[str, Any],
    *,
    tokens: int,
    past: Sequence[int],
    new: Sequence[int] | None = None,
    capacity: int | None = None,
    spread: float = 1.0,
) -> dict[str, Array]:
    """Inputs of mode causal, without layout and gate_scores. Slots that hold no token are full of junk.

    Args:
        rng: source of numbers.
        attributes: as a node gives them.
        tokens: S.
        past: past_lengths.
        new: query_lengths; all S if None.
        capacity: C; just enough, in 64 steps, if None.
        spread: standard deviation of the queries: how far the weights are from uniform.
    """
    new = [tokens] * len(past) if new is None else new
    needed = max([tokens, *(p + n for p, n in zip(past, new, strict=True))])
    capacity = -(-needed // 64) * 64 if capacity is None else capacity
    kv_format, dim = attributes.get("kv_format", "float32"), attributes["head_dim"]
    query = rng.standard_normal((len(past), tokens, attributes["num_heads"] * dim), dtype=np.float32)
    inputs = {"query": (query * np.float32(spread)).astype(np.float32)}
    scales = {}
    for name in ("key", "value"):
        numbers = rng.standard_normal((len(past), attributes["kv_num_heads"], capacity, dim), dtype=np.float32)
        if kv_format == "int8":
            numbers, scales[f"{name}_scales"] = _quantized(numbers)
        inputs[f"{name}_cache"] = numbers.astype(kv_format)
    inputs |= scales
    for row, (before, added) in enumerate(zip(past, new, strict=True)):
        for name in ("key", "value"):
            junk = scales[f"{name}_scales"] if scales else inputs[f"{name}_cache"]
            junk[row, :, before + added :] = np.nan
    return inputs | {"past_lengths": np.array(past, np.int32), "query_lengths": np.array(new, np.int32)}


def segment_inputs(
    rng: np.random.Generator, attributes: dict[str, Any], *, bounds: Sequence[int], tokens: int | None = None
) -> dict[str, Array]:
    """Inputs of mode segment; ``tokens`` in all, up to the last bound if None."""
    tokens = bounds[-1] if tokens is None else tokens
    heads = {"query": "num_heads", "key": "kv_num_heads", "value": "kv_num_heads"}
    inputs = {
        name: rng.standard_normal((tokens, attributes[count] * attributes["head_dim"]), dtype=np.float32)
        for name, count in heads.items()
    }
    return inputs | {"cu_seqlens": np.array(bounds, np.int32)}


def _attributes(heads: int, kv_heads: int, dim: int, **more: Any) -> dict[str, Any]:
    # what a node would hold: scale is a float32 there
    return {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": dim, "scale": float(dim**-0.5), **more}


def _causal(
    name: str,
    *,
    past: Sequence[int] = (0,),
    tokens: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 64,
    new: Sequence[int] | None = None,
    capacity: int | None = None,
    spread: float = 1.0,
    given: tuple[str, Given] | None = None,
    tags: tuple[str, ...] = (),
    **attributes: Any,
) -> Case:
    node = _attributes(heads, kv_heads, dim, **attributes)

    def inputs(rng: np.random.Generator) -> dict[str, Array]:
        made = causal_inputs(rng, node, tokens=tokens, past=past, new=new, capacity=capacity, spread=spread)
        return made | ({given[0]: given[1](rng)} if given else {})

    return Case(name=name, attributes=node, inputs=inputs, nmse=NMSE, tags=("causal", *tags))


def _segment(
    name: str,
    bounds: Sequence[int],
    *,
    heads: int = 1,
    kv_heads: int = 1,
    dim: int = 64,
    tokens: int | None = None,
    given: tuple[str, Given] | None = None,
    **attributes: Any,
) -> Case:
    node = _attributes(heads, kv_heads, dim, mode="segment", **attributes)

    def inputs(rng: np.random.Generator) -> dict[str, Array]:
        made = segment_inputs(rng, node, bounds=bounds, tokens=tokens)
        return made | ({given[0]: given[1](rng)} if given else {})

    return Case(name=name, attributes=node, inputs=inputs, nmse=NMSE, tags=("segment",))


def _layout(*shape: int, density: float = 0.6) -> tuple[str, Given]:
    return "layout", lambda rng: (rng.random(shape) < density).astype(np.int32)


def _gate(*shape: int, steps: int = 0) -> tuple[str, Given]:
    """Scores; with ``steps``, so few different ones that many are equal, and one in ten is no number."""

    def make(rng: np.random.Generator) -> Array:
        if not steps:
            return rng.standard_normal(shape, dtype=np.float32)
        scores = rng.integers(0, steps, shape).astype(np.float32)
        scores[rng.random(shape) < 0.1] = np.nan
        return scores

    return "gate_scores", make


def _pooled_keys(rows: int, kv_heads: int, blocks: int, dim: int = 64) -> tuple[str, Given]:
    """Not the means of the keys: what is given counts. The first block's is junk."""

    def make(rng: np.random.Generator) -> Array:
        means = rng.standard_normal((rows, kv_heads, blocks, dim), dtype=np.float32)
        means[:, :, 0] = np.nan
        return means

    return "pooled_keys", make


def _formats() -> Iterable[Case]:
    """Every head_dim and stored format, prefill and decode; every pattern and format."""
    for dim in (64, 72, 80, 96, 128):
        for kv_format in ("float32", "float16", "int8"):
            name = f"{kv_format}_d{dim}"
            yield _causal(f"prefill_{name}", past=(3,), tokens=35, dim=dim, kv_format=kv_format, tags=("prefill",))
            yield _causal(f"decode_{name}", past=(90,), heads=3, dim=dim, kv_format=kv_format, tags=("decode",))
    for kv_format in ("float32", "float16", "int8"):
        more: dict[str, Any] = {"kv_format": kv_format, "past": (150,)}
        for regime, tokens in (("prefill", 33), ("decode", 2)):
            name = f"{regime}_{kv_format}"
            yield _causal(f"{name}_window", tokens=tokens, pattern="window", window=40, sink=5, **more)
            yield _causal(
                f"{name}_layout", tokens=tokens, pattern="layout", block_size=64, given=_layout(1, 1, 1, 3), **more
            )
            yield _causal(f"{name}_dynamic", tokens=tokens, pattern="dynamic", block_size=64, top_n=2, **more)


def _lengths() -> Iterable[Case]:
    """Ragged rows, one token, rows without queries, few and many query heads per kv head, chunks."""
    yield _causal("first_token", tags=("decode",))
    yield _causal("one_head_one_token", heads=1, past=(5,), tags=("decode",))
    yield _causal("prefill_ragged", past=(0, 0, 0), tokens=40, new=(40, 7, 1), heads=2, kv_heads=2)
    yield _causal("chunk_ragged", past=(70, 0, 33), tokens=40, new=(40, 0, 17), kv_format="int8")
    yield _causal("chunk_of_33", past=(95,), tokens=33, heads=4, kv_heads=1, kv_format="float16")
    yield _causal("decode_ragged", past=(0, 130, 64), new=(1, 1, 0), heads=4, kv_heads=2, kv_format="float16")
    yield _causal("decode_group_8", past=(100,), heads=16, kv_heads=2, tags=("decode",))
    yield _causal("decode_group_16", past=(70,), heads=16, kv_format="int8", tags=("decode",))
    yield _causal("decode_group_5_three_tokens", past=(61,), tokens=3, heads=5, tags=("decode",))
    yield _causal("decode_eight_tokens_group_8", past=(40, 9), tokens=8, new=(8, 3), heads=8, kv_format="float16")
    yield _causal("decode_mha", past=(80,), heads=3, kv_heads=3)
    yield _causal("prefill_group_8", past=(2,), tokens=12, heads=8, kv_format="int8")
    yield _causal("prefill_group_5", past=(0,), tokens=27, heads=10, kv_heads=2)
    yield _causal("prefill_group_64", past=(1,), tokens=2, heads=64)
    yield _causal("prefill_mha", past=(0,), tokens=70, heads=2, kv_heads=2, dim=72)
    yield _causal("full_cache", past=(62,), tokens=2, capacity=64)
    yield _causal("odd_capacity", past=(30,), tokens=40, heads=2, capacity=71, kv_format="float16", dim=72)
    yield _causal("even_capacity_int8_72", past=(30,), heads=2, capacity=38, kv_format="int8", dim=72)
    yield _causal("no_tokens", past=(4,), tokens=0, capacity=8)
    yield _causal("no_rows", past=(), tokens=3, capacity=8)


def _numbers() -> Iterable[Case]:
    """Long contexts, weights of one key alone, weights that are all alike."""
    long: dict[str, Any] = {"heads": 4, "kv_heads": 1, "tags": ("decode", "long")}
    for kv_format in ("float32", "float16", "int8"):
        yield _causal(f"decode_2000_{kv_format}", past=(1999,), kv_format=kv_format, **long)
    yield _causal("decode_long_and_short", past=(1500, 3), heads=2, tags=("decode", "long"))
    yield _causal("decode_2000_window", past=(2000,), pattern="window", window=200, sink=4, **long)
    yield _causal(
        "decode_2000_gate", past=(2000,), pattern="dynamic", block_size=64, top_n=4, gate=1,
        given=_gate(1, 1, 1, 32), **long,
    )  # fmt: skip
    yield _causal("prefill_long", past=(700,), tokens=65, heads=1, tags=("prefill", "long"))
    yield _causal("prefill_peaked", past=(20,), tokens=70, heads=1, spread=10.0)
    yield _causal("decode_peaked", past=(200,), heads=2, spread=10.0)
    yield _causal("prefill_flat", past=(20,), tokens=70, heads=1, spread=1e-6)
    yield _causal("decode_flat", past=(200,), heads=2, spread=1e-6, kv_format="float16")


def _many_heads() -> Iterable[Case]:
    """Decode with so many batch rows and heads that the keys are hardly split: a block walks over several tiles."""
    heads: dict[str, Any] = {"heads": 120, "kv_heads": 120, "tags": ("decode",)}
    yield _causal("decode_120_heads", past=(140,), **heads)
    yield _causal("decode_120_heads_peaked", past=(200,), kv_format="float16", spread=10.0, **heads)
    yield _causal("decode_120_heads_window", past=(300,), pattern="window", window=150, sink=40, **heads)
    yield _causal(
        "decode_120_heads_layout", past=(400,), kv_format="int8", pattern="layout", block_size=64,
        given=_layout(1, 120, 1, 7), **heads,
    )  # fmt: skip
    yield _causal(
        "decode_ragged_90_heads", past=(200, 40), tokens=2, new=(2, 1), heads=180, kv_heads=45, kv_format="int8"
    )
    yield _causal("decode_ragged_60_heads", past=(250, 130), heads=480, kv_heads=30, dim=72, kv_format="float16")
    # more than half of the blocks there may be: one part, whatever the card
    yield _causal("decode_520_heads", past=(130,), heads=520, kv_heads=520, kv_format="int8", tags=("decode",))


def _patterns() -> Iterable[Case]:
    """The edges of the patterns."""
    yield _causal("window_1", past=(40,), tokens=70, heads=1, pattern="window", window=1)
    yield _causal("window_1_decode", past=(40, 0), pattern="window", window=1)
    yield _causal("window_over_all", past=(10,), tokens=70, heads=1, pattern="window", window=500, sink=300)
    yield _causal("window_meets_sink", past=(64,), tokens=3, heads=2, pattern="window", window=30, sink=40)
    yield _causal("window_far", past=(300, 20), tokens=66, new=(66, 31), heads=1, pattern="window", window=33, sink=33)
    yield _causal("window_2_kept_30", past=(2000,), heads=2, pattern="window", window=2, sink=1, tags=("long",))
    layout: dict[str, Any] = {"pattern": "layout", "block_size": 64}
    yield _causal("layout_nothing", past=(60,), tokens=70, given=_layout(1, 1, 2, 3, density=0), **layout)
    yield _causal("layout_nothing_decode", past=(60,), given=_layout(1, 1, 1, 1, density=0), **layout)
    yield _causal("layout_all", past=(60,), tokens=70, heads=1, given=_layout(1, 1, 2, 3, density=1), **layout)
    yield _causal(
        "layout_by_row_and_head", past=(130, 64), tokens=70, heads=2, kv_heads=2, given=_layout(2, 2, 2, 4), **layout
    )
    yield _causal("layout_by_head_decode", past=(500, 300), heads=4, kv_heads=2, given=_layout(1, 2, 1, 8), **layout)
    yield _causal("layout_by_row_decode", past=(500, 0), heads=2, given=_layout(2, 1, 1, 8), **layout)
    yield _causal("layout_group_5", past=(10,), tokens=70, heads=5, given=_layout(1, 1, 2, 2), **layout)
    yield _causal(
        "layout_128_int8", past=(200,), tokens=9, heads=8, capacity=300, kv_format="int8", pattern="layout",
        block_size=128, given=_layout(1, 1, 1, 3),
    )  # fmt: skip
    dynamic: dict[str, Any] = {"pattern": "dynamic", "block_size": 64}
    yield _causal("dynamic_top_1", past=(250,), tokens=70, heads=1, top_n=1, **dynamic)
    yield _causal("dynamic_more_than_all", past=(100,), tokens=70, heads=1, top_n=99, **dynamic)
    yield _causal("dynamic_prefill", past=(0,), tokens=200, heads=1, top_n=3, tags=("prefill",), **dynamic)
    yield _causal("dynamic_ragged", past=(250, 0, 129), tokens=66, new=(66, 0, 2), heads=1, top_n=3, **dynamic)
    yield _causal("dynamic_heads", past=(400,), tokens=3, heads=4, kv_heads=2, top_n=4, **dynamic)
    yield _causal("dynamic_across_blocks", past=(318,), tokens=4, heads=1, top_n=4, **dynamic)
    yield _causal("dynamic_d72_int8", past=(300,), tokens=2, dim=72, kv_format="int8", top_n=3, **dynamic)
    yield _causal(
        "dynamic_128", past=(500,), tokens=20, heads=4, pattern="dynamic", block_size=128, top_n=3, kv_format="float16"
    )
    pooled: dict[str, Any] = {"has_pooled_keys": 1, **dynamic}
    yield _causal(
        "pooled_keys_decode", past=(700, 250), heads=4, kv_heads=2, top_n=4, given=_pooled_keys(2, 2, 11), **pooled
    )
    yield _causal(
        "pooled_keys_prefill", past=(300,), tokens=70, heads=1, top_n=3, given=_pooled_keys(1, 1, 6), **pooled
    )
    gate: dict[str, Any] = {"gate": 1, **dynamic}
    yield _causal("gate_ties", past=(700,), tokens=70, heads=1, top_n=5, given=_gate(1, 1, 2, 13, steps=3), **gate)
    yield _causal("gate_by_row_and_head", past=(250, 90), heads=2, kv_heads=2, top_n=3, given=_gate(2, 2, 1, 4), **gate)


def _segments() -> Iterable[Case]:
    yield _segment("segments", (0, 5, 5, 6, 71, 140), heads=2, kv_heads=2)
    for dim in (72, 80, 96, 128):
        yield _segment(f"segments_d{dim}", (0, 20, 53), dim=dim)
    yield _segment("segments_of_one", tuple(range(12)), heads=2)
    yield _segment("segments_gqa", (0, 40, 41, 70), heads=4)
    yield _segment("segments_group_5", (0, 33, 50), heads=5)
    yield _segment("segment_alone", (0, 130))
    yield _segment("segments_many", tuple(range(0, 301, 2)), heads=1)
    yield _segment("segments_leave_tokens_out", (3, 3, 40, 60), tokens=70)
    yield _segment("no_segments", (0,), tokens=5)
    yield _segment("segments_no_tokens", (0, 0, 0))
    window: dict[str, Any] = {"pattern": "window", "window": 20}
    yield _segment("segments_window", (0, 100, 101, 175), sink=3, **window)
    yield _segment("segments_window_no_sink", (0, 90, 170), **window)
    layout: dict[str, Any] = {"pattern": "layout", "block_size": 64}
    yield _segment("segments_layout", (0, 150, 220), given=_layout(1, 1, 3, 3), **layout)
    yield _segment("segments_layout_each", (0, 150, 150, 220), heads=2, kv_heads=2, given=_layout(3, 2, 3, 3), **layout)
    yield _segment("segments_layout_too_small", (0, 150, 220), given=_layout(2, 1, 1, 2, density=1), **layout)
    dynamic: dict[str, Any] = {"pattern": "dynamic", "block_size": 64}
    yield _segment("segments_dynamic", (0, 300, 300, 330), top_n=3, **dynamic)
    yield _segment("segments_dynamic_top_1", (2, 140, 270), heads=2, tokens=280, top_n=1, **dynamic)
    yield _segment("segments_dynamic_128", (0, 400), pattern="dynamic", block_size=128, top_n=3)
    yield _segment("segments_gate", (0, 300, 420), top_n=3, gate=1, given=_gate(2, 1, 5, 5), **dynamic)
    yield _segment("segments_gate_too_small", (0, 300), top_n=3, gate=1, given=_gate(1, 1, 3, 4), **dynamic)


CASES: tuple[Case, ...] = (
    *_formats(),
    *_lengths(),
    *_numbers(),
    *_many_heads(),
    *_patterns(),
    *_segments(),
)


def _refused() -> Iterable[Refused]:
    node = _attributes(4, 2, 64)
    attributes: dict[str, tuple[dict[str, Any], str]] = {
        "head_dim": ({"head_dim": 100}, "head_dim is 100; it must be 64, 72, 80, 96 or 128"),
        "heads_not_divisible": ({"num_heads": 5}, "kv_num_heads is 2; it must divide num_heads = 5"),
        "no_kv_heads": ({"kv_num_heads": 0}, "kv_num_heads is 0"),
        "group_too_large": ({"num_heads": 130}, "num_heads / kv_num_heads is 65; at most 64"),
        "scale": ({"scale": 0.0}, "scale is 0; it must be positive"),
        "no_window": ({"pattern": "window"}, "window is 0; pattern window needs 1 or more"),
        "negative_sink": ({"pattern": "window", "window": 4, "sink": -1}, "sink is -1"),
        "window_unused": ({"window": 4}, "they belong to pattern window"),
        "block_size": ({"pattern": "layout", "block_size": 32}, "block_size is 32; it must be 64 or 128"),
        "block_size_unused": ({"block_size": 64}, "it belongs to the patterns layout and dynamic"),
        "no_top_n": ({"pattern": "dynamic", "block_size": 64}, "top_n is 0; pattern dynamic needs 1 or more"),
        "top_n_unused": ({"top_n": 3}, "it belongs to pattern dynamic"),
        "gate_unused": ({"gate": 1}, "gate is 1; it must be 0, or 1 with pattern dynamic"),
        "pooled_keys_unused": ({"has_pooled_keys": 1}, "has_pooled_keys is 1; it must be 0, or 1 with pattern dynamic"),
        "segment_format": ({"mode": "segment", "kv_format": "int8"}, "segment mode has no cache"),
        "mode": ({"mode": "prefix"}, "mode is 'prefix'; it must be one of causal, segment"),
        "pattern": ({"pattern": "strided"}, "it must be one of dense, window, layout, dynamic"),
        "kv_format": ({"kv_format": "int4"}, "it must be one of float32, float16, int8"),
    }
    for name, (changed, text) in attributes.items():
        yield Refused(name, {**node, **changed}, {}, text)
    yield from _refused_inputs(node)


def _refused_inputs(node: dict[str, Any]) -> Iterable[Refused]:
    rng = np.random.default_rng(0)
    good = causal_inputs(rng, node, tokens=3, past=(4,), capacity=64)
    changes: dict[str, tuple[dict[str, Array], str]] = {
        "query_rank": ({"query": good["query"][0]}, "it is [batch, tokens, num_heads * head_dim]"),
        "query_columns": ({"query": good["query"][..., :64].copy()}, "query has 64 columns"),
        "cache_heads": ({"key_cache": np.zeros((1, 3, 64, 64), np.float32)}, "key_cache has shape [1, 3, 64, 64]"),
        "cache_batch": ({"key_cache": np.zeros((2, 2, 64, 64), np.float32)}, "key_cache has shape [2, 2, 64, 64]"),
        "value_shape": ({"value_cache": np.zeros((1, 2, 32, 64), np.float32)}, "they must be the same"),
        "lengths_shape": ({"past_lengths": np.zeros(2, np.int32)}, "past_lengths has shape [2]; it is [batch]"),
        "lengths_dtype": ({"query_lengths": np.zeros(1, np.float32)}, "query_lengths is float32; it must be int32"),
        "cache_dtype": (
            {"key_cache": good["key_cache"].astype(np.float16)},
            "key_cache is float16; it must be float32",
        ),
    }
    for name, (changed, text) in changes.items():
        yield Refused(name, node, good | changed, text)
    small = {name: np.zeros((1, 2, 2, 64), np.float32) for name in ("key_cache", "value_cache")}
    yield Refused("capacity", node, good | small, "the capacity of the cache is 2, but there are 3 new tokens")
    narrow = _attributes(2, 1, 72, kv_format="int8")
    odd = causal_inputs(rng, narrow, tokens=1, past=(4,), capacity=7)
    yield Refused("odd_capacity_int8_72", narrow, odd, "with int8 and head_dim 72 it must be even")
    int8 = _attributes(2, 1, 64, kv_format="int8")
    scaled = causal_inputs(rng, int8, tokens=1, past=(4,), capacity=8)
    yield Refused("scales", int8, scaled | {"key_scales": np.zeros((1, 1, 1), np.float32)}, "one scale per token")
    layout = {**node, "pattern": "layout", "block_size": 64}
    for name, shape, text in (
        ("layout_rank", (1, 1), "it is [batch or 1, kv_num_heads or 1, query blocks, key blocks]"),
        ("layout_heads", (1, 4, 1, 1), "its second axis is kv_num_heads = 2 or 1"),
        ("layout_blocks", (1, 1, 1, 2), "there are 1 query blocks and 1 key blocks of 64"),
        ("layout_rows", (3, 1, 1, 1), "its first axis is 1 or 1"),
    ):
        yield Refused(name, layout, good | {"layout": np.zeros(shape, np.int32)}, text)
    pooled = {**node, "pattern": "dynamic", "block_size": 64, "top_n": 1, "has_pooled_keys": 1}
    means = {"pooled_keys": np.zeros((1, 2, 2, 64), np.float32)}
    yield Refused("pooled_keys", pooled, good | means, "pooled_keys has shape [1, 2, 2, 64]; it is one row per block")
    packed = _attributes(4, 2, 64, mode="segment")
    segments = segment_inputs(rng, packed, bounds=(0, 4, 6))
    yield Refused("key_rows", packed, segments | {"key": segments["key"][:5]}, "key has shape [5, 128]")
    yield Refused("no_bounds", packed, segments | {"cu_seqlens": np.zeros(0, np.int32)}, "cu_seqlens has shape [0]")


REFUSED: tuple[Refused, ...] = tuple(_refused())
