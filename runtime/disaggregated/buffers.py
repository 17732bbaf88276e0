"""The five buffers of a pool: what a prompt looks like while it moves from the encode to the language process.

After ``MultimodalDataBuffers`` of the disaggregated encode / language design this follows: ``input_embeddings``,
``fill_ids``, ``mrope_positions``, ``aux_datas``, ``deepstack_embeddings``, one row per token, in blocks of
``block_tokens`` rows. Two differences: values stay float32, so that the result is bit for bit that of one process; and
DeepStack has blocks of its own, for the rows of visual tokens only, at full length.

A pool is one piece of memory: the generation of every block, then the buffers in that order, each from a multiple of 64
bytes on.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.calls import Floats, Ints

__all__ = ["BUFFERS", "BufferLayout", "MultimodalDataBuffers", "Stamp"]

BUFFERS = ("input_embeddings", "fill_ids", "mrope_positions", "aux_datas", "deepstack_embeddings")
TOKEN_BUFFERS = BUFFERS[:3]
AUX_WIDTH = 16
_ALIGNMENT = 64
_STAMP_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferLayout:
    """Sizes of a pool.

    Attributes:
        block_tokens: rows per block.
        num_blocks: blocks of token rows.
        num_deepstack_blocks: blocks of DeepStack rows; 0 for a model without.
    """

    hidden_size: int
    num_deepstack: int
    block_tokens: int
    num_blocks: int
    num_deepstack_blocks: int

    def blocks_for(self, rows: int) -> int:
        """Blocks that ``rows`` rows take."""
        return -(-rows // self.block_tokens)

    def dtype(self, buffer: str) -> np.dtype[np.generic]:
        """Of one buffer's values."""
        return np.dtype(np.float32 if buffer in (BUFFERS[0], BUFFERS[4]) else np.int32)

    def width(self, buffer: str) -> int:
        """Values per row."""
        widths = (self.hidden_size, 1, 3, AUX_WIDTH, self.num_deepstack * self.hidden_size)
        return widths[BUFFERS.index(buffer)]

    def shape(self, buffer: str) -> tuple[int, int, int]:
        """Blocks, rows per block, values per row; ``aux_datas`` has one row per block."""
        blocks = self.num_deepstack_blocks if buffer == BUFFERS[4] else self.num_blocks
        return blocks, 1 if buffer == BUFFERS[3] else self.block_tokens, self.width(buffer)

    def row_bytes(self, buffer: str) -> int:
        """Bytes per row."""
        return self.width(buffer) * self.dtype(buffer).itemsize

    def offset(self, buffer: str, block: int = 0) -> int:
        """Where a block of a buffer begins in the pool."""
        place = _aligned(8 * (self.num_blocks + self.num_deepstack_blocks))
        for name in BUFFERS:
            blocks, rows, _ = self.shape(name)
            if name == buffer:
                return place + block * rows * self.row_bytes(name)
            place = _aligned(place + blocks * rows * self.row_bytes(name))
        raise ValueError(buffer)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return _aligned(self.offset(BUFFERS[4], self.num_deepstack_blocks))

    def pieces(self, buffer: str, blocks: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
        """Where the first ``rows`` rows in ``blocks`` lie: offset and bytes of each unbroken stretch.

        Raises:
            ValueError: the blocks do not hold that many.
        """
        height, width = self.shape(buffer)[1], self.row_bytes(buffer)
        if rows > len(blocks) * height:
            raise ValueError(f"{rows} rows of {buffer} do not lie in {len(blocks)} blocks of {height}")
        begin = end = -1
        for place, block in enumerate(blocks):
            count = min(height, rows - place * height)
            if count <= 0:
                break
            start = self.offset(buffer, block)
            if start != end:
                if end > begin:
                    yield begin, end - begin
                begin = start
            end = start + count * width
        if end > begin:
            yield begin, end - begin


class Stamp(NamedTuple):
    """What ``aux_datas`` says about a transfer; as int32 in the first row of its first block.

    Attributes:
        total_tokens: of the whole prompt.
        rope_delta: position of the next token minus their number.
        deepstack_rows: of the whole prompt.
        start: first token of this transfer.
        tokens: of this transfer.
        attempt: of the room.
        room: 32 hex digits.
        epoch: of the encode process, likewise.
    """

    total_tokens: int
    rope_delta: int
    deepstack_rows: int
    start: int
    tokens: int
    attempt: int
    room: str
    epoch: str

    def to_row(self) -> npt.NDArray[np.int32]:
        """``(16,)`` int32."""
        names = [np.frombuffer(uuid.UUID(each).bytes, np.int32) for each in (self.room, self.epoch)]
        return np.concatenate([np.array([*self[:6], 0, _STAMP_VERSION], np.int32), *names])


class MultimodalDataBuffers:
    """A pool's memory as arrays.

    Attributes:
        layout: sizes.
        memory: all of it, ``(nbytes,)`` uint8.
        generations: one per token block, then one per DeepStack block; uint64.
        input_embeddings: ``(num_blocks, block_tokens, H)`` float32.
        fill_ids: ``(num_blocks, block_tokens, 1)`` int32.
        mrope_positions: ``(num_blocks, block_tokens, 3)`` int32.
        aux_datas: ``(num_blocks, 1, 16)`` int32, see :class:`Stamp`.
        deepstack_embeddings: ``(num_deepstack_blocks, block_tokens, num_deepstack*H)`` float32.
    """

    def __init__(self, layout: BufferLayout, memory: npt.NDArray[np.uint8]) -> None:
        self.layout = layout
        self.memory = memory
        self.generations = memory[: 8 * (layout.num_blocks + layout.num_deepstack_blocks)].view(np.uint64)
        views = {}
        for name in BUFFERS:
            shape, start = layout.shape(name), layout.offset(name)
            end = start + shape[0] * shape[1] * layout.row_bytes(name)
            views[name] = memory[start:end].view(layout.dtype(name)).reshape(shape)
        self.input_embeddings = views["input_embeddings"]
        self.fill_ids = views["fill_ids"]
        self.mrope_positions = views["mrope_positions"]
        self.aux_datas = views["aux_datas"]
        self.deepstack_embeddings = views["deepstack_embeddings"]

    def write_tokens(self, blocks: Sequence[int], embeds: Floats, ids: Ints, position_ids: Ints) -> None:
        """Put rows into ``blocks``: ``(n, H)``, ``(n,)`` and ``(3, n)``."""
        size = self.layout.block_tokens
        for place, block in enumerate(blocks):
            rows = slice(place * size, (place + 1) * size)
            count = len(ids[rows])
            self.input_embeddings[block, :count] = embeds[rows]
            self.fill_ids[block, :count, 0] = ids[rows]
            self.mrope_positions[block, :count] = position_ids[:, rows].T

    def write_deepstack(self, blocks: Sequence[int], rows: Floats) -> None:
        """Put ``(R, num_deepstack*H)`` into ``blocks``."""
        size = self.layout.block_tokens
        for place, block in enumerate(blocks):
            part = rows[place * size : (place + 1) * size]
            self.deepstack_embeddings[block, : len(part)] = part

    def rows(self, buffer: str, blocks: Sequence[int], count: int) -> npt.NDArray[np.generic]:
        """A copy of the first ``count`` rows in ``blocks``: ``(count, width)``."""
        out = np.empty((count, self.layout.width(buffer)), self.layout.dtype(buffer))
        self.copy_rows(buffer, blocks, out)
        return out

    def copy_rows(self, buffer: str, blocks: Sequence[int], out: npt.NDArray[np.generic]) -> None:
        """Copy the first rows in ``blocks`` into ``out``, ``(count, width)`` and contiguous."""
        target, done = out.reshape(-1).view(np.uint8), 0
        for at, size in self.layout.pieces(buffer, blocks, len(out)):
            target[done : done + size] = self.memory[at : at + size]
            done += size

    def checksum(self, buffer: str, blocks: Sequence[int], count: int) -> int:
        """XXH3-64 of the first ``count`` rows in ``blocks``, in order."""
        import xxhash

        digest = xxhash.xxh3_64()
        for at, size in self.layout.pieces(buffer, blocks, count):
            digest.update(self.memory[at : at + size].data)
        return digest.intdigest()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
