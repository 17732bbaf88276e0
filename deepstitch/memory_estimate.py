"""How much memory the language side takes: KV cache, activations, weights. Estimates from sizes alone.

And how much encoded pictures may take, which are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "CACHE_BITS",
    "KEPT_PICTURES",
    "WEIGHT_BYTES",
    "DecoderShape",
    "Memory",
    "Workload",
    "estimate_memory",
    "kept_pictures",
]

CACHE_BITS: Mapping[str, int] = MappingProxyType({"float32": 32, "float16": 16, "int8": 8, "int4": 4})
WEIGHT_BYTES: Mapping[str, float] = MappingProxyType(
    {"fp32": 4, "fp16": 2, "int8": 1.125, "int4": 0.625}  # per value; integers: blocks of 32, scales included
)
KEPT_PICTURES = 256 << 20  # bytes for outputs of the vision encoder, where nothing else limits them
_KEPT_SHARE = 32  # of a card's memory they get one part: 64 MiB of 2 GiB
_FLOAT_BYTES = 4  # the graphs compute in float32, whatever the weights are stored in


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the memory estimate is for.

    Attributes:
        context: tokens per row, prompt and answer together.
        batch: rows.
        prefill_chunk: prompt tokens per decoder call; None gives the whole context at once.
    """

    context: int
    batch: int = 1
    prefill_chunk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The sizes memory depends on, from config.json or from the manifest.

    Attributes:
        mlp_width: SwiGLU columns one token passes through: intermediate size, or expert width times top-k.
        stores_scores: the attention kernel keeps the whole score matrix: that of a ``portable`` bundle does,
            GroupQueryAttention goes through it in blocks.
    """

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mlp_width: int
    stores_scores: bool = False

    def kv_bytes_per_token(self, cache_dtype: str) -> int:
        """Bytes one token of one row takes in the cache: keys and values of every layer."""
        values = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return values * CACHE_BITS[cache_dtype] // 8

    def activation_bytes(self, workload: Workload) -> int:
        """Estimate of the largest set of intermediate tensors of one decoder call, in float32.

        Residual stream, its norm and the layer's result, plus the largest of attention (query, key, value,
        result, and the score matrix where it is stored), the feed-forward block (gate, up, product) and the
        logits.
        """
        chunk = min(workload.prefill_chunk or workload.context, workload.context)
        tokens = workload.batch * chunk
        streams = 3 * tokens * self.hidden_size
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        scores = tokens * self.num_attention_heads * workload.context if self.stores_scores else 0
        attention = tokens * heads * self.head_dim + scores
        feed_forward = 3 * tokens * self.mlp_width
        logits = workload.batch * self.vocab_size
        return _FLOAT_BYTES * (streams + max(attention, feed_forward, logits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Estimated bytes of the language side for one :class:`Workload`.

    Attributes:
        weights: dtype the weights are held in.
        weight_bytes: all weights, vision included.
    """

    weights: str
    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.weight_bytes + self.kv_cache_bytes + self.activation_bytes


def estimate_memory(
    shape: DecoderShape, workload: Workload, weights: str, weight_bytes: int, cache_dtype: str
) -> Memory:
    """Put the parts together.

    Args:
        shape: the decoder.
        workload: context, batch and prefill chunk.
        weights: dtype the weights are held in, for the record.
        weight_bytes: bytes of all weights.
        cache_dtype: a key of :data:`CACHE_BITS`.
    """
    return Memory(
        weights=weights,
        weight_bytes=weight_bytes,
        kv_cache_bytes=shape.kv_bytes_per_token(cache_dtype) * workload.context * workload.batch,
        activation_bytes=shape.activation_bytes(workload),
    )


def kept_pictures(card: int | None) -> int:
    """Bytes that outputs of the vision encoder may take, kept for when the same picture comes again.

    Args:
        card: bytes of the card they lie on; None: not known.
    """
    return KEPT_PICTURES if card is None else min(KEPT_PICTURES, card // _KEPT_SHARE)
