"""The vision encoder with its DeepStack taps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepstitch.models import ops
from deepstitch.models.config import VisionConfig

__all__ = ["VisionEncoder"]

_LAYER_NORM_EPS = 1e-6  # fixed in the published model code, not part of the config


class PatchEmbed(nn.Module):
    """A convolution whose stride equals its kernel, computed as the matrix product it is."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        # Conv3d holds the parameters so that names and shapes are the checkpoint's.
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map ``[P, C*Tp*ps*ps]`` to ``[P, hidden]``."""
        return F.linear(pixel_values, self.proj.weight.flatten(1), self.proj.bias)


class VisionAttention(nn.Module):
    """Bidirectional attention within an image or frame, with 2-D rotary embedding."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> Tensor:
        """Map ``[P, hidden]`` to ``[P, hidden]``; cos and sin are ``[1, P, head_dim/2]``."""
        query, key, value = self.qkv(x).split([x.shape[-1]] * 3, dim=-1)
        query, key = (ops.rotary_embedding(part[None], *cos_sin, self.num_heads).squeeze(0) for part in (query, key))
        return self.proj(ops.segment_attention(query, key, value, cu_seqlens, self.num_heads))


class VisionMLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[P, hidden]`` to ``[P, hidden]``."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=_LAYER_NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> Tensor:
        """Map ``[P, hidden]`` to ``[P, hidden]``."""
        x = x + self.attn(self.norm1(x), cos_sin, cu_seqlens)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Joins ``merge_size**2`` neighbouring patches into one token of the decoder's width.

    The DeepStack mergers normalise after joining, the main merger before. Both use exact (erf) GELU.
    """

    def __init__(self, config: VisionConfig, *, use_postshuffle_norm: bool) -> None:
        super().__init__()
        self.joined = config.hidden_size * config.spatial_merge_size**2
        self.use_postshuffle_norm = use_postshuffle_norm
        norm_width = self.joined if use_postshuffle_norm else config.hidden_size
        self.norm = nn.LayerNorm(norm_width, eps=_LAYER_NORM_EPS)
        self.linear_fc1 = nn.Linear(self.joined, self.joined)
        self.linear_fc2 = nn.Linear(self.joined, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[P, hidden]`` to ``[P / merge_size**2, out_hidden]``."""
        if self.use_postshuffle_norm:
            x = self.norm(x.reshape(-1, self.joined))
        else:
            x = self.norm(x).reshape(-1, self.joined)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionEncoder(nn.Module):
    """Patches of any number of images or clips, packed, to decoder tokens and their DeepStack rows."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, use_postshuffle_norm=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, use_postshuffle_norm=True) for _ in config.deepstack_visual_indexes
        )

    def forward(
        self,
        pixel_values: Tensor,
        position_indices: Tensor,
        position_weights: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        cu_seqlens: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            pixel_values: ``[P, C*Tp*ps*ps]`` float32, patches in merge-block order.
            position_indices: ``[4, P]`` int64, the four bilinear taps into the learned position table.
            position_weights: ``[4, P]`` float32, their weights.
            rotary_cos: ``[P, head_dim/2]`` float32.
            rotary_sin: ``[P, head_dim/2]`` float32.
            cu_seqlens: ``[N+1]`` int32, one segment per image or video frame.

        Returns:
            image_embeds ``[T, H]`` and deepstack_embeds ``[T, taps * H]``, ``T = P / merge_size**2``.
        """
        positions = (self.pos_embed(position_indices) * position_weights[..., None]).sum(0)
        hidden = self.patch_embed(pixel_values) + positions
        cos_sin = (rotary_cos[None], rotary_sin[None])
        taps = dict(zip(self.config.deepstack_visual_indexes, self.deepstack_merger_list, strict=True))
        deepstack: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, cos_sin, cu_seqlens)
            if index in taps:
                deepstack.append(taps[index](hidden))
        return self.merger(hidden), torch.cat(deepstack, dim=-1)
