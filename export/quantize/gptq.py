"""GPTQ: round column by column, and let the columns that are left make up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, algorithm 1. The order of columns is kept, so that blocks stay blocks; the scale of a block is
searched for when its turn comes, on the weights as corrected so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepstitch.blockwise import WeightFormat
from deepstitch.export.quantize.rounding import Grid, Quantized, round_to_nearest, search_grid

__all__ = ["InputStatistics", "gptq"]

_DAMPING = 0.01  # of the mean diagonal; the paper's
_MAX_DAMPING = 1.0


class InputStatistics:
    """Sum of ``x^T x`` over the inputs ``x`` of a linear layer: what its weight's errors are weighed with.

    Attributes:
        gram: ``[K, K]`` float32.
        rows: inputs seen.
    """

    def __init__(self, width: int) -> None:
        self.gram = torch.zeros(width, width)
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        """Take more inputs ``[..., K]`` into account."""
        rows = inputs.flatten(0, -2)
        self.gram.addmm_(rows.T, rows)
        self.rows += len(rows)

    @property
    def importance(self) -> Tensor:
        """``[K]``, mean square of every input column; ones where nothing was seen."""
        if not self.rows:
            return torch.ones(len(self.gram))
        diagonal = self.gram.diagonal() / self.rows
        return diagonal + 1e-4 * diagonal.mean() + 1e-12


def gptq(weight: Tensor, stored: WeightFormat, statistics: InputStatistics) -> Quantized:
    """Quantize ``[N, K]`` float32 so that ``x @ weight.T`` changes least on the inputs seen.

    Where no input was seen (an expert that no token chose), every column counts alike.
    """
    factor = _inverse_factor(statistics)
    if factor is None:
        return round_to_nearest(weight, stored)
    importance = statistics.importance.view(-1, stored.block)
    weight = weight.clone()
    numbers, scales, zeros = [], [], []
    for start in range(0, weight.shape[1], stored.block):
        stop = start + stored.block
        block = weight[:, start:stop]
        grid = search_grid(block[:, None], stored, importance[start // stored.block])
        rounded, errors = _round_block(block, grid, factor[start:stop, start:stop], stored.largest)
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
        numbers.append(rounded)
        scales.append(grid.scale)
        zeros.append(grid.zero)
    zero_points = None if stored.symmetric else torch.cat(zeros, 1).to(torch.uint8)
    return Quantized(torch.stack(numbers, 1), torch.cat(scales, 1), zero_points, stored)


def _round_block(block: Tensor, grid: Grid, factor: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Round the columns of one block ``[N, block]`` in turn; returns them and their errors over the diagonal."""
    columns, scale, zero = block.T.contiguous(), grid.scale[:, 0], grid.zero[:, 0]
    numbers, errors = torch.empty_like(columns), torch.empty_like(columns)
    for index in range(len(columns)):
        column = columns[index]
        numbers[index] = (column / scale + zero).round_().clamp_(0, largest)
        errors[index] = (column - (numbers[index] - zero) * scale) / factor[index, index]
        columns[index + 1 :] -= factor[index, index + 1 :, None] * errors[index]
    return numbers.T.to(torch.uint8), errors.T


def _inverse_factor(statistics: InputStatistics) -> Tensor | None:
    """Upper Cholesky factor of the inverse of the damped Gram matrix; None where there is nothing to go by."""
    gram = statistics.gram
    mean = float(gram.diagonal().mean())
    if not statistics.rows or mean <= 0:
        return None
    damping = _DAMPING
    while damping <= _MAX_DAMPING:
        damped = gram + damping * mean * torch.eye(len(gram))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
    return None
