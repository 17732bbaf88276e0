"""Eager operators with cheaper backward passes, for training; same results as `deepstitch.models.ops`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from deepstitch.models import ops
from deepstitch.models.vision import PatchEmbed


def moe_experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k: int,
    norm_topk_prob: bool,
) -> Tensor:
    """Like `ops.moe_experts`, with tokens sorted by expert once instead of selected once per expert."""
    tokens = x.flatten(0, -2)
    weights, experts = router_logits.flatten(0, -2).softmax(-1).topk(top_k, dim=-1)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    order = experts.flatten().argsort()
    counts = experts.flatten().bincount(minlength=gate_up_proj.shape[0]).tolist()
    token = order // top_k
    chosen = tokens.index_select(0, token).split(counts)
    hidden = [part @ weight for part, weight in zip(chosen, gate_up_proj.unbind(), strict=True)]
    gate, up = torch.cat(hidden).chunk(2, dim=-1)
    active = (F.silu(gate) * up).split(counts)
    results = torch.cat([part @ weight for part, weight in zip(active, down_proj.unbind(), strict=True)])
    results = results * weights.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(tokens).index_add(0, token, results).view_as(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
        scale = torch.rsqrt(torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        width = x.shape[-1]
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        mean = torch.linalg.vecdot(grad, normed).div_(width).unsqueeze(-1)
        return normed.mul_(mean).neg_().add_(grad).mul_(scale), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like `ops.rms_norm` for fp32, with a hand-written backward pass."""
    return _RMSNorm.apply(x, weight, eps)


def embed_still_patches(self: PatchEmbed, pixel_values: Tensor) -> Tensor:
    """Like `PatchEmbed.forward` for pictures: both frames are equal, so their kernels are summed first."""
    kernel = self.proj.weight.sum(2)  # (hidden, C, ps, ps)
    frame = pixel_values.view(len(pixel_values), kernel.shape[1], 2, -1)[:, :, 0]
    return F.linear(frame.flatten(1), kernel.flatten(1), self.proj.bias)


@contextmanager
def enabled() -> Iterator[None]:
    """Swaps the operators in for the duration of the block."""
    with (
        patch.object(ops, "moe_experts", moe_experts),
        patch.object(ops, "rms_norm", rms_norm),
        patch.object(PatchEmbed, "forward", embed_still_patches),
    ):
        yield
