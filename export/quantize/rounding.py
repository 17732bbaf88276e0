"""From float blocks to integers: the scale of each block, and rounding to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepstitch.blockwise import WeightFormat, pack

__all__ = ["Grid", "Quantized", "nearest", "round_to_nearest", "search_grid", "whole_range"]

_TINY = 1e-30
_SHARES = (0.65, 0.7, 0.75, 0.8, 0.84, 0.88, 0.92, 0.96, 1.04)  # of the range that the grid covers, next to all of it
_PIECE = 1 << 18  # weights searched at a time, so that a piece and its temporaries stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the representable numbers of each block lie: ``(q - zero) * scale``.

    Attributes:
        scale: ``[..., blocks]`` float32; may be negative.
        zero: ``[..., blocks]`` float32 whole numbers.
    """

    scale: Tensor
    zero: Tensor

    def round(self, blocks: Tensor, largest: int) -> Tensor:
        """Nearest stored numbers of ``[..., blocks, block]``, as float32."""
        return (blocks / self.scale[..., None] + self.zero[..., None]).round_().clamp_(0, largest)

    def values(self, numbers: Tensor) -> Tensor:
        """What stored numbers mean."""
        return (numbers - self.zero[..., None]) * self.scale[..., None]


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized matrix ``[N, K]``.

    Attributes:
        numbers: ``[N, K/block, block]`` uint8, not packed.
        scales: ``[N, K/block]`` float32.
        zero_points: ``[N, K/block]`` uint8, None where symmetric.
        stored: the format.
    """

    numbers: Tensor
    scales: Tensor
    zero_points: Tensor | None
    stored: WeightFormat

    def dequantized(self) -> Tensor:
        """``[N, K]`` float32."""
        zero: Tensor | int = self.stored.middle if self.zero_points is None else self.zero_points[..., None].float()
        return ((self.numbers.float() - zero) * self.scales[..., None]).flatten(-2)

    def arrays(self) -> dict[str, object]:
        """Packed numpy arrays by suffix of the parameter's name."""
        arrays: dict[str, object] = {
            "": pack(self.numbers.numpy(), self.stored.bits),
            ".scales": self.scales.numpy(),
        }
        if self.zero_points is not None:
            arrays[".zero_points"] = pack(self.zero_points.numpy(), self.stored.bits)
        return arrays


def whole_range(blocks: Tensor, stored: WeightFormat) -> Grid:
    """A grid that covers all values of each block, and zero.

    Symmetric: the value of the largest magnitude lies on the end that has one step more (``q = 0``), so the scale has
    the opposite sign of that value.
    """
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    if stored.symmetric:
        scale = _not_zero(torch.where(high > -low, high, low) / -stored.middle)
        return Grid(scale, torch.full_like(scale, float(stored.middle)))
    scale = _not_zero((high - low) / stored.largest)
    return Grid(scale, (-low / scale).round().clamp(0, stored.largest))


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < _TINY, torch.ones_like(scale), scale)


def search_grid(blocks: Tensor, stored: WeightFormat, importance: Tensor | None = None) -> Grid:
    """The grid with the least squared error of each block.

    1. Try grids that cover 65 % to 104 % of the range.
    2. With the integers of the best one fixed, the scale of least error has a closed form; take it.

    Args:
        blocks: ``[..., blocks, block]`` float32.
        stored: the format.
        importance: ``[blocks, block]`` weight of each column's error, e.g. the mean square of its input; None: equal.
    """
    best = whole = whole_range(blocks, stored)
    least = _error(blocks, best, stored, importance)
    for share in _SHARES:
        grid = Grid(whole.scale * share, whole.zero)
        error = _error(blocks, grid, stored, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(torch.where(better, grid.scale, best.scale), whole.zero)
    return _refit(blocks, best, stored, importance, least)


def _error(blocks: Tensor, grid: Grid, stored: WeightFormat, importance: Tensor | None) -> Tensor:
    steps = torch.addcmul(grid.zero[..., None], blocks, grid.scale.reciprocal()[..., None])
    missed = steps.round().clamp_(0, stored.largest).sub_(steps)
    weighted = missed if importance is None else missed * importance
    return (missed * weighted).sum(-1) * grid.scale.square()


def _refit(blocks: Tensor, grid: Grid, stored: WeightFormat, importance: Tensor | None, least: Tensor) -> Grid:
    steps = grid.round(blocks, stored.largest) - grid.zero[..., None]
    weighted = steps if importance is None else steps * importance
    power = (weighted * steps).sum(-1)
    scale = torch.where(power > 0, (weighted * blocks).sum(-1) / power.clamp(min=_TINY), grid.scale)
    refitted = Grid(_not_zero(scale), grid.zero)
    better = _error(blocks, refitted, stored, importance) < least
    return Grid(torch.where(better, refitted.scale, grid.scale), grid.zero)


def nearest(blocks: Tensor, grid: Grid, stored: WeightFormat) -> Quantized:
    """Round ``[N, K/block, block]`` to a grid."""
    zero_points = None if stored.symmetric else grid.zero.to(torch.uint8)
    return Quantized(grid.round(blocks, stored.largest).to(torch.uint8), grid.scale, zero_points, stored)


def round_to_nearest(weight: Tensor, stored: WeightFormat, *, search: bool = True) -> Quantized:
    """Quantize a matrix ``[N, K]`` row by row, without regard to how errors of different columns add up.

    Args:
        weight: float32.
        stored: the format; ``block`` divides K.
        search: look for the best scale of each block; else it covers the whole range. Eight bits need no search.
    """
    blocks = weight.unflatten(-1, (-1, stored.block))
    if not search or stored.bits == 8:
        return nearest(blocks, whole_range(blocks, stored), stored)
    rows = max(1, _PIECE // weight.shape[-1])
    parts = [nearest(part, search_grid(part, stored), stored) for part in blocks.split(rows)]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return Quantized(
        torch.cat([part.numbers for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zero_points) if zero_points else None,
        stored,
    )
