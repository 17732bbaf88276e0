"""Layout of a pool, and rows that go in and come out bit for bit."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence

import numpy as np
import pytest

from deepstitch.runtime.disaggregated.buffers import BUFFERS, TOKEN_BUFFERS, BufferLayout, MultimodalDataBuffers, Stamp

SIZES = (1, 2, 3, 7, 16, 128)
STAMP = Stamp(
    total_tokens=2_040,
    rope_delta=-1_976,
    deepstack_rows=2_000,
    start=256,
    tokens=128,
    attempt=3,
    room=uuid.UUID(int=(5 << 120) + 7).hex,
    epoch=uuid.UUID(int=(11 << 120) + 13).hex,
)


def layout(block_tokens: int = 4, *, hidden: int = 5, deepstack: int = 3, blocks: int = 6) -> BufferLayout:
    return BufferLayout(
        hidden_size=hidden,
        num_deepstack=deepstack,
        block_tokens=block_tokens,
        num_blocks=blocks,
        num_deepstack_blocks=blocks - 1 if deepstack else 0,
    )


def pool(of: BufferLayout, seed: int = 0) -> MultimodalDataBuffers:
    """Memory full of noise: whatever is not written must not matter."""
    memory = np.random.default_rng(seed).integers(0, 256, of.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return MultimodalDataBuffers(of, memory[start : start + of.nbytes])


def values(of: BufferLayout, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, ids, positions, DeepStack rows; floats of every bit pattern, NaN among them."""
    random = np.random.default_rng(seed)
    embeds = random.integers(0, 1 << 32, (count, of.hidden_size), np.uint32).view(np.float32)
    deepstack = random.integers(0, 1 << 32, (count, of.width(BUFFERS[4])), np.uint32).view(np.float32)
    return embeds, random.integers(0, 1 << 31, count), random.integers(-9, 1 << 31, (3, count)), deepstack


def spread(of: BufferLayout, count: int, seed: int = 0) -> tuple[int, ...]:
    """Blocks for that many rows, in no order."""
    order = np.random.default_rng(seed).permutation(of.num_deepstack_blocks or of.num_blocks)
    return tuple(order[: of.blocks_for(count)].tolist())


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("deepstack", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_buffers_are_aligned_and_share_no_byte(size: int, deepstack: int):
    of = layout(size, deepstack=deepstack)
    generations = of.num_blocks + of.num_deepstack_blocks
    taken = np.zeros(of.nbytes, np.int32)
    taken[: 8 * generations] += 1
    for name in BUFFERS:
        blocks, rows, width = of.shape(name)
        assert of.offset(name) % 64 == 0
        assert of.row_bytes(name) == width * of.dtype(name).itemsize == 4 * width
        for block in range(blocks):
            at = of.offset(name, block)
            taken[at : at + rows * of.row_bytes(name)] += 1
    assert taken.max() == 1
    used = 8 * generations + sum(np.prod(of.shape(name)) * 4 for name in BUFFERS)
    assert taken.sum() == used and of.nbytes % 64 == 0 and of.nbytes < used + 64 * (len(BUFFERS) + 2)


def test_sizes_are_those_of_the_documents():
    of = BufferLayout(hidden_size=2048, num_deepstack=3, block_tokens=128, num_blocks=8, num_deepstack_blocks=16)
    assert [of.row_bytes(name) for name in BUFFERS] == [8192, 4, 12, 64, 24576]
    assert of.shape("aux_datas") == (8, 1, 16) and of.shape("deepstack_embeddings") == (16, 128, 6144)
    assert [of.blocks_for(rows) for rows in (0, 1, 128, 129, 2040)] == [0, 1, 1, 2, 16]
    with pytest.raises(ValueError, match="embeddings"):
        of.offset("embeddings")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*TOKEN_BUFFERS, BUFFERS[4]])
