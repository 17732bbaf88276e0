"""A KV cache allocated at capacity, whose memory the graph writes directly.

Memory plan. Each decoder layer has two tensors ``[B, Hkv, C, D]``, capacity C >= any row's length. Rows lie
one after the other, so that a range of rows is a contiguous view and can be bound by itself. Where the graph
may write ``present`` over ``past`` there is one set of buffers; elsewhere two, which swap after each call. The buffers
lie where the engine wants them: on the host, or on its device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepstitch.errors import BundleError
from deepstitch.manifest import Graph
from deepstitch.runtime.engine.memory import HOST, Memory, Tensor

__all__ = ["CacheTensor", "KVCache", "cache_tensors"]

CAPACITY_STEP = 64
_PAST, _PRESENT = "past_key_values.", "present."

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTensor:
    """One key or value tensor ``[B, heads, C, width]``: its graph input and output, and its fixed sizes."""

    past: str
    present: str
    heads: int
    width: int
    dtype: str


def cache_tensors(decoder: Graph) -> tuple[CacheTensor, ...]:
    """The cache tensors a decoder graph declares.

    Raises:
        BundleError: a past tensor without a present one, or with dynamic heads or width.
    """
    outputs = {spec.name for spec in decoder.outputs}
    tensors = []
    for spec in decoder.inputs:
        if not spec.name.startswith(_PAST):
            continue
        present = _PRESENT + spec.name.removeprefix(_PAST)
        _, heads, _, width = spec.shape if len(spec.shape) == 4 else ("",) * 4
        if present not in outputs or not isinstance(heads, int) or not isinstance(width, int):
            raise BundleError(
                f"{decoder.file}: cache input '{spec.name}' {list(spec.shape)} needs an output '{present}' "
                "and a shape [batch, heads, capacity, width] of fixed heads and width; export again"
            )
        tensors.append(CacheTensor(past=spec.name, present=present, heads=heads, width=width, dtype=spec.dtype))
    return tuple(tensors)


class KVCache:
    """Buffers for ``rows`` sequences.

    Attributes:
        rows: sequences held.
        capacity: tokens each row has room for.
        current: which set of buffers holds the past: always 0 in place, else 0 or 1.
        version: changes whenever memory or row count changed, so that bindings have to be made anew.
    """

    def __init__(
        self,
        tensors: Sequence[CacheTensor],
        *,
        rows: int,
        capacity: int,
        in_place: bool,
        memory: Memory = HOST,
        limit: int | None = None,
    ) -> None:
        """Allocate.

        Args:
            tensors: of the graph.
            rows: sequences to hold.
            capacity: tokens per row to begin with.
            in_place: one set of buffers suffices.
            memory: where they lie.
            limit: the largest capacity the engine takes; None for any.
        """
        self.rows = rows
        self._memory = memory
        self._limit = limit
        self.capacity = self._round_up(capacity)
        self.current = 0
        self.version = 0
        self._tensors = tuple(tensors)
        self._sets = [[self._allocate_one(each) for each in tensors] for _ in range(1 if in_place else 2)]

    @property
    def nbytes(self) -> int:
        """Bytes reserved; memory never written to is not backed by pages yet."""
        return sum(array.nbytes for buffers in self._sets for array in buffers)

    def bindings(self, rows: range) -> tuple[tuple[Tensors, Tensors], ...]:
        """``(past, present)`` arrays for ``rows``, one pair for each value of :attr:`current`."""
        views = [[array[rows.start : rows.stop] for array in buffers] for buffers in self._sets]
        pasts = [dict(zip((each.past for each in self._tensors), view, strict=True)) for view in views]
        presents = [dict(zip((each.present for each in self._tensors), view, strict=True)) for view in views]
        return tuple(zip(pasts, presents[1:] + presents[:1], strict=True))

    def reserve(self, capacity: int, lengths: npt.NDArray[np.int32]) -> None:
        """Make room for ``capacity`` tokens per row, at least doubling; copies the valid ``lengths`` once."""
        if capacity <= self.capacity:
            return
        doubled = 2 * self.capacity if self._limit is None else min(2 * self.capacity, self._limit)
        self.capacity = self._round_up(max(capacity, doubled))
        self.version += 1
        kept = int(lengths[: self.rows].max(initial=0))
        for index, buffers in enumerate(self._sets):
            for place, tensor in enumerate(self._tensors):  # one by one: both sizes of all of them might not fit
                source, buffers[place] = buffers[place], self._allocate_one(tensor)
                if index == self.current:
                    self._memory.copy_tokens(buffers[place], source[: self.rows], 0, kept)
                del source

    def commit(self, rows: range, starts: npt.NDArray[np.int32], width: int) -> None:
        """Tell the cache that a call wrote ``width`` tokens to each of ``rows``, from ``starts`` on."""
        if len(self._sets) == 1:
            return
        if len(rows) == self.rows:
            self.current = 1 - self.current
            return
        # some rows only: the others still live in the past buffers, so the new tokens move there
        past, present = self._sets[self.current], self._sets[1 - self.current]
        for row, start in zip(rows, starts, strict=True):
            for target, source in zip(past, present, strict=True):
                self._memory.copy_tokens(target[row : row + 1], source[row : row + 1], start, start + width)

    def drop(self, row: int, lengths: npt.NDArray[np.int32]) -> None:
        """Remove a row; the last row takes its place. ``lengths`` are those before the removal."""
        last = self.rows - 1
        kept = int(lengths[last])
        if row != last:
            for tensor in self._sets[self.current]:
                self._memory.copy_tokens(tensor[row : row + 1], tensor[last : last + 1], 0, kept)
        self.rows = last
        self.version += 1

    def _allocate_one(self, tensor: CacheTensor) -> Tensor:
        """Zeros rather than garbage: a masked key of NaN would still poison the weighted sum."""
        return self._memory.zeros((self.rows, tensor.heads, self.capacity, tensor.width), tensor.dtype)

    def _round_up(self, count: int) -> int:
        rounded = max(1, math.ceil(count / CAPACITY_STEP)) * CAPACITY_STEP
        return rounded if self._limit is None else max(count, min(rounded, self._limit))
