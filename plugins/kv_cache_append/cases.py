"""The table of cases of KVCacheAppend: what tests, GPU runs and benchmarks read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array, Case, Refused
from deepstitch.plugins.kv_cache_append.schema import KV_FORMATS

__all__ = ["CASES", "REFUSED", "inputs"]

LARGEST = 2**31 - 1


def inputs(
    past: Sequence[int],
    new: Sequence[int],
    *,
    tokens: int,
    capacity: int,
    heads: int = 2,
    width: int = 64,
    kv_format: str = "float32",
    change: Callable[[dict[str, Array]], None] = lambda tensors: None,
) -> Callable[[np.random.Generator], dict[str, Array]]:
    """The tensors of one call. Every slot of the cache holds some number, those behind the past too.

    Args:
        past: past_lengths.
        new: query_lengths.
        tokens: S.
        capacity: C.
        heads: kv heads.
        width: D.
        kv_format: as the attribute.
        change: edits the tensors.
    """

    def make(rng: np.random.Generator) -> dict[str, Array]:
        rows = len(past)
        cache: dict[str, Array] = {}
        scales: dict[str, Array] = {}
        for part in ("past_key", "past_value"):
            shape = (rows, heads, capacity, width)
            if kv_format == "int8":
                cache[part] = rng.integers(-127, 128, shape).astype(np.int8)
                scales[f"{part}_scales"] = rng.uniform(0.01, 1, shape[:3]).astype(np.float32)
            else:
                cache[part] = rng.standard_normal(shape, dtype=np.float32).astype(kv_format)
        given = {part: rng.standard_normal((rows, tokens, heads * width), np.float32) for part in ("key", "value")}
        lengths = {"past_lengths": np.array(past, np.int32), "query_lengths": np.array(new, np.int32)}
        made = {**cache, **scales, **given, **lengths}
        change(made)
        return made

    return make


def _zeros(tensors: dict[str, Array]) -> None:
    """Heads that say nothing: their scale is 0."""
    tensors["key"][0, 0] = 0
    tensors["value"][0, -1] = -0.0


def _extremes(tensors: dict[str, Array]) -> None:
    """Numbers so small that their scale has few bits, and the largest there are."""
    tensors["key"][0, 0] *= np.float32(1e-42)
    limit = np.float32(65504 if tensors["past_key"].dtype == np.float16 else 1e38)
    tensors["key"][0, 1] = np.clip(tensors["key"][0, 1] * limit, -limit, limit)
    tensors["value"][0, 0] = np.float32(1e-45)
    tensors["value"][0, 1] *= np.float32(3000)


def _halves(tensors: dict[str, Array]) -> None:
    """Numbers in the middle between two steps of their scale: to even."""
    steps = np.resize(np.arange(-126.5, 127, 1, dtype=np.float32), tensors["key"].shape[-1])
    steps[::64] = 127
    for part in ("key", "value"):
        tensors[part][...] = steps


def _case(name: str, past: Sequence[int], new: Sequence[int], **options: Any) -> Case:
    """A number is copied, or rounded once: nothing but the same bits is right."""
    tags = tuple(options.pop("tags", ()))
    attributes = {"kv_format": options["kv_format"]} if "kv_format" in options else {}
    return Case(name=name, attributes=attributes, inputs=inputs(past, new, **options), nmse=0.0, max_abs=0.0, tags=tags)


def _of_format(kv_format: str) -> list[Case]:
    form: dict[str, Any] = {"kv_format": kv_format}

    def case(name: str, past: Sequence[int], new: Sequence[int], **options: Any) -> Case:
        return _case(f"{name}-{kv_format}", past, new, **options, **form)

    return [
        case("decode", [9], [1], tokens=1, capacity=16, tags=("decode",)),
        case("decode-batch", [9, 0, 15], [1, 1, 1], tokens=1, capacity=16, width=128, tags=("decode",)),
        case("prefill", [0], [7], tokens=7, capacity=16, heads=3),
        case("prefill-ragged", [0, 0, 0], [5, 1, 0], tokens=5, capacity=9, width=32, tags=("ragged",)),
        case("continued", [4, 11], [6, 3], tokens=6, capacity=20, width=72),
        case("full", [0, 5], [8, 3], tokens=8, capacity=8),
        case("no-tokens", [3, 0], [0, 0], tokens=0, capacity=5, tags=("empty",)),
        case("no-batch", [], [], tokens=3, capacity=5, tags=("empty",)),
        case("no-slots", [0], [2], tokens=2, capacity=0, tags=("empty",)),
        case("nothing-valid", [3, 2], [0, 0], tokens=4, capacity=8),
        case("behind-the-cache", [6, 8, 7], [4, 4, 1], tokens=4, capacity=8),
        case("far-outside", [LARGEST, -LARGEST - 1, -2], [4, 4, 4], tokens=4, capacity=8),
        case("lengths-that-are-none", [2, 2, 2], [-1, LARGEST, -LARGEST - 1], tokens=3, capacity=8),
        case("more-tokens-than-slots", [0, 1], [9, 9], tokens=9, capacity=4),
        case("odd-width", [2, 0], [2, 3], tokens=3, capacity=7, heads=3, width=13, tags=("ragged",)),
        case("width-1", [1], [2], tokens=2, capacity=5, width=1, tags=("ragged",)),
        case("width-132", [1], [2], tokens=2, capacity=5, heads=1, width=132, tags=("ragged",)),
        case("width-300", [1], [1], tokens=2, capacity=3, heads=1, width=300, tags=("ragged",)),
        case("zeros", [1], [3], tokens=3, capacity=4, change=_zeros),
        case("extremes", [1], [3], tokens=3, capacity=4, change=_extremes),
    ]


def _cases() -> tuple[Case, ...]:
    cases = [case for kv_format in KV_FORMATS for case in _of_format(kv_format)]
    cases += [
        _case("halves-int8", [0], [2], tokens=2, capacity=3, width=256, kv_format="int8", change=_halves),
        _case("default-format", [5], [2], tokens=3, capacity=9, width=80),
        # the copy: a whole number of its blocks, one word more, and bytes that fill no word
        _case("copy-of-a-block", [3], [1], tokens=1, capacity=32, heads=2, width=64),
        _case("copy-and-a-word", [3], [1], tokens=1, capacity=1025, heads=1, width=4),
        _case("copy-and-bytes", [3], [1], tokens=1, capacity=547, heads=1, width=15, kv_format="float16"),
        _case("copy-of-bytes", [1], [1], tokens=1, capacity=3, heads=1, width=5, kv_format="int8"),
    ]
    return tuple(cases)


CASES = _cases()


def _refused(name: str, text: str, kv_format: str = "float32", **replaced: Array) -> Refused:
    good = inputs([1, 2], [3, 2], tokens=3, capacity=6, width=8, kv_format=kv_format)(np.random.default_rng(0))
    return Refused(name, {"kv_format": kv_format}, good | replaced, text)


def _floats(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


REFUSED = (
    Refused("format", {"kv_format": "int4"}, {}, "kv_format is int4; it is float32, float16 or int8"),
    _refused("cache-of-rank-3", "past_key has shape [2, 12, 8]; it is [B, kv heads, C, D]", past_key=_floats(2, 12, 8)),
    _refused("no-heads", "there is at least one kv head, of width 1", past_key=_floats(2, 0, 6, 8)),
    _refused("no-width", "there is at least one kv head, of width 1", past_key=_floats(2, 2, 6, 0)),
    _refused("values-of-another-shape", "past_value has shape [2, 2, 5, 8]; it is [2, 2, 6, 8]",
             past_value=_floats(2, 2, 5, 8)),
    _refused("scales-of-another-shape", "past_value_scales has shape [2, 2, 6, 1]; it is [2, 2, 6]", "int8",
             past_value_scales=_floats(2, 2, 6, 1)),
    _refused("key-by-head", "key has shape [2, 3, 2, 8]; it is [2, S, 16]", key=_floats(2, 3, 2, 8)),
    _refused("key-of-another-width", "key has shape [2, 3, 8]; it is [2, S, 16]", key=_floats(2, 3, 8)),
    _refused("key-of-other-rows", "key has shape [1, 3, 16]; it is [2, S, 16]", key=_floats(1, 3, 16)),
    _refused("fewer-values", "value has shape [2, 2, 16]; it is [2, 3, 16] as key is", value=_floats(2, 2, 16)),
    _refused("one-past-length", "past_lengths has shape [1]; it is [2]", past_lengths=np.zeros(1, np.int32)),
    _refused("lengths-as-column", "query_lengths has shape [2, 1]; it is [2]",
             query_lengths=np.zeros((2, 1), np.int32)),
    _refused("half-keys", "key is float16; it must be float32", key=np.zeros((2, 3, 16), np.float16)),
    _refused("cache-of-another-type", "past_key is float16; it must be float32", past_key=np.zeros((2, 2, 6, 8), "f2")),
    _refused("cache-of-integers", "past_value is float32; it must be int8", "int8", past_value=_floats(2, 2, 6, 8)),
    _refused("lengths-of-floats", "query_lengths is float32; it must be int32", query_lengths=_floats(2)),
)  # fmt: skip
