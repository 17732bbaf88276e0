"""Attention to the SparseAttention plugin; in standard operators for heads of another width than its kernels have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN, parse_functions
from deepstitch.export.passes.plugin_nodes import PLUGIN_OPSET, parser_attributes
from deepstitch.plugins.kv_cache_append.schema import SCHEMA as APPEND_SCHEMA
from deepstitch.plugins.sparse_attention.schema import HEAD_DIMS, SCHEMA

__all__ = ["ATTENTIONS", "AttentionToPlugin"]

ATTENTIONS: Mapping[str, str] = {"CachedAttention": "float32", "CachedAttentionFp16": "float16"}
"""The operators over a KV cache that have a plugin, and how the cache is stored."""

# New keys and values lie in the cache before anything is read; the plugin writes them over the old cache where that is
# bound as the new one.
_CACHED = """
NAME <num_heads, kv_num_heads, scale>
    (query, key, value, past_key, past_value, past_lengths, query_lengths POSITION) => (output, present_key,
    present_value)
{
    present_key, present_value = deepstitch.plugins.KVCacheAppend <APPEND>
        (past_key, past_value, key, value, past_lengths, query_lengths)
    ATTEND
}
"""
_CACHED_KERNEL = """
    output = deepstitch.plugins.SparseAttention <ATTRIBUTES>
        (query, present_key, present_value, past_lengths, query_lengths)
"""

# Where the queries of standard operators stand in the cache. All layers share it.
_POSITIONS = """
CachePositions (past_lengths, key) => (position)
{
    zero = Constant <value = int32 {0}> ()
    one = Constant <value = int32 {1}> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    key_shape = Shape (key)
    tokens_1d = Gather <axis = 0> (key_shape, second)
    tokens_0d = Squeeze (tokens_1d, first)
    num_tokens = Cast <to = 6> (tokens_0d)
    step = Range (zero, num_tokens, one)
    lengths_column = Unsqueeze (past_lengths, second)
    position = Add (lengths_column, step)
}
"""

# The group of query heads that share a key/value head is an axis of its own.
_CACHED_STANDARD = """
    query_shape = Constant <value_ints = [0, 0, KV_HEADS, GROUP, HEAD_DIM]> ()
    query_split = Reshape (query, query_shape)
    query_groups = Transpose <perm = [0, 2, 3, 1, 4]> (query_split)
    factor = Constant <value_float: float = @scale> ()
    query_scaled = Mul (query_groups, factor)
    group_axis = Constant <value_ints = [2]> ()
    key_read = Cast <to = 1> (present_key)
    value_read = Cast <to = 1> (present_value)
    key_columns = Transpose <perm = [0, 1, 3, 2]> (key_read)
    key_groups = Unsqueeze (key_columns, group_axis)
    value_groups = Unsqueeze (value_read, group_axis)
    scores = MatMul (query_scaled, key_groups)
    zero = Constant <value = int32 {0}> ()
    one = Constant <value = int32 {1}> ()
    first = Constant <value_ints = [0]> ()
    cache_shape = Shape (present_key)
    capacity_1d = Gather <axis = 0> (cache_shape, group_axis)
    capacity_0d = Squeeze (capacity_1d, first)
    capacity = Cast <to = 6> (capacity_0d)
    slot = Range (zero, capacity, one)
    position_shape = Constant <value_ints = [0, 1, 1, -1, 1]> ()
    position_5d = Reshape (position, position_shape)
    visible = LessOrEqual (slot, position_5d)
    hidden_score = Constant <value_float = -1e30> ()
    masked = Where (visible, scores, hidden_score)
    weights = Softmax <axis = -1> (masked)
    attended = MatMul (weights, value_groups)
    attended_tokens = Transpose <perm = [0, 3, 1, 2, 4]> (attended)
    merged = Constant <value_ints = [0, 0, WIDTH]> ()
    output = Reshape (attended_tokens, merged)
"""
_SEGMENT = """
SegmentAttention <num_heads, scale> (query, key, value, cu_seqlens) => (output)
{
    ATTEND
}
"""
_SEGMENT_KERNEL = """
    output = deepstitch.plugins.SparseAttention <ATTRIBUTES> (query, key, value, cu_seqlens)
"""

# A token's segment is the number of bounds that are not behind it. Memory grows with the square of all tokens.
_SEGMENT_STANDARD = """
    zero = Constant <value = int32 {0}> ()
    one = Constant <value = int32 {1}> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    query_shape = Shape (query)
    tokens_1d = Gather <axis = 0> (query_shape, first)
    tokens_0d = Squeeze (tokens_1d, first)
    tokens = Cast <to = 6> (tokens_0d)
    token = Range (zero, tokens, one)
    token_column = Unsqueeze (token, second)
    begun = GreaterOrEqual (token_column, cu_seqlens)
    begun_float = Cast <to = 1> (begun)
    segment_column = ReduceSum <keepdims = 1> (begun_float, second)
    segment_row = Transpose <perm = [1, 0]> (segment_column)
    together = Equal (segment_column, segment_row)
    by_head = Constant <value_ints = [-1, KV_HEADS, HEAD_DIM]> ()
    query_split = Reshape (query, by_head)
    key_split = Reshape (key, by_head)
    value_split = Reshape (value, by_head)
    query_heads = Transpose <perm = [1, 0, 2]> (query_split)
    key_columns = Transpose <perm = [1, 2, 0]> (key_split)
    value_heads = Transpose <perm = [1, 0, 2]> (value_split)
    factor = Constant <value_float: float = @scale> ()
    query_scaled = Mul (query_heads, factor)
    scores = MatMul (query_scaled, key_columns)
    hidden_score = Constant <value_float = -1e30> ()
    masked = Where (together, scores, hidden_score)
    weights = Softmax <axis = -1> (masked)
    attended = MatMul (weights, value_heads)
    attended_tokens = Transpose <perm = [1, 0, 2]> (attended)
    merged = Constant <value_ints = [-1, WIDTH]> ()
    output = Reshape (attended_tokens, merged)
