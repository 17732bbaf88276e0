"""The definition of SparseAttention: standard ONNX, put together from the parts that an attribute asks for.

Every part ends in one bool tensor ``[B, kv_num_heads or 1, 1, queries, keys]``, and-ed together; the last part is the
softmax over what is visible. Axes of the attention: batch row, kv head, query head of that kv head, token, column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

__all__ = ["definition"]

_HEADER = """
SparseAttention <num_heads, kv_num_heads, head_dim, scale, mode, kv_format, pattern, window, sink, block_size, top_n,
    gate, has_pooled_keys> (INPUTS) => (output)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    axis_2 = Constant <value_ints = [2]> ()
    axis_3 = Constant <value_ints = [3]> ()
    axis_4 = Constant <value_ints = [4]> ()
    axes_1_2 = Constant <value_ints = [1, 2]> ()
    axes_1_3 = Constant <value_ints = [1, 3]> ()
    axes_0_1_2 = Constant <value_ints = [0, 1, 2]> ()
    nothing = Constant <value_float = 0.0> ()
    one_float = Constant <value_float = 1.0> ()
    lowest = Constant <value_float = -3.4028234e38> ()
    highest = Constant <value_float = 3.4028234e38> ()
    below_all = Log (nothing)
    block = Constant <value_int = BLOCK> ()
    top_n_1d = Constant <value_ints = [TOP_N]> ()
"""

# query5 [B, kv heads, group, S, D]; key4, value4 [B, kv heads, C, D]
_CAUSAL = """
    split = Constant <value_ints = [0, 0, KV_HEADS, GROUP, HEAD_DIM]> ()
    query_split = Reshape (query, split)
    query5 = Transpose <perm = [0, 2, 3, 1, 4]> (query_split)
    LOAD
    past = Cast <to = 7> (past_lengths)
    new = Cast <to = 7> (query_lengths)
    tokens_1d = Shape <start = 1, end = 2> (query)
    tokens = Squeeze (tokens_1d)
    capacity_1d = Shape <start = 2, end = 3> (key_cache)
    capacity = Squeeze (capacity_1d)
    step = Range (zero, tokens, one)
    slot = Range (zero, capacity, one)
    past_column = Unsqueeze (past, axis_1)
    new_column = Unsqueeze (new, axis_1)
    position_rows = Add (past_column, step)
    position = Unsqueeze (position_rows, axis_2)
    is_query_rows = Less (step, new_column)
    is_query = Unsqueeze (is_query_rows, axis_2)
    not_after = LessOrEqual (slot, position)
    causal = And (not_after, is_query)
    visible_3d = PATTERN (causal)
    in_reach = Unsqueeze (visible_3d, axes_1_2)
"""

_LOAD_FLOAT = """
    key4 = Cast <to = 1> (key_cache)
    value4 = Cast <to = 1> (value_cache)
"""

_LOAD_INT8 = """
    key_numbers = Cast <to = 1> (key_cache)
    value_numbers = Cast <to = 1> (value_cache)
    key_scales_apart = Unsqueeze (key_scales, axis_3)
    value_scales_apart = Unsqueeze (value_scales, axis_3)
    key4 = Mul (key_numbers, key_scales_apart)
    value4 = Mul (value_numbers, value_scales_apart)
"""

# All segments are one batch row. started: bounds not after a token, so 1 … N are the segments.
_SEGMENT = """
    split = Constant <value_ints = [1, -1, KV_HEADS, GROUP, HEAD_DIM]> ()
    kv_split = Constant <value_ints = [1, -1, KV_HEADS, HEAD_DIM]> ()
    query_split = Reshape (query, split)
    query5 = Transpose <perm = [0, 2, 3, 1, 4]> (query_split)
    key_split = Reshape (key, kv_split)
    key4 = Transpose <perm = [0, 2, 1, 3]> (key_split)
    value_split = Reshape (value, kv_split)
    value4 = Transpose <perm = [0, 2, 1, 3]> (value_split)
    tokens_1d = Shape <start = 0, end = 1> (query)
    tokens = Squeeze (tokens_1d)
    slot = Range (zero, tokens, one)
    bounds = Cast <to = 7> (cu_seqlens)
    segments_and_one = Size (bounds)
    slot_column = Unsqueeze (slot, axis_1)
    has_started = GreaterOrEqual (slot_column, bounds)
    has_started_int = Cast <to = 7> (has_started)
    started = ReduceSum <keepdims = 0> (has_started_int, axis_1)
    is_late_enough = Greater (started, zero)
    is_early_enough = Less (started, segments_and_one)
    is_query_row = And (is_late_enough, is_early_enough)
    is_query = Unsqueeze (is_query_row, axis_1)
    all_bounds = Concat <axis = 0> (axis_0, bounds)
    begin = Gather (all_bounds, started)
    local = Sub (slot, begin)
    started_column = Unsqueeze (started, axis_1)
    same_segment = Equal (started_column, started)
    own_segment = And (same_segment, is_query)
    position = Unsqueeze (local, axis_1)
    visible_2d = PATTERN (own_segment)
    in_reach = Unsqueeze (visible_2d, axes_0_1_2)
