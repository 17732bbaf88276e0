"""Who owns which block of a pool, and how often a block has changed hands."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """Blocks ``0…total-1`` and their owners.

    A block's generation grows when it is taken and when it is given back, so it is odd while owned. Whoever read a
    block's memory and then finds the generation it was promised has read what its owner wrote.

    Attributes:
        generations: ``(total,)`` uint64.
    """

    def __init__(self, generations: npt.NDArray[np.uint64]) -> None:
        """``generations`` is memory of the caller's, zeros at the beginning; others may be reading it."""
        self.generations = generations
        self._free = list(range(len(generations)))[::-1]
        self._owned: dict[str, list[int]] = {}

    @property
    def total(self) -> int:
        """Blocks there are."""
        return len(self.generations)

    @property
    def free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def owners(self) -> dict[str, tuple[int, ...]]:
        """Blocks by owner."""
        return {owner: tuple(blocks) for owner, blocks in self._owned.items()}

    def allocate(self, owner: str, count: int) -> tuple[int, ...] | None:
        """Give ``count`` more blocks to ``owner``, or none where there are not enough."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        if taken:
            self.generations[taken] += np.uint64(1)
            self._owned.setdefault(owner, []).extend(taken)
        return tuple(taken)

    def release(self, owner: str) -> int:
        """Take back all that ``owner`` has, nothing included; returns how many blocks that were."""
        blocks = self._owned.pop(owner, [])
        if blocks:
            self.generations[blocks] += np.uint64(1)
            self._free.extend(reversed(blocks))
        return len(blocks)
