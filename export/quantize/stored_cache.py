"""The rounding of a bundle's KV cache in PyTorch: what the model computes whose keys and values were stored."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor

from deepstitch.export.kv_functions import CacheKind, kind_of_graph
from deepstitch.models import ops
from deepstitch.models.config import TextConfig
from deepstitch.runtime.bundle import DECODER, Bundle

__all__ = ["RoundingCache", "stored_cache"]


class RoundingCache:
    """Stands in for :class:`deepstitch.models.text.KVCache`: whole sequences attend to their own rounded keys."""

    def __init__(self, config: TextConfig, kind: CacheKind, scales: Mapping[str, Tensor]) -> None:
        """Take the rounding.

        Args:
            config: of the decoder.
            kind: of the cache.
            scales: ``[1, Hkv, 1, D]`` by initializer name, where the kind has scales.
        """
        self._heads = config.num_attention_heads, config.num_key_value_heads
        self._kind = kind
        self._scales = scales

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally; arguments and result as for the cache."""
        key, value = self._rounded(layer_index, "key", key), self._rounded(layer_index, "value", value)
        return ops.causal_attention(query, key, value, *self._heads, None)

    def _rounded(self, layer: int, part: str, x: Tensor) -> Tensor:
        if self._kind.largest is None:
            return x.half().float() if self._kind.name == "fp16" else x
        scale = self._scales[f"past_key_values.{layer}.{part}.scale"].flatten()  # (Hkv * D)
        limit = self._kind.largest
        return torch.round(x * (1 / scale)).clamp(-limit - 1, limit) * scale


def stored_cache(bundle: Bundle, config: TextConfig) -> RoundingCache | None:
    """The rounding of a bundle's cache, None where there is none."""
    kind = kind_of_graph(bundle.graph(DECODER))
    if kind.name == "fp32":
        return None
    graph = onnx.load(bundle.graph_path(DECODER), load_external_data=False).graph
    scales = {
        each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
        for each in graph.initializer
        if each.name.startswith("past_key_values.")
    }
    return RoundingCache(config, kind, scales)
