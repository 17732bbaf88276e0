"""The operations a graph names: each in eager PyTorch, and as one node while ``torch.onnx.export`` traces.

Standard ONNX operators are emitted where opset 23 has one (``RMSNormalization``, ``RotaryEmbedding``). The
others live in the ``deepstitch`` domain; ``deepstitch.export.functions`` gives each of them an ONNX function
whose body is standard ONNX, and that body is the operator's definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CompactDeepStack",
    "cached_attention",
    "causal_attention",
    "deepstack_add",
    "gather_rows",
    "moe_experts",
    "mrope_cos_sin",
    "rms_norm",
    "rotary_embedding",
    "segment_attention",
    "select_experts",
    "swiglu",
]


def _exporting() -> bool:
    return torch.compiler.is_exporting()


def _node(op: str, inputs: tuple[Tensor, ...], attrs: dict[str, Any], like: Tensor, shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        op, inputs, attrs=attrs, dtype=like.dtype, shape=tuple(shape), version=1 if "::" in op else None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed in fp32 (ONNX RMSNormalization-23).

    Args:
        x: ``[..., n]``.
        weight: ``[n]``.
        eps: added to the mean square.
    """
    if _exporting():
        return _node("RMSNormalization", (x, weight), {"axis": -1, "epsilon": eps}, x, x.shape)
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def mrope_cos_sin(position_ids: Tensor, inv_freq: Tensor, mrope_section: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the interleaved multimodal rotary embedding of Qwen3-VL.

    Frequency pair ``j`` takes the height position if ``j % 3 == 1 and j < 3 * section[1]``, the width
    position if ``j % 3 == 2 and j < 3 * section[2]``, else the temporal one.

    Args:
        position_ids: ``[3, B, S]`` int64, rows t, h, w.
        inv_freq: ``[D/2]``.
        mrope_section: pairs per axis, ``(t, h, w)``.

    Returns:
        cos and sin, each ``[B, S, D/2]`` float32.
    """
    if _exporting():
        shape = (*position_ids.shape[1:], inv_freq.shape[0])
        cos, sin = torch.onnx.ops.symbolic_multi_out(
            "deepstitch::MRotaryCosSin",
            (position_ids, inv_freq),
            attrs={"mrope_section": list(mrope_section)},
            dtypes=(inv_freq.dtype, inv_freq.dtype),
            shapes=(shape, shape),
            version=1,
        )
        return cos, sin
    pair = torch.arange(inv_freq.shape[0], device=inv_freq.device)
    axis = torch.zeros_like(pair)
    for row in (1, 2):
        axis[(pair % 3 == row) & (pair < 3 * mrope_section[row])] = row
    angles = position_ids[axis].permute(1, 2, 0).float() * inv_freq
    return angles.cos(), angles.sin()


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate the two halves of every head (ONNX RotaryEmbedding-23 with one cos/sin row per token).

    Args:
        x: ``[B, S, num_heads * D]``.
        cos: ``[B, S, D/2]``.
        sin: ``[B, S, D/2]``.
        num_heads: heads in ``x``.
    """
    if _exporting():
        return _node("RotaryEmbedding", (x, cos, sin), {"num_heads": num_heads, "interleaved": 0}, x, x.shape)
    first, second = x.unflatten(-1, (num_heads, -1)).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)  # (B, heads, S, D)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    kv_num_heads: int,
    attention_mask: Tensor | None,
) -> Tensor:
    """Grouped-query attention over one full sequence, without a cache (training and reference).

    Args:
        query: ``[B, S, num_heads * D]``.
        key: ``[B, S, kv_num_heads * D]``.
        value: ``[B, S, kv_num_heads * D]``.
        num_heads: query heads.
        kv_num_heads: key/value heads.
        attention_mask: bool ``[B, 1, S, S]``, True where attention is allowed; None means causal.

    Returns:
        ``[B, S, num_heads * D]``.
    """
    attended = F.scaled_dot_product_attention(
        _heads(query, num_heads),
        _heads(key, kv_num_heads),
        _heads(value, kv_num_heads),
        attn_mask=attention_mask,
        is_causal=attention_mask is None,
        enable_gqa=num_heads != kv_num_heads,
    )
    return attended.transpose(1, 2).flatten(-2)


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    query_lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query attention over a static cache: write the new keys and values, then attend causally.

    Key ``j`` is visible to query ``s`` of row ``b`` iff ``j <= past_lengths[b] + s``. Output rows
    ``s >= query_lengths[b]`` (right padding) have no defined value.

    Args:
        query: ``[B, S, Hq * D]``.
        key: ``[B, S, Hkv * D]``.
        value: ``[B, S, Hkv * D]``.
        past_key: ``[B, Hkv, C, D]``, capacity ``C >= past_lengths[b] + S``.
        past_value: ``[B, Hkv, C, D]``.
        past_lengths: ``[B]`` int32, valid tokens already in the cache.
        query_lengths: ``[B]`` int32, valid new tokens.

    Returns:
        output ``[B, S, Hq * D]``, present_key and present_value ``[B, Hkv, C, D]``.
    """
    kv_num_heads, capacity, head_dim = past_key.shape[1:]
    num_heads = query.shape[-1] // head_dim
    if _exporting():
        output, new_key, new_value = torch.onnx.ops.symbolic_multi_out(
            "deepstitch::CachedAttention",
            (query, key, value, past_key, past_value, past_lengths, query_lengths),
            attrs={"num_heads": num_heads, "kv_num_heads": kv_num_heads, "scale": head_dim**-0.5},
            dtypes=(query.dtype, past_key.dtype, past_value.dtype),
            shapes=(query.shape, past_key.shape, past_value.shape),
            version=1,
        )
        return output, new_key, new_value
    new_tokens = query.shape[1]
    positions = past_lengths[:, None].long() + torch.arange(new_tokens, device=query.device)  # (B, S)
    slots = positions[:, None, :, None].expand(-1, kv_num_heads, -1, head_dim)
    present_key = past_key.scatter(2, slots, _heads(key, kv_num_heads))
    present_value = past_value.scatter(2, slots, _heads(value, kv_num_heads))
    visible = torch.arange(capacity, device=query.device) <= positions[:, None, :, None]
    attended = F.scaled_dot_product_attention(
        _heads(query, num_heads),
        present_key,
        present_value,
        attn_mask=visible,
        enable_gqa=num_heads != kv_num_heads,
    )
    return attended.transpose(1, 2).flatten(-2), present_key, present_value


def segment_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, num_heads: int) -> Tensor:
    """Bidirectional attention inside each segment of a packed sequence; segments do not see each other.

    Args:
        query: ``[P, num_heads * D]``; ``key`` and ``value`` alike.
        cu_seqlens: ``[N+1]`` int32, segment ``n`` is rows ``cu_seqlens[n] .. cu_seqlens[n+1]``.
        num_heads: attention heads.

    Returns:
        ``[P, num_heads * D]``.
    """
    if _exporting():
        scale = (query.shape[-1] // num_heads) ** -0.5
        return _node(
            "deepstitch::SegmentAttention",
            (query, key, value, cu_seqlens),
            {"num_heads": num_heads, "scale": scale},
            query,
            query.shape,
        )
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    if len(set(lengths)) == 1:  # equal segments attend as one batch
        batch = (len(lengths), -1)
        query, key, value = (x.unflatten(0, batch) for x in (query, key, value))
        return _whole_attention(query, key, value, num_heads).flatten(0, 1)
    pieces = zip(query[None].split(lengths, 1), key[None].split(lengths, 1), value[None].split(lengths, 1), strict=True)
    return torch.cat([_whole_attention(*piece, num_heads)[0] for piece in pieces])


def _whole_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Every query sees every key of its row; ``[N, L, num_heads * D]`` in and out."""
    query, key, value = (_heads(x, num_heads) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


def moe_experts(
    x: Tensor,
    router_logits: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k: int,
    norm_topk_prob: bool,
) -> Tensor:
    """Top-k softmax routing and the SwiGLU experts it selects.

    Args:
        x: ``[B, S, H]``.
        router_logits: ``[B, S, E]``.
        gate_up_proj: ``[E, H, 2I]``, gate columns first, then up columns.
        down_proj: ``[E, I, H]``.
        top_k: experts per token.
        norm_topk_prob: rescale the selected probabilities to sum to one.

    Returns:
        ``[B, S, H]``.
    """
    if _exporting():
        attrs = {"top_k": top_k, "norm_topk_prob": int(norm_topk_prob)}
        return _node("deepstitch::MoEExperts", (x, router_logits, gate_up_proj, down_proj), attrs, x, x.shape)
    tokens = x.flatten(0, -2)
    weights, experts = select_experts(router_logits.flatten(0, -2), top_k, norm_topk_prob)
    output = torch.zeros_like(tokens)
    for expert in experts.unique().tolist():
        token, rank = torch.where(experts == expert)
        result = swiglu(tokens[token] @ gate_up_proj[expert]) @ down_proj[expert]
        output = output.index_add(0, token, result * weights[token, rank, None].to(x.dtype))
    return output.view_as(x)


def select_experts(router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the experts each token goes to.

    Args:
        router_logits: ``[n, E]``.
        top_k: experts per token.
        norm_topk_prob: rescale the selected probabilities to sum to one.

    Returns:
        weights ``[n, top_k]`` float32 and expert numbers ``[n, top_k]``.
    """
    weights, experts = router_logits.softmax(-1, dtype=torch.float).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if norm_topk_prob else weights), experts


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[..., 2I]``, gate columns first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Pick positions of each batch row (ONNX GatherND with ``batch_dims=1``).

    Args:
        x: ``[B, S, H]``.
        rows: ``[B, L]`` int64 positions in S.

    Returns:
        ``[B, L, H]``.
    """
    if _exporting():
        shape = (*rows.shape, x.shape[-1])
        return _node("GatherND", (x, rows[..., None]), {"batch_dims": 1}, x, shape)
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


@dataclass(frozen=True, slots=True)
class CompactDeepStack:
    """The graph's form of ``input_deepstack_embeds``: distinct rows, and which row each token adds.

    Attributes:
        embeds: ``[R, taps * H]``; row 0 is all zeros.
        index: ``[B, S]`` int32 row numbers, 0 for text.
    """

    embeds: Tensor
    index: Tensor


def deepstack_add(hidden_states: Tensor, deepstack: Tensor | CompactDeepStack, layer_index: int) -> Tensor:
    """Add the DeepStack slice of one decoder layer (DeepStack, arXiv 2406.04334, as in Qwen3-VL).

    Args:
        hidden_states: ``[..., H]``.
        deepstack: dense ``[..., taps * H]`` with one row per token, or the compact form.
        layer_index: which slice of width H.
    """
    width = hidden_states.shape[-1]
    if isinstance(deepstack, CompactDeepStack):
        if _exporting():
            inputs = (hidden_states, deepstack.embeds, deepstack.index)
            attrs = {"layer": layer_index}
            return _node("deepstitch::DeepStackAdd", inputs, attrs, hidden_states, hidden_states.shape)
        deepstack = deepstack.embeds[deepstack.index.long()]
    return hidden_states + deepstack[..., layer_index * width : (layer_index + 1) * width]
