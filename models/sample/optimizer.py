"""Muon for the weight matrices, AdamW for everything else.

Muon (K. Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, found with
a few Newton-Schulz steps. Matrices of one shape are processed as one batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_ROW_BLOCK = 96
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 4) -> Tensor:
    """Returns approximately the orthogonal factor of each matrix, same shape (N, rows, columns)."""
    a, b, c = _COEFFICIENTS
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon over matrices, 3-D stacks of matrices, and convolution kernels flattened to matrices.

    The update is scaled to a root mean square of 0.2, so that learning rates compare with AdamW's.

    Args:
        params: Parameters of two or more dimensions.
        lr: Learning rate.
        momentum: Nesterov momentum.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 3e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Applies one update; `closure` is not supported."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
        stacked = torch.stack(directions).reshape(-1, *_block_shape(parameters[0]))
        scale = 0.2 * max(stacked.shape[-2:]) ** 0.5
        updates = orthogonalize(stacked).reshape(len(parameters), *parameters[0].shape)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * scale)


def _block_shape(parameter: nn.Parameter) -> tuple[int, int]:
    """Returns the shape of the matrices to orthogonalize; large ones are cut into row blocks."""
    rows, columns = (parameter.shape[0], parameter[0].numel()) if parameter.dim() != 3 else parameter.shape[1:]
    return (_ROW_BLOCK, columns) if rows > _ROW_BLOCK and rows % _ROW_BLOCK == 0 and columns > 128 else (rows, columns)


def build_optimizers(model: nn.Module, others: nn.Module, rank: int, size: int) -> list[torch.optim.Optimizer]:
    """Returns Muon for the model's matrices and AdamW for embeddings, router, norms, biases and `others`.

    With several processes each updates its own part: rank 0 has AdamW, and the matrices are dealt out by
    arithmetic.
    """
    muon: list[nn.Parameter] = []
    adam = list(others.parameters())
    for name, parameter in model.named_parameters():
        small = any(part in name for part in ("embed", "lm_head", "mlp.gate.", "norm", "bias"))
        (adam if small or parameter.dim() < 2 else muon).append(parameter)
    load = [0.0] * size
    mine: list[nn.Parameter] = []
    for parameter in sorted(muon, key=_arithmetic, reverse=True):
        receiver = load.index(min(load))
        load[receiver] += _arithmetic(parameter)
        if receiver == rank:
            mine.append(parameter)
    optimizers: list[torch.optim.Optimizer] = [Muon(mine)]
    if rank == 0:
        optimizers.append(torch.optim.AdamW(adam, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers


def _arithmetic(parameter: nn.Parameter) -> float:
    return float(parameter.numel() * min(_block_shape(parameter)))
