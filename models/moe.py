"""The two feed-forward blocks of a decoder layer: dense SwiGLU, and routed SwiGLU experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepstitch.models import ops
from deepstitch.models.config import TextConfig

__all__ = ["Experts", "Qwen3MLP", "Qwen3MoeSparseMoeBlock"]


class Qwen3MLP(nn.Module):
    """Dense SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, H]`` to ``[B, S, H]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All experts of a layer as two tensors, in the layout of the published checkpoints."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, hidden, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))


class Qwen3MoeSparseMoeBlock(nn.Module):
    """Router and experts."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, H]`` to ``[B, S, H]``."""
        return ops.moe_experts(
            x,
            self.gate(x),
            self.experts.gate_up_proj,
            self.experts.down_proj,
            self.top_k,
            self.norm_topk_prob,
        )
