"""Names, shapes and dtypes of the graphs: declared here once, written to the manifest, checked when a bundle
is opened.

Axis names: P patches, T = P / merge_size**2 visual tokens, N segments, B batch rows, S new tokens per row, R
DeepStack rows, L logit rows per batch row, C cache capacity.
"""

from __future__ import annotations

from deepstitch.export.kv_functions import KV_CACHES
from deepstitch.manifest import TensorSpec
from deepstitch.models.config import ModelConfig, VisionConfig

__all__ = ["DECODER", "VISION_ENCODER", "Contract", "decoder_contract", "vision_contract"]

VISION_ENCODER = "vision_encoder"
DECODER = "decoder"

Contract = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


def _spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def vision_contract(config: VisionConfig) -> Contract:
    """Inputs and outputs of ``vision_encoder``."""
    half_head = config.head_dim // 2
    inputs = (
        _spec("pixel_values", "float32", "P", config.patch_width),
        _spec("position_indices", "int64", 4, "P"),
        _spec("position_weights", "float32", 4, "P"),
        _spec("rotary_cos", "float32", "P", half_head),
        _spec("rotary_sin", "float32", "P", half_head),
        _spec("cu_seqlens", "int32", "N+1"),
    )
    hidden = config.out_hidden_size
    outputs = (
        _spec("image_embeds", "float32", "T", hidden),
        _spec("deepstack_embeds", "float32", "T", len(config.deepstack_visual_indexes) * hidden),
    )
    return inputs, outputs


def decoder_contract(config: ModelConfig, kv_cache: str = "fp32") -> Contract:
    """Inputs and outputs of ``decoder``; the DeepStack pair is there exactly where the model has taps.

    Args:
        config: of the model.
        kv_cache: kind of the KV cache, one of :data:`deepstitch.export.kv_functions.KV_CACHES`.
    """
    text, kind = config.text, KV_CACHES[kv_cache]
    kv = (kind.dtype, "B", text.num_key_value_heads, "C", kind.width(text.head_dim))
    layers = range(text.num_hidden_layers)
    deepstack = (
        _spec("deepstack_embeds", "float32", "R", config.num_deepstack * text.hidden_size),
        _spec("deepstack_index", "int32", "B", "S"),
    )
    inputs = (
        _spec("inputs_embeds", "float32", "B", "S", text.hidden_size),
        _spec("position_ids", "int64", 3, "B", "S"),
        *(deepstack if config.num_deepstack else ()),
        _spec("past_lengths", "int32", "B"),
        _spec("query_lengths", "int32", "B"),
        _spec("logit_index", "int64", "B", "L"),
        *(_spec(f"past_key_values.{i}.{part}", *kv) for i in layers for part in ("key", "value")),
    )
    outputs = (
        _spec("logits", "float32", "B", "L", text.vocab_size),
        *(_spec(f"present.{i}.{part}", *kv) for i in layers for part in ("key", "value")),
    )
    return inputs, outputs
