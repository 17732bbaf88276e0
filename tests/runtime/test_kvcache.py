"""Cache memory: growth, exchange of buffers, removed rows; and how much of a prompt is cached."""

from __future__ import annotations

import numpy as np
import pytest

from deepstitch.errors import BundleError
from deepstitch.manifest import Graph, TensorSpec
from deepstitch.runtime.kvcache import CachedTokens, CacheTensor, KVCache, cache_tensors, common_prefix

TENSOR = CacheTensor(past="past_key_values.0.key", present="present.0.key", heads=2, width=4, dtype="float32")


def past(cache: KVCache) -> np.ndarray:
    return cache.bindings(range(cache.rows))[cache.current][0][TENSOR.past]


def present(cache: KVCache) -> np.ndarray:
    return cache.bindings(range(cache.rows))[cache.current][1][TENSOR.present]


@pytest.mark.parametrize("in_place", [True, False])
def test_growth_keeps_what_is_valid_and_rounds_up(in_place):
    cache = KVCache([TENSOR], rows=2, capacity=65, in_place=in_place)
    assert past(cache).shape == (2, 2, 128, 4)
    past(cache)[:, :, :100] = np.arange(100)[:, None]
    version = cache.version
    cache.reserve(128, np.array([100, 3], np.int32))
    assert cache.version == version
    cache.reserve(129, np.array([100, 3], np.int32))
    assert (cache.capacity, cache.version) == (256, version + 1)
    np.testing.assert_array_equal(past(cache)[0, 1, :100, 2], np.arange(100))


def test_two_buffers_swap_for_all_rows_and_copy_for_some():
    cache = KVCache([TENSOR], rows=2, capacity=8, in_place=False)
    first = past(cache)
    present(cache)[:] = 1
    cache.commit(range(2), np.array([0, 0], np.int32), 3)
    assert past(cache).ctypes.data != first.ctypes.data
    assert (past(cache) == 1).all()
    present(cache)[1] = 2
    cache.commit(range(1, 2), np.array([3], np.int32), 2)
    assert (past(cache)[1, :, 3:5] == 2).all()
    assert (past(cache)[1, :, :3] == 1).all()
    assert (past(cache)[0] == 1).all()


def test_in_place_past_and_present_are_one():
    cache = KVCache([TENSOR], rows=3, capacity=8, in_place=True)
    assert past(cache).ctypes.data == present(cache).ctypes.data
    assert past(cache).ctypes.data % 64 == 0
    part = cache.bindings(range(1, 3))[0][0][TENSOR.past]
    assert part.flags.c_contiguous and part.shape[0] == 2


def test_fresh_memory_is_zero():
    """A masked NaN key would poison the softmax-weighted sum."""
    assert not past(KVCache([TENSOR], rows=1, capacity=8, in_place=True)).any()


def test_a_cache_input_needs_its_output():
    spec = TensorSpec(name="past_key_values.0.key", dtype="float32", shape=("B", 2, "C", 4))
    graph = Graph(file="decoder.onnx", opset=24, nodes=1, inputs=(spec,), outputs=())
    with pytest.raises(BundleError, match=r"needs an output 'present\.0\.key'"):
        cache_tensors(graph)


def tokens(ids: str, keys: dict[int, str] | None = None, positions: np.ndarray | None = None) -> CachedTokens:
    keys = keys or {}
    places = np.arange(len(ids)) if positions is None else positions
    return CachedTokens(
        input_ids=np.array([ord(each) for each in ids]),
        position_ids=np.tile(places, (3, 1)),
        item_starts=np.array(list(keys), np.int64),
        item_keys=tuple(keys.values()),
    )


@pytest.mark.parametrize(
    ("cached", "prompt", "ends", "length"),
    [
        (tokens("abc"), tokens("abcdef"), [], 3),
        (tokens("abcdef"), tokens("abc"), [], 2),  # the last token always runs
        (tokens("abXdef"), tokens("abcdef"), [], 2),
        (tokens(""), tokens("abc"), [], 0),
        (tokens("abcd", positions=np.array([0, 1, 5, 6])), tokens("abcde"), [], 2),
        (tokens("a##b", {1: "x"}), tokens("a##bc", {1: "x"}), [3], 4),
        (tokens("a##b", {1: "x"}), tokens("a##bc", {1: "y"}), [3], 1),  # same ids, another picture
        (tokens("a#", {1: "x"}), tokens("a##bc", {1: "x"}), [3], 1),  # half a picture
        (tokens("a##b#c", {1: "x", 4: "y"}), tokens("a##b#cd", {1: "x", 4: "z"}), [3, 5], 4),
        (tokens("a##b"), tokens("a##bc", {1: "x"}), [3], 1),
    ],
)
def test_common_prefix(cached, prompt, ends, length):
    assert common_prefix(cached, prompt, np.array(ends, np.int64)) == length
