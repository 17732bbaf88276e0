"""The language decoder: one forward in the template, and the DeepStack hook that two classes share.

``Qwen2MoeModel`` owns the only layer loop. After each layer it calls ``_process_layer_output``; the DeepStack
classes override that hook and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepstitch.models import ops
from deepstitch.models.config import ModelConfig, TextConfig
from deepstitch.models.moe import Qwen3MLP, Qwen3MoeSparseMoeBlock

__all__ = [
    "KVCache",
    "Qwen2MoeModel",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeForCausalLMWithDeepStack",
    "Qwen3MoeLLMModel",
    "Qwen3MoeModel",
    "Qwen3MoeModelWithDeepStack",
    "RMSNorm",
]


class KVCache:
    """A static key/value cache, one pair of tensors per layer.

    Attributes:
        keys: per layer ``[B, Hkv, C, D]``; replaced by the updated tensors as layers run.
        values: like ``keys``.
        past_lengths: ``[B]`` int32, valid tokens before this call.
        query_lengths: ``[B]`` int32, valid new tokens; rows are padded on the right.
    """

    def __init__(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], past_lengths: Tensor, query_lengths: Tensor
    ) -> None:
        self.keys = list(keys)
        self.values = list(values)
        self.past_lengths = past_lengths
        self.query_lengths = query_lengths

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write this layer's new keys and values, attend, return ``[B, S, Hq * D]``."""
        attended, self.keys[layer_index], self.values[layer_index] = ops.cached_attention(
            query,
            key,
            value,
            self.keys[layer_index],
            self.values[layer_index],
            self.past_lengths,
            self.query_lengths,
        )
        return attended


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of ``[..., width]``."""
        return ops.rms_norm(x, self.weight, self.eps)


class Qwen3Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    def __init__(self, config: TextConfig, layer_index: int) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.kv_num_heads = config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, self.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def _rotated_heads(self, x: Tensor, norm: RMSNorm, num_heads: int, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        normed = norm(x.unflatten(-1, (num_heads, -1))).flatten(-2)
        return ops.rotary_embedding(normed, *cos_sin, num_heads)

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], attention_mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """Attend; shapes as in :meth:`Qwen2MoeModel.forward`."""
        query = self._rotated_heads(self.q_proj(x), self.q_norm, self.num_heads, cos_sin)
        key = self._rotated_heads(self.k_proj(x), self.k_norm, self.kv_num_heads, cos_sin)
        value = self.v_proj(x)
        if cache is not None:
            return self.o_proj(cache.attend(self.layer_index, query, key, value))
        attended = ops.causal_attention(query, key, value, self.num_heads, self.kv_num_heads, attention_mask)
        return self.o_proj(attended)


class Qwen3DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: TextConfig, layer_index: int) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, layer_index)
        self.mlp = Qwen3MoeSparseMoeBlock(config) if config.is_moe_layer(layer_index) else Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Map ``[B, S, H]`` to ``[B, S, H]``."""
        attended = self.self_attn(self.input_layernorm(hidden_states), cos_sin, attention_mask, cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Qwen2MoeModel(nn.Module):
    """The decoder template: embeddings, the layer loop, the final norm, and the hook after each layer."""

    layers: nn.ModuleList

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self._make_layer(index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def _make_layer(self, layer_index: int) -> nn.Module:
        raise NotImplementedError

    def _process_layer_output(
        self,
        layer_index: int,
        hidden_states: Tensor,
        input_deepstack_embeds: Tensor | ops.CompactDeepStack | None,
    ) -> Tensor:
        """What happens to the hidden states after a layer: nothing, unless a DeepStack class overrides it."""
        if input_deepstack_embeds is not None:
            raise TypeError(f"{type(self).__name__} is text only and takes no input_deepstack_embeds")
        return hidden_states

    def _inv_freq(self, device: torch.device) -> Tensor:
        exponents = torch.arange(0, self.config.head_dim, 2, device=device, dtype=torch.float) / self.config.head_dim
        return 1.0 / (self.config.rope_theta**exponents)

    def rotary(self, position_ids: Tensor, inv_freq: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosine and sine for every token, each ``[B, S, D/2]``; see :meth:`forward` for the arguments."""
        inv_freq = self._inv_freq(position_ids.device) if inv_freq is None else inv_freq
        return ops.mrope_cos_sin(position_ids, inv_freq, self.config.mrope_section)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        *,
        input_deepstack_embeds: Tensor | ops.CompactDeepStack | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        inv_freq: Tensor | None = None,
        final_rows: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder.

        Args:
            inputs_embeds: ``[B, S, H]``.
            position_ids: ``[3, B, S]`` int64, mRoPE rows t, h, w; three equal rows for text.
            input_deepstack_embeds: ``[B, S, taps * H]``; after layer i the slice ``[..., i*H:(i+1)*H]`` is
                added. None is exactly the text-only model.
            attention_mask: bool ``[B, 1, S, S]``, True where attention is allowed; None is causal. Ignored
                with a cache.
            cache: static cache to read and extend; None attends over ``inputs_embeds`` alone.
            inv_freq: ``[D/2]`` rotary frequencies, where the caller holds them (the exporter makes them a
                weight).
            final_rows: ``[B, L]`` int64 positions to keep before the final norm; None keeps all.

        Returns:
            ``[B, S, H]`` (or ``[B, L, H]``) after the final norm.
        """
        cos_sin = self.rotary(position_ids, inv_freq)
        hidden_states = inputs_embeds
        for layer_index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, cos_sin, attention_mask, cache)
            hidden_states = self._process_layer_output(layer_index, hidden_states, input_deepstack_embeds)
        if final_rows is not None:
            hidden_states = ops.gather_rows(hidden_states, final_rows)
        return self.norm(hidden_states)


class Qwen3MoeModel(Qwen2MoeModel):
    """Qwen3 layers in the template: text only; dense where the config has no experts."""

    def _make_layer(self, layer_index: int) -> nn.Module:
        return Qwen3DecoderLayer(self.config, layer_index)


class _DeepStackHook(Qwen3MoeModel):
    """The one hook behind both DeepStack models."""

    def __init__(self, config: TextConfig, num_deepstack: int) -> None:
        super().__init__(config)
        self.num_deepstack = num_deepstack

    def _process_layer_output(
        self,
        layer_index: int,
        hidden_states: Tensor,
        input_deepstack_embeds: Tensor | ops.CompactDeepStack | None,
    ) -> Tensor:
        if input_deepstack_embeds is None or layer_index >= self.num_deepstack:
            return hidden_states
        return ops.deepstack_add(hidden_states, input_deepstack_embeds, layer_index)


class Qwen3MoeLLMModel(_DeepStackHook):
    """The decoder inside the vision-language model."""


class Qwen3MoeModelWithDeepStack(_DeepStackHook):
    """The decoder of a language process, which receives DeepStack from an encode process."""


class Qwen3MoeForCausalLM(nn.Module):
    """Text-only model: Qwen3-MoE and, without experts, Qwen3."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = self._make_decoder(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if config.text.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _make_decoder(self, config: ModelConfig) -> Qwen3MoeModel:
        return Qwen3MoeModel(config.text)

    @property
    def language_model(self) -> Qwen3MoeModel:
        """The decoder."""
        return self.model

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embed_tokens

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, *, input_deepstack_embeds: Tensor | None = None
    ) -> Tensor:
        """Logits ``[B, S, V]`` for ``input_ids [B, S]``; see :meth:`Qwen2MoeModel.forward` for the other
        arguments.

        On the language side of a disaggregated pair the ids of image tokens are replaced by embeddings, so
        that side calls :attr:`language_model` with ``inputs_embeds``.
        """
        hidden = self.model(self.embed_tokens(input_ids), position_ids, input_deepstack_embeds=input_deepstack_embeds)
        return self.lm_head(hidden)


class Qwen3MoeForCausalLMWithDeepStack(Qwen3MoeForCausalLM):
    """The language side of a disaggregated pair: no vision weights, takes ``input_deepstack_embeds``."""

    def _make_decoder(self, config: ModelConfig) -> Qwen3MoeModel:
        return Qwen3MoeModelWithDeepStack(config.text, config.num_deepstack)
