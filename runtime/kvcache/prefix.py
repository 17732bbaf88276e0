"""How much of a new prompt is in the cache already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["CachedTokens", "common_prefix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedTokens:
    """Everything that decides the keys and values of a row.

    Attributes:
        input_ids: ``(n,)`` int64.
        position_ids: ``(3, n)`` int64.
        item_starts: ``(N,)`` first visual token of each image and clip, some of which may lie beyond ``n``.
        item_keys: N content keys.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    item_starts: npt.NDArray[np.int64]
    item_keys: tuple[str, ...]


def common_prefix(cached: CachedTokens, prompt: CachedTokens, item_ends: npt.NDArray[np.int64]) -> int:
    """Number of leading tokens of ``prompt`` whose keys and values equal those of ``cached``.

    1. Ids and positions must be equal, token by token.
    2. An image or clip counts only with equal content, and only whole: its rows are merged in one piece.
    3. At least the last token of the prompt is left over: its logits are needed.

    Args:
        cached: what the cache holds.
        prompt: a whole prompt.
        item_ends: ``(N,)`` one past the last visual token of each item of ``prompt``.
    """
    limit = max(0, min(len(cached.input_ids), len(prompt.input_ids) - 1))
    same = cached.input_ids[:limit] == prompt.input_ids[:limit]
    same &= (cached.position_ids[:, :limit] == prompt.position_ids[:, :limit]).all(axis=0)
    length = limit if same.all() else int(same.argmin())
    for item, (start, end) in enumerate(zip(prompt.item_starts, item_ends, strict=True)):
        if start >= length:
            break
        known = cached.item_keys[item] if item < len(cached.item_keys) else None
        if end > length or known != prompt.item_keys[item]:
            return int(start)
    return length
