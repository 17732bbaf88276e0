"""From 8-bit RGB frames to ``pixel_values``: rescale, normalise, cut into patches in merge-block order.

A frame has only 256 values per channel, so rescaling and normalising is one table look-up: exact, and one
pass over the output. Work goes one row of blocks at a time, so temporaries stay in the cache
whatever the picture's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PatchShape", "normalisation_table", "write_patches"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchShape:
    """Sizes of one patch.

    Attributes:
        size: pixels along one side.
        temporal: frames joined into one patch.
        merge: patches per token along one side.
        channels: colour channels.
    """

    size: int
    temporal: int
    merge: int
    channels: int = 3

    @property
    def width(self) -> int:
        """Values in one flattened patch."""
        return self.channels * self.temporal * self.size**2

    @property
    def factor(self) -> int:
        """Pixels of one token along one side."""
        return self.size * self.merge


def normalisation_table(rescale_factor: float, mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """``[C, 256]`` float32: the normalised value of every 8-bit value of every channel.

    Rounds where HF does: the product in double precision, the rest in single.
    """
    values = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    shift, scale = np.array(mean, np.float32), np.array(std, np.float32)
    return (values - shift[:, None]) / scale[:, None]


def write_patches(
    frames: Sequence[npt.NDArray[np.uint8]],
    table: npt.NDArray[np.float32],
    shape: PatchShape,
    out: npt.NDArray[np.float32],
) -> None:
    """Fill the patches of one time step.

    Args:
        frames: ``shape.temporal`` arrays ``[H, W, C]`` uint8; or a single one, which stands for all of them.
        table: from :func:`normalisation_table`.
        shape: sizes of a patch.
        out: ``[H/size * W/size, C*Tp*size*size]``, contiguous.
    """
    height, width, channels = frames[0].shape
    block_rows, block_columns = height // shape.factor, width // shape.factor
    per_row = block_columns * shape.merge**2
    target = out.reshape(block_rows, per_row, channels, shape.temporal, shape.size**2)
    # Reused buffers and mode="clip" (no index can overflow) make the look-up several times faster.
    entries = np.empty((per_row, channels, 1, shape.size**2), np.intp)
    values = np.empty(entries.shape, np.float32)
    channel_start = 256 * np.arange(channels).reshape(1, channels, 1, 1)
    side = (shape.merge, shape.size)
    for step, frame in enumerate(frames):
        blocks = frame.reshape(block_rows, *side, block_columns, *side, channels)
        steps = slice(None) if len(frames) == 1 else slice(step, step + 1)
        for index in range(block_rows):
            # (block column, patch row, patch column, channel, y, x)
            patches = blocks[index].transpose(2, 0, 3, 5, 1, 4).reshape(entries.shape)
            np.add(patches, channel_start, out=entries)
            np.take(table.reshape(-1), entries, out=values, mode="clip")
            target[index, :, :, steps] = values