def test_pieces_are_the_rows_in_order_and_unbroken(size: int, name: str):
    of = layout(size, blocks=8)
    for seed, blocks in enumerate([(0, 1, 2), (3, 1, 2, 6), (6, 5, 4, 3), (2, 3, 5, 6), (4,)]):
        for count in {1, size, len(blocks) * size, 1 + seed % (len(blocks) * size), len(blocks) * size - 1} - {0}:
            width = of.row_bytes(name)
            expected: list[int] = []
            for row in range(count):
                at = of.offset(name, blocks[row // size]) + row % size * width
                expected += range(at, at + width)
            pieces = list(of.pieces(name, blocks, count))
            assert [at + byte for at, length in pieces for byte in range(length)] == expected
            joints = itertools.pairwise(pieces)
            assert all(at + length != following for (at, length), (following, _) in joints), "could be one piece"


def test_blocks_in_a_row_are_one_piece():
    of = layout(4, blocks=8)
    assert len(list(of.pieces(BUFFERS[0], (2, 3, 4, 5), 15))) == 1
    assert len(list(of.pieces(BUFFERS[0], (2, 3, 5, 4), 15))) == 3
    assert list(of.pieces(BUFFERS[0], (2, 3), 0)) == []
    assert list(of.pieces(BUFFERS[3], (5,), 1)) == [(of.offset(BUFFERS[3], 5), 64)]


@pytest.mark.parametrize("ask", ["pieces", "rows", "checksum"])
def test_more_rows_than_the_blocks_hold_are_refused(ask: str):
    """Else the rest would be whatever the memory held before."""
    buffers = pool(layout(4))
    with pytest.raises(ValueError, match=r"9 rows.*2 blocks"):
        if ask == "pieces":
            list(buffers.layout.pieces(BUFFERS[0], (0, 1), 9))
        else:
            getattr(buffers, ask)(BUFFERS[0], (0, 1), 9)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_comes_back_bit_for_bit(size: int):
    of = layout(size)
    for count in {1, size, 2 * size, 3 * size - 1, 5 * size}:
        buffers = pool(of)
        embeds, ids, positions, deepstack = values(of, count, seed=count)
        tokens, extra = spread(of, count, seed=1), spread(of, count, seed=2)
        buffers.write_tokens(tokens, embeds, ids, positions)
        buffers.write_deepstack(extra, deepstack)
        assert same_bits(buffers.rows("input_embeddings", tokens, count), embeds)
        assert same_bits(buffers.rows("fill_ids", tokens, count), ids.astype(np.int32)[:, None])
        assert same_bits(buffers.rows("mrope_positions", tokens, count), positions.T.astype(np.int32))
        assert same_bits(buffers.rows("deepstack_embeddings", extra, count), deepstack)
        out = np.full((count, of.hidden_size), np.float32(7))
        buffers.copy_rows("input_embeddings", tokens, out)
        assert same_bits(out, embeds)


def test_writing_touches_its_rows_only():
    of = layout(4)
    buffers = pool(of)
    before = buffers.memory.copy()
    embeds, ids, positions, deepstack = values(of, 6)
    buffers.write_tokens((4, 1), embeds, ids, positions)
    buffers.write_deepstack((2, 0), deepstack)
    allowed = np.zeros(of.nbytes, bool)
    for name, blocks in [*((name, (4, 1)) for name in TOKEN_BUFFERS), (BUFFERS[4], (2, 0))]:
        for at, length in of.pieces(name, blocks, 6):
            allowed[at : at + length] = True
    changed = buffers.memory != before
    assert changed.any() and not (changed & ~allowed).any()


def test_views_are_of_the_memory():
    of = layout(4)
    memory = np.zeros(of.nbytes, np.uint8)
    buffers = MultimodalDataBuffers(of, memory)
    assert buffers.generations.shape == (of.num_blocks + of.num_deepstack_blocks,)
    for name in BUFFERS:
        view = getattr(buffers, name)
        assert view.shape == of.shape(name) and view.dtype == of.dtype(name)
        view[...] = 1
        assert np.count_nonzero(memory.view(np.int32)) == view.size, name
        view[...] = 0
    buffers.generations[-1] = 1
    assert memory.nonzero()[0].tolist() == [8 * (len(buffers.generations) - 1)]


@pytest.mark.parametrize("name", [*TOKEN_BUFFERS, BUFFERS[4]])
def test_checksum_is_of_the_rows_and_not_of_their_place(name: str):
    of, count = layout(4), 10

    def summed(blocks: Sequence[int], seed: int, rows: Sequence[np.ndarray]) -> tuple[MultimodalDataBuffers, int]:
        buffers = pool(of, seed)
        embeds, ids, positions, deepstack = rows
        buffers.write_tokens(blocks, embeds, ids, positions)
        buffers.write_deepstack(blocks, deepstack)
        return buffers, buffers.checksum(name, blocks, count)

    rows = values(of, count)
    buffers, expected = summed((0, 1, 2), 0, rows)
    assert summed((4, 0, 3), 1, rows)[1] == expected
    assert buffers.checksum(name, (0, 2, 1), count) != expected
    assert buffers.checksum(name, (0, 1, 2), count - 1) != expected
    for at, length in of.pieces(name, (0, 1, 2), count):
        for byte in range(at, at + length):
            buffers.memory[byte] ^= 1
            assert buffers.checksum(name, (0, 1, 2), count) != expected
            buffers.memory[byte] ^= 1
    assert buffers.checksum(name, (0, 1, 2), count) == expected


def test_a_model_without_deepstack():
    of = layout(deepstack=0)
    buffers = pool(of)
    assert buffers.deepstack_embeddings.shape == (0, 4, 0) and of.row_bytes(BUFFERS[4]) == 0
    buffers.write_deepstack((), np.zeros((0, 0), np.float32))
    assert list(of.pieces(BUFFERS[4], (), 0)) == []
    assert buffers.rows(BUFFERS[4], (), 0).shape == (0, 0)
    assert buffers.checksum(BUFFERS[4], (), 0) == buffers.checksum(BUFFERS[0], (), 0)


def test_a_stamp_says_everything():
    row = STAMP.to_row()
    assert row.shape == (16,) and row.dtype == np.int32
    assert tuple(row[:6].tolist()) == STAMP[:6]
    assert uuid.UUID(bytes=row[8:12].tobytes()).hex == STAMP.room
    assert uuid.UUID(bytes=row[12:].tobytes()).hex == STAMP.epoch


@pytest.mark.parametrize("field", Stamp._fields)
def test_stamps_that_differ_differ_as_rows(field: str):
    value = getattr(STAMP, field)
    other = value + 1 if isinstance(value, int) else uuid.UUID(int=99).hex
    assert not np.array_equal(STAMP._replace(**{field: other}).to_row(), STAMP.to_row())


def test_a_stamp_takes_the_largest_numbers_a_message_carries():
    most = (1 << 31) - 1
    stamp = Stamp(most, -most, most, most, most, most, STAMP.room, STAMP.epoch)
    assert tuple(stamp.to_row()[:6].tolist()) == stamp[:6]