"""

# KEYS is the position of each key; BEFORE bounds the other side, which causal attention does not see anyway.
_WINDOW = """
    window_size = Constant <value_int = WINDOW> ()
    sink_size = Constant <value_int = SINK> ()
    oldest = Sub (position, window_size)
    newest = Add (position, window_size)
    is_young = Greater (KEYS, oldest)
    is_old = Less (KEYS, newest)
    is_near = And (is_young, is_old)
    is_sink = Less (KEYS, sink_size)
    is_wanted = Or (is_near, is_sink)
    WINDOWED = And (REACHABLE, is_wanted)
"""

# What nobody sees counts as zero, whatever it holds; a row that sees nothing is zero.
_ATTEND = """
    visible_float = Cast <to = 1> (visible)
    times_seen = ReduceSum <keepdims = 1> (visible_float, axis_3)
    times_seen_column = Transpose <perm = [0, 1, 2, 4, 3]> (times_seen)
    is_seen = Greater (times_seen_column, nothing)
    key5 = Unsqueeze (key4, axis_2)
    value5 = Unsqueeze (value4, axis_2)
    value_seen = Where (is_seen, value5, nothing)
    key_columns = Transpose <perm = [0, 1, 2, 4, 3]> (key5)
    products = MatMul (query5, key_columns)
    scale_factor = Constant <value_float: float = @scale> ()
    scaled = Mul (products, scale_factor)
    scores = Where (visible, scaled, lowest)
    scores_shape = Shape <start = 0, end = 4> (scores)
    column_shape = Concat <axis = 0> (scores_shape, axis_1)
    lowest_column = Expand (lowest, column_shape)
    scores_or_lowest = Concat <axis = 4> (scores, lowest_column)
    top = ReduceMax <keepdims = 1> (scores_or_lowest, axis_4)
    below_top = Sub (scores, top)
    exponentials = Exp (below_top)
    weights = Where (visible, exponentials, nothing)
    total = ReduceSum <keepdims = 1> (weights, axis_4)
    is_empty = Equal (total, nothing)
    divisor = Where (is_empty, one_float, total)
    normal = Div (weights, divisor)
    attended = MatMul (normal, value_seen)
    tokens_first = Transpose <perm = [0, 3, 1, 2, 4]> (attended)
    output_shape = Shape (query)
    output = Reshape <allowzero = 1> (tokens_first, output_shape)
}
"""


def definition(attributes: Mapping[str, Any], inputs: Sequence[str]) -> onnx.FunctionProto:
    """The function for these attributes.

    Args:
        attributes: resolved.
        inputs: names of the inputs in their order.
    """
    from deepstitch.plugins.common.linear_function import parse_function
    from deepstitch.plugins.sparse_attention.function_blocks import block_nodes

    causal, pattern = attributes["mode"] == "causal", attributes["pattern"]
    reach, reachable, seen = (_CAUSAL, "causal", "visible_3d") if causal else (_SEGMENT, "own_segment", "visible_2d")
    load = _LOAD_INT8 if attributes["kv_format"] == "int8" else _LOAD_FLOAT
    reach = reach.replace("LOAD", load)
    if pattern == "window":
        window = _WINDOW.replace("KEYS", "slot" if causal else "local")
        window = window.replace("WINDOWED", seen).replace("REACHABLE", reachable)
        reach = reach.replace(f"    {seen} = PATTERN ({reachable})\n", window)
    reach = reach.replace("PATTERN", "Identity")
    blocks = block_nodes(attributes) if pattern in ("layout", "dynamic") else "    visible = Identity (in_reach)\n"
    text = _HEADER + reach + blocks + _ATTEND
    values = {
        "INPUTS": ", ".join(inputs),
        "KV_HEADS": attributes["kv_num_heads"],
        "GROUP": attributes["num_heads"] // attributes["kv_num_heads"],
        "HEAD_DIM": attributes["head_dim"],
        "BLOCK": attributes["block_size"],
        "TOP_N": attributes["top_n"],
        "WINDOW": attributes["window"],
        "SINK": attributes["sink"],
    }
    for name, value in values.items():
        text = text.replace(name, str(value))
    return parse_function(text)