"""
_KINDS: Mapping[type, str] = {str: "string", int: "int"}


class AttentionToPlugin(ir.passes.InPlacePass):
    """CachedAttention and SegmentAttention get bodies around ``deepstitch.plugins.SparseAttention``.

    1. ``deepstitch.plugins.KVCacheAppend`` writes new keys and values into the cache, then the other plugin reads it.
    2. Heads of a width that it has no kernel for are computed by MatMul and Softmax, which hold all scores, from
       positions that are worked out once per graph.

    The bodies are functions; inlining them is another pass.

    Ensures: every operator of attention over a cache is one of :data:`ATTENTIONS`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        cached = [node for node in model.graph if node.domain == DOMAIN and node.op_type in ATTENTIONS]
        segments = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "SegmentAttention")]
        bodies = {node.op_type: _body(node) for node in (*cached, *segments)}
        if cached and not _has_kernel(cached[0]):
            bodies["CachePositions"] = _POSITIONS
            _give_positions(model.graph, cached)
        for proto in parse_functions(bodies.values(), deepstitch_plugins=PLUGIN_OPSET).values():
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, bool(bodies))

    def ensures(self, model: ir.Model) -> None:
        """Check that there is no cache of another kind."""
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type.startswith("CachedAttention") and node.op_type not in ATTENTIONS:
                raise ir.passes.PostconditionError(f"no plugin for {node.op_type}")


def _give_positions(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    key, past_lengths = nodes[0].inputs[1], nodes[0].inputs[5]
    positions = ir.node("CachePositions", [past_lengths, key], domain=DOMAIN)
    graph.insert_before(nodes[0], positions)
    for node in nodes:
        count = len(node.inputs)
        node.resize_inputs(count + 1)
        node.replace_input_with(count, positions.outputs[0])


def _body(node: ir.Node) -> str:
    """The operator's function, for all nodes of its type: the layers of a model are alike."""
    has_kernel = _has_kernel(node)
    if node.op_type == "SegmentAttention":
        text = _SEGMENT.replace("ATTEND", _SEGMENT_KERNEL if has_kernel else _SEGMENT_STANDARD)
    else:
        append = APPEND_SCHEMA.resolve({"kv_format": ATTENTIONS[node.op_type]})
        text = _CACHED.replace("APPEND", _as_text(parser_attributes(APPEND_SCHEMA, append)))
        text = text.replace("ATTEND", _CACHED_KERNEL if has_kernel else _CACHED_STANDARD)
        text = text.replace("POSITION", "" if has_kernel else ", position")
    text = text.replace("ATTRIBUTES", _attributes(node) if has_kernel else "").replace("NAME", node.op_type)
    for name, value in _sizes(node).items():
        text = text.replace(name, str(value))
    return text


def _has_kernel(node: ir.Node) -> bool:
    return _sizes(node)["HEAD_DIM"] in HEAD_DIMS


def _sizes(node: ir.Node) -> dict[str, int]:
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    width, heads = query.shape[-1], node.attributes.get_int("num_heads")
    assert isinstance(width, int)
    kv_heads = node.attributes.get_int("kv_num_heads", heads)
    return {"KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "HEAD_DIM": width // heads, "WIDTH": width}


def _attributes(node: ir.Node) -> str:
    """The plugin's attributes in ONNX's textual syntax; the scale is the operator's own."""
    sizes = _sizes(node)
    given = {
        "num_heads": node.attributes.get_int("num_heads"),
        "kv_num_heads": sizes["KV_HEADS"],
        "head_dim": sizes["HEAD_DIM"],
        "scale": node.attributes.get_float("scale"),
        "mode": "causal" if node.op_type in ATTENTIONS else "segment",
        "kv_format": ATTENTIONS.get(node.op_type, "float32"),
    }
    resolved = parser_attributes(SCHEMA, SCHEMA.resolve(given))
    return _as_text(resolved, {"scale: float": "@scale"})


def _as_text(attributes: Mapping[str, Any], first: Mapping[str, str] = MappingProxyType({})) -> str:
    """Attributes in ONNX's textual syntax; floats are to be among the first."""
    texts = dict(first)
    for name, value in attributes.items():
        if type(value) in _KINDS:
            texts[f"{name}: {_KINDS[type(value)]}"] = f'"{value}"' if isinstance(value, str) else str(value)
    return ", ".join(f"{name} = {text}" for name, text in texts.items())
