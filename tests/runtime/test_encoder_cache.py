"""Encoder outputs by content: what is encoded, what is remembered, what is dropped."""

from __future__ import annotations

import numpy as np
import pytest

from deepstitch.runtime.encoder_cache import EncoderCache
from deepstitch.runtime.preprocess import VisionBatch


class Encoder:
    """Notes what it is asked; the outputs say which item and token they belong to."""

    def __init__(self) -> None:
        self.calls: list[VisionBatch] = []

    def __call__(self, batch: VisionBatch) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append(batch)
        rows = batch.pixel_values.reshape(-1, 4).copy()
        return rows, np.concatenate([rows, -rows], axis=1)


def batch(**sizes: int) -> VisionBatch:
    """Items by key; a patch of item k holds the key's code and its place in the item."""
    patches = {key: 4 * tokens for key, tokens in sizes.items()}
    values = [np.stack([np.full(n, ord(key)), np.arange(n)], axis=1) for key, n in patches.items()]
    total = sum(patches.values())
    return VisionBatch(
        pixel_values=np.concatenate(values).astype(np.float32)[:, :1],
        position_indices=np.zeros((4, total), np.int64),
        position_weights=np.zeros((4, total), np.float32),
        rotary_cos=np.zeros((total, 4), np.float32),
        rotary_sin=np.zeros((total, 4), np.float32),
        cu_seqlens=np.cumsum([0, *patches.values()]).astype(np.int32),
        grid_thw=np.array([[1, 2, n // 2] for n in patches.values()], np.int64),
        tokens_per_item=np.array(list(sizes.values()), np.int64),
        content_keys=tuple(sizes),
    )


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def test_only_misses_are_encoded_all_in_one_call(encoder):
    cache = EncoderCache(encoder)
    cache.features([batch(a=2)])
    found = cache.features([batch(b=1, a=2), None, batch(c=3, b=1)])
    assert [call.content_keys for call in encoder.calls] == [("a",), ("b", "c")]
    packed = encoder.calls[1]
    assert packed.cu_seqlens.tolist() == [0, 4, 16]
    assert packed.cu_seqlens.dtype == np.int32
    assert [[len(each.image_embeds) for each in row] for row in found] == [[1, 2], [], [3, 1]]
    assert (found[2][0].image_embeds == ord("c")).all() and (found[0][1].image_embeds == ord("a")).all()
    assert (found[2][0].deepstack_embeds[:, 4:] == -ord("c")).all()
    assert (cache.hits, cache.misses) == (2, 3)


def test_the_least_recently_used_item_leaves_first(encoder):
    one_token = 4 * 4 + 8 * 4
    cache = EncoderCache(encoder, max_bytes=2 * one_token)
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.features([batch(**{key: 1})])
    assert [call.content_keys[0] for call in encoder.calls] == ["a", "b", "c", "b"]
    assert cache.nbytes == 2 * one_token


def test_an_item_larger_than_the_cache_still_comes_back(encoder):
    cache = EncoderCache(encoder, max_bytes=0)
    assert len(cache.features([batch(a=5)])[0][0].image_embeds) == 5
    assert cache.nbytes == 0
