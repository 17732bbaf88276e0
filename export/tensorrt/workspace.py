"""Bytes of scratch memory the plugins ask TensorRT for, worked out without their library.

The same sums as ``workspace`` in each ``plugins/<op>/op.cpp``; a test holds them against the library built for the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from deepstitch.export.tensorrt.plugin_nodes import PluginNode, Typed
from deepstitch.plugins.quantized_linear.schema import INTEGER_FORMATS

__all__ = ["WORKSPACES", "workspace_bytes"]

_ALIGNMENT = 256
_GROUP = 32  # activations that share a scale, plugins/common/linear.h
_META_BYTES = 8  # scale and offset of a group
_TILE_BYTES = 16
_CHUNK_TOKENS = 2048  # plugins/moe_experts/tuning.h
_FUSED_ROWS = 2  # plugins/quantized_linear/tuning.h
_DECODE_ROWS, _DECODE_ROWS_PER_BLOCK, _MOST_DECODE_BLOCKS = 64, 16, 1024  # plugins/sparse_attention


def workspace_bytes(node: PluginNode, inputs: Sequence[Typed]) -> int:
    """What one plugin asks for with inputs of these sizes."""
    return WORKSPACES[node.schema.name](node, {spec.name: t for spec, t in zip(node.inputs, inputs, strict=True)})


def _aligned(*pieces: int) -> int:
    return sum(-(-piece // _ALIGNMENT) * _ALIGNMENT for piece in pieces)


def _quantized(rows: int, columns: int) -> tuple[int, int]:
    """Rows as int8 with the scales of their groups."""
    return rows * columns, rows * (columns // _GROUP) * _META_BYTES


def _quantized_linear(node: PluginNode, inputs: Mapping[str, Typed]) -> int:
    *leading, columns = inputs["x"].shape
    rows = math.prod(leading)
    if node.attributes["weight_format"] not in INTEGER_FORMATS or rows <= _FUSED_ROWS:
        return 0
    return _aligned(*_quantized(rows, columns))


def _moe_experts(node: PluginNode, inputs: Mapping[str, Typed]) -> int:
    *leading, hidden = inputs["x"].shape
    tokens = min(math.prod(leading), _CHUNK_TOKENS)
    slots = tokens * node.attributes["top_k"]
    experts, width = node.attributes["num_experts"], node.attributes["intermediate_size"]
    pieces = [4 * slots] * 3 + [4 * experts] * 2 + [_TILE_BYTES * slots, 4, 4 * slots * width, 4 * slots * hidden]
    if node.attributes["weight_format"] in INTEGER_FORMATS:
        pieces += [*_quantized(tokens, hidden), *_quantized(slots, width)]
    return _aligned(*pieces)


def _sparse_attention(node: PluginNode, inputs: Mapping[str, Typed]) -> int:
    given, causal = node.attributes, node.attributes["mode"] == "causal"
    heads = given["kv_num_heads"]
    query = inputs["query"].shape
    batch, tokens = query[:2] if causal else (1, query[0])
    capacity = inputs["key_cache"].shape[2] if causal else tokens
    pieces = []
    if given["pattern"] in ("layout", "dynamic"):
        segments = 0 if causal else inputs["cu_seqlens"].shape[0] + 1
        pieces += _lists(node, inputs, (batch * heads, tokens, capacity, segments))
    if causal:
        parts = _decode_parts(batch * heads, tokens, given["num_heads"] // heads, capacity, given["kv_format"])
        pieces += [4 * parts * given["head_dim"], 8 * parts]
    return _aligned(*pieces)


def _decode_parts(heads: int, tokens: int, group: int, capacity: int, kv_format: str) -> int:
    """Sums over a part of the keys, for the most rows that the decode kernels take."""
    rows = min(tokens, _DECODE_ROWS // group) * group
    blocks = max(_MOST_DECODE_BLOCKS, heads * -(-rows // _DECODE_ROWS_PER_BLOCK))
    tiles = -(-capacity // (32 if kv_format == "float32" else 64))
    return min(blocks * _DECODE_ROWS_PER_BLOCK, heads * rows * tiles)


def _lists(node: PluginNode, inputs: Mapping[str, Typed], sizes: tuple[int, int, int, int]) -> list[int]:
    """Which key blocks each query block keeps.

    Args:
        node: pattern layout or dynamic.
        inputs: by name.
        sizes: heads of all rows, tokens, capacity, and the blocks more that segments begin.
    """
    heads, tokens, capacity, more = sizes
    given = node.attributes
    block = given["block_size"]
    query_blocks, key_blocks = -(-tokens // block) + more, -(-capacity // block) + more
    if given["pattern"] == "layout":
        *leading, width = inputs["layout"].shape
        rows = math.prod(leading)
        return [4 * rows, 4 * rows * width]
    width = min(-(-capacity // block), max(given["top_n"], 4))
    rows = heads * query_blocks
    pooled = [] if given["gate"] else [4 * rows * given["head_dim"]]
    if not given["gate"] and not given.get("has_pooled_keys"):
        pooled.append(4 * heads * key_blocks * given["head_dim"])
    return [4 * rows, 4 * rows * width, *pooled]


def _none(node: PluginNode, inputs: Mapping[str, Typed]) -> int:
    del node, inputs
    return 0


WORKSPACES: Mapping[str, Callable[[PluginNode, Mapping[str, Typed]], int]] = MappingProxyType(
    {
        "MoEExperts": _moe_experts,
        "SparseAttention": _sparse_attention,
        "QuantizedLinear": _quantized_linear,
        "RMSNormRope": _none,
        "DeepStackAdd": _none,
        "KVCacheAppend": _none,
    }
)
