"""The decoder over its cache against the numpy decoder: chunks, rows, padding, growth, DeepStack rows."""

from __future__ import annotations

import numpy as np
import pytest

from deepstitch.errors import InputError
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.decode import DecoderState, RowTokens
from deepstitch.runtime.engine.ort import OrtEngine

from .tiny_bundle import CONTEXT, DEEPSTACK, HIDDEN, reference_logits


@pytest.fixture
def engine(tiny_bundle) -> OrtEngine:
    return OrtEngine(Bundle.open(tiny_bundle), threads=1, graphs=["decoder"])


def random_row(length: int, visual: int = 0, seed: int = 0) -> RowTokens:
    """``visual`` tokens in the middle, each with its own DeepStack row; three different position axes."""
    random = np.random.default_rng((seed, length))
    index = np.zeros(length, np.int32)
    first = (length - visual) // 2
    index[first : first + visual] = np.arange(1, visual + 1)
    return RowTokens(
        embeds=random.standard_normal((length, HIDDEN)).astype(np.float32),
        position_ids=np.sort(random.integers(0, length, (3, length)), axis=1),
        deepstack=random.standard_normal((visual, DEEPSTACK * HIDDEN)).astype(np.float32),
        deepstack_index=index,
    )


def expected(row: RowTokens) -> np.ndarray:
    return reference_logits(row.embeds, row.position_ids, row.deepstack, row.deepstack_index)


def head(row: RowTokens, count: int) -> RowTokens:
    return row.part(0, count)


@pytest.mark.parametrize("chunk", [None, 1, 4, 7, 100])
def test_prefill_equals_the_reference_for_any_chunk(engine, chunk):
    row = random_row(23, visual=9)
    (logits,) = DecoderState(engine).prefill([row], wanted=[range(23)], chunk=chunk)
    np.testing.assert_allclose(logits, expected(row), atol=2e-4)


@pytest.mark.parametrize("chunk", [None, 4])
def test_rows_of_different_length_do_not_touch_each_other(engine, chunk):
    rows = [random_row(3), random_row(17, visual=6, seed=1), random_row(9, visual=2, seed=2)]
    results = DecoderState(engine, rows=3).prefill(rows, wanted=[range(len(row)) for row in rows], chunk=chunk)
    for row, logits in zip(rows, results, strict=True):
        np.testing.assert_allclose(logits, expected(row), atol=2e-4)


def test_several_tokens_onto_filled_rows(engine):
    """The case GroupQueryAttention refuses in one call; DeepStack rows in the second part too."""
    rows = [random_row(12, visual=4), random_row(20, visual=8, seed=1)]
    state = DecoderState(engine, rows=2)
    state.prefill([head(rows[0], 5), head(rows[1], 11)])
    rest = [rows[0].part(5, 12), rows[1].part(11, 20)]
    results = state.prefill(rest, wanted=[range(7), range(9)])
    np.testing.assert_allclose(results[0], expected(rows[0])[5:], atol=2e-4)
    np.testing.assert_allclose(results[1], expected(rows[1])[11:], atol=2e-4)
    assert state.lengths.tolist() == [12, 20]


def test_steps_grow_the_cache_and_equal_the_reference(engine):
    rows = [random_row(60), random_row(90, seed=1)]
    for row in rows:  # decode places text: equal positions on all axes
        row.position_ids[:] = np.arange(len(row))
    state = DecoderState(engine, rows=2, capacity=16)
    state.prefill([head(rows[0], 10), head(rows[1], 40)])
    reserved = state.cache_bytes
    for step in range(50):
        embeds = np.stack([rows[0].embeds[10 + step], rows[1].embeds[40 + step]])
        logits = state.step(embeds, state.lengths.astype(np.int64))
        np.testing.assert_allclose(logits[0], expected(rows[0])[10 + step], atol=2e-4)
        np.testing.assert_allclose(logits[1], expected(rows[1])[40 + step], atol=2e-4)
    assert state.cache_bytes == 2 * reserved


def test_a_dropped_row_gives_its_place_to_the_last(engine):
    rows = [random_row(5), random_row(12, seed=1), random_row(9, seed=2)]
    for row in rows:
        row.position_ids[:] = np.arange(len(row))
    state = DecoderState(engine, rows=3)
    state.prefill([head(row, len(row) - 2) for row in rows])
    state.drop(0)
    assert state.lengths.tolist() == [7, 10]
    for back in (2, 1):
        logits = state.step(np.stack([rows[2].embeds[-back], rows[1].embeds[-back]]), state.lengths.astype(np.int64))
        np.testing.assert_allclose(logits[0], expected(rows[2])[-back], atol=2e-4)
        np.testing.assert_allclose(logits[1], expected(rows[1])[-back], atol=2e-4)


def test_a_truncated_row_forgets(engine):
    row, other = random_row(15, visual=4), random_row(15, seed=5)
    state = DecoderState(engine)
    state.prefill([row])
    state.truncate(0, 8)
    (logits,) = state.prefill([row.part(8, 15)], wanted=[range(7)])
    np.testing.assert_allclose(logits, expected(row)[8:], atol=2e-4)
    state.truncate(0, 0)
    (logits,) = state.prefill([other])
    np.testing.assert_allclose(logits[0], expected(other)[-1], atol=2e-4)


def test_part_carries_only_the_rows_it_needs():
    row = random_row(20, visual=10)
    part = row.part(8, 12)
    assert part.deepstack_index.tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(part.deepstack, row.deepstack[3:7])
    assert len(row.part(0, 3).deepstack) == 0


def test_steps_write_the_same_memory(engine, tiny_bundle):
    """No new arrays per step: logits come in one buffer, and in place the cache stays where it is."""
    state = DecoderState(engine)
    state.prefill([random_row(8)])
    embeds, position = np.zeros((1, HIDDEN), np.float32), np.array([8])
    addresses = {state.step(embeds, position).ctypes.data for _ in range(4)}
    assert len(addresses) == 1
    in_place = Bundle.open(tiny_bundle).manifest.model.kv_cache_in_place
    past, present = state._cache.bindings(range(1))[0]
    shared = past["past_key_values.0.key"].ctypes.data == present["present.0.key"].ctypes.data
    assert shared == in_place


def test_the_context_is_the_limit(engine):
    state = DecoderState(engine)
    state.prefill([random_row(CONTEXT - 3)], chunk=512)
    with pytest.raises(InputError, match=rf"{CONTEXT - 3} tokens in the cache and 4 new ones .* {CONTEXT}"):
        state.prefill([random_row(4)])
