"""Grid arithmetic of the vision encoder: everything that depends on how many patches an image has.

All rows are in merge-block order: the ``merge x merge`` patches that become one token are neighbours, blocks
run row by row. A clip repeats the rows of one frame.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepstitch.manifest import VisionFacts

__all__ = ["VisionInputs", "vision_inputs"]

_Float = npt.NDArray[np.float32]
_Int = npt.NDArray[np.int64]


class VisionInputs(NamedTuple):
    """Position inputs of the vision encoder, shapes as in ``VisionBatch``."""

    position_indices: _Int
    position_weights: _Float
    rotary_cos: _Float
    rotary_sin: _Float
    cu_seqlens: npt.NDArray[np.int32]


def vision_inputs(grid_thw: npt.ArrayLike, facts: VisionFacts) -> VisionInputs:
    """Compute the position inputs of a packed batch.

    Args:
        grid_thw: ``[N, 3]`` patches per image or clip along time, height, width; height and width are
            multiples of the merge size.
        facts: the vision section of the manifest.

    Returns:
        position_indices ``[4, P]`` int64, position_weights ``[4, P]`` float32 (bilinear, corners aligned),
        rotary_cos and rotary_sin ``[P, head_dim/2]`` float32 (height frequencies, then width frequencies),
        cu_seqlens ``[segments+1]`` int32 with one segment per image or time step of a clip.
    """
    grid = np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3)
    cos_table, sin_table = _rotary_tables(int(grid[:, 1:].max(initial=1)), facts)
    quarter = facts.head_dim // 4
    patches = grid.prod(axis=1)
    total = int(patches.sum())
    indices, weights = np.empty((4, total), np.int64), np.empty((4, total), np.float32)
    cos, sin = np.empty((total, 2 * quarter), np.float32), np.empty((total, 2 * quarter), np.float32)
    start = 0
    for (steps, height, width), count in zip(grid.tolist(), patches.tolist(), strict=True):
        rows = slice(start, start + count)
        row, column = _merge_block_order(height, width, facts.spatial_merge_size)
        _write_taps(indices[:, rows], weights[:, rows], row, column, height, width, steps, facts.num_grid_per_side)
        for out, table in ((cos[rows], cos_table), (sin[rows], sin_table)):
            frames = out.reshape(steps, height * width, 2 * quarter)
            frames[..., :quarter] = table[row]
            frames[..., quarter:] = table[column]
        start += count
    seqlens = np.repeat(grid[:, 1] * grid[:, 2], grid[:, 0])
    cu_seqlens = np.concatenate([[0], np.cumsum(seqlens)]).astype(np.int32)
    return VisionInputs(indices, weights, cos, sin, cu_seqlens)


def _merge_block_order(height: int, width: int, merge: int) -> tuple[_Int, _Int]:
    """Row and column of every patch of one frame, each ``[height * width]``."""
    blocks = (height // merge, merge, width // merge, merge)
    patch = np.arange(height * width, dtype=np.int64).reshape(blocks).swapaxes(1, 2).reshape(-1)
    return patch // width, patch % width


def _write_taps(
    indices: _Int, weights: _Float, row: _Int, column: _Int, height: int, width: int, steps: int, side: int
) -> None:
    """Fill ``[4, steps * height * width]``; tap ``2 * high_row + high_column``."""
    row_taps, row_weights = _axis_taps(height, side)
    column_taps, column_weights = _axis_taps(width, side)
    for tap in range(4):
        high_row, high_column = divmod(tap, 2)
        index = row_taps[high_row][row] * side + column_taps[high_column][column]
        weight = row_weights[high_row][row] * column_weights[high_column][column]
        indices[tap].reshape(steps, -1)[:] = index
        weights[tap].reshape(steps, -1)[:] = weight


def _axis_taps(size: int, side: int) -> tuple[_Int, _Float]:
    """Low and high tap and their weights for ``size`` positions along one axis, each ``[2, size]``."""
    position = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(position)
    fraction = position - low
    taps = np.minimum(low.astype(np.int64) + np.array([[0], [1]]), side - 1)
    return taps, np.stack([1 - fraction, 1 - np.abs(fraction - np.float32(1))])


def _rotary_tables(size: int, facts: VisionFacts) -> tuple[_Float, _Float]:
    """Cosine and sine of positions ``0 .. size-1``, each ``[size, head_dim/4]``."""
    half = facts.head_dim // 2
    exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    inverse = np.float32(1) / np.power(np.float32(facts.rope_theta), exponent)
    angle = np.arange(size, dtype=np.float32)[:, None] * inverse
    return np.cos(angle), np.sin(angle)
