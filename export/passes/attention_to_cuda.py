"""Attention to what ONNX Runtime's CUDA provider has, in graphs whose every node runs on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN, parse_functions

__all__ = ["CUDA_CACHES", "AttentionToCuda"]

CUDA_CACHES: Mapping[str, str] = {"CachedAttention": "fp32", "CachedAttentionFp16": "fp16"}
"""The operators over a KV cache that have a body here, and the kind of cache."""

# Where new keys and values go (row, head, slot), and what each query may see. All layers share it. Rows, steps and
# slots are counted by adding up ones: a Range would take its end from a shape, which ONNX Runtime computes on the CPU.
# A query row is one token of one head of a group: s * GROUP + j.
_PLACES = """
CachePlaces (position_ids, past_lengths, past_key) => (places, bias)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    column_axis = Constant <value_ints = [1]> ()
    temporal = Gather <axis = 0> (position_ids, zero)
    nothing = Sub (temporal, temporal)
    ones = Add (nothing, one)
    step = CumSum <exclusive = 1> (ones, one)
    row = CumSum <exclusive = 1> (ones, zero)
    first_slot = Cast <to = 7> (past_lengths)
    first_column = Unsqueeze (first_slot, column_axis)
    position = Add (first_column, step)
    token_shape = Constant <value_ints = [0, -1, 1, 1]> ()
    no_head = Constant <value = int64[1, 1, KV_HEADS, 1] {ZEROS}> ()
    head = Constant <value = int64[1, 1, KV_HEADS, 1] {HEADS}> ()
    row_4d = Reshape (row, token_shape)
    slot_4d = Reshape (position, token_shape)
    nothing_4d = Reshape (nothing, token_shape)
    rows = Add (row_4d, no_head)
    heads = Add (nothing_4d, head)
    slots = Add (slot_4d, no_head)
    places = Concat <axis = 3> (rows, heads, slots)
    channel = Gather <axis = 3> (past_key, zero)
    head_of_row = Gather <axis = 1> (channel, zero)
    any_slot = Gather <axis = 0> (head_of_row, zero)
    as_bool = Cast <to = 9> (any_slot)
    other = Not (as_bool)
    always = Or (as_bool, other)
    slot_ones = Cast <to = 7> (always)
    slot = CumSum <exclusive = 1> (slot_ones, zero)
    group_axis = Constant <value_ints = [2]> ()
    by_token = Unsqueeze (position, group_axis)
    no_group = Constant <value = int64[1, 1, GROUP] {GROUP_ZEROS}> ()
    by_query = Add (by_token, no_group)
    query_shape = Constant <value_ints = [0, 1, -1, 1]> ()
    last_visible = Reshape (by_query, query_shape)
    hidden = Less (last_visible, slot)
    seen_bias = Constant <value_float = 0.0> ()
    hidden_bias = Constant <value_float = -1e30> ()
    bias = Where (hidden, hidden_bias, seen_bias)
}
"""

# ScatterND works in the memory of its input where that is bound as its output too. The cache is read after it was
# written.
_APPEND = """
    PART_by_head = Reshape (PART, by_head)
    present_PART = ScatterND (past_PART, places, PART_by_head)
"""
_CACHED = """
CachedAttention <num_heads, kv_num_heads, scale>
    (query, key, value, past_key, past_value, past_lengths, query_lengths, places, bias) => (output, present_key,
    present_value)
{
    by_head = Constant <value_ints = [0, 0, KV_HEADS, HEAD_DIM]> ()
    APPEND
    query_shape = Constant <value_ints = [0, 0, KV_HEADS, GROUP, HEAD_DIM]> ()
    query_split = Reshape (query, query_shape)
    query_heads = Transpose <perm = [0, 2, 1, 3, 4]> (query_split)
    rows_shape = Constant <value_ints = [0, 0, -1, HEAD_DIM]> ()
    query_rows = Reshape (query_heads, rows_shape)
    scores = com.microsoft.FusedMatMul <transB: int = 1, alpha: float = @scale> (query_rows, present_key)
    masked = Add (scores, bias)
    weights = Softmax <axis = -1> (masked)
    attended = MatMul (weights, present_value)
    split_shape = Constant <value_ints = [0, 0, -1, GROUP, HEAD_DIM]> ()
    attended_split = Reshape (attended, split_shape)
    attended_tokens = Transpose <perm = [0, 2, 1, 3, 4]> (attended_split)
    merged = Constant <value_ints = [0, 0, WIDTH]> ()
    output = Reshape (attended_tokens, merged)
}
"""

# Half precision is all that the CUDA kernel has. It writes the cache itself.
_CACHED_FP16 = """
CachedAttentionFp16 <num_heads, kv_num_heads, scale>
    (query, key, value, past_key, past_value, past_lengths, query_lengths) => (output, present_key, present_value)
{
    one = Constant <value = int32[1] {1}> ()
    total_lengths = Add (past_lengths, query_lengths)
    last_positions = Sub (total_lengths, one)
    longest = ReduceMax <keepdims = 1> (total_lengths)
    query_half = Cast <to = 10> (query)
    key_half = Cast <to = 10> (key)
    value_half = Cast <to = 10> (value)
    output_half, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale>
        (query_half, key_half, value_half, past_key, past_value, last_positions, longest)
    output = Cast <to = 1> (output_half)
}
"""

# Equal segments are one batch, others come one by one; the kernel does not hold a whole score matrix.
_SEGMENT = """
SegmentAttention <num_heads, scale> (query, key, value, cu_seqlens) => (output)
{
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    behind_all = Constant <value_ints = [9223372036854775807]> ()
    begins = Slice (cu_seqlens, first, last, first)
    ends = Slice (cu_seqlens, second, behind_all, first)
    lengths = Sub (ends, begins)
    longest = ReduceMax <keepdims = 1> (lengths)
    shortest = ReduceMin <keepdims = 1> (lengths)
    all_equal = Equal (longest, shortest)
    width = Constant <value_ints = [WIDTH]> ()
    length = Cast <to = 7> (longest)
    batch_shape = Concat <axis = 0> (last, length, width)
    rows_shape = Constant <value_ints = [-1, WIDTH]> ()
    output = If (all_equal) <
        then_branch = one_batch () => (float[rows, width] output_batch)
        {
            query_batch = Reshape (query, batch_shape)
            key_batch = Reshape (key, batch_shape)
            value_batch = Reshape (value, batch_shape)
            attended = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>
                (query_batch, key_batch, value_batch)
            output_batch = Reshape (attended, rows_shape)
        },
        else_branch = one_by_one () => (float[rows, width] output_loop)
        {
            bounds = Cast <to = 7> (cu_seqlens)
            segment_begins = Slice (bounds, first, last, first)
            segment_ends = Slice (bounds, second, behind_all, first)
            num_segments = Size (segment_ends)
            keep_going = Constant <value = bool {1}> ()
            none_yet = Slice (query, first, first, first)
            output_loop = Loop (num_segments, keep_going, none_yet) <body = one_segment
                (int64 segment, bool condition, float[done_rows, width] done) =>
                (bool condition_out, float[more_rows, width] done_out)
            {
                condition_out = Identity (condition)
                begin = Gather (segment_begins, segment)
                end = Gather (segment_ends, segment)
                begin_1d = Unsqueeze (begin, first)
                end_1d = Unsqueeze (end, first)
                query_rows = Slice (query, begin_1d, end_1d, first)
                key_rows = Slice (key, begin_1d, end_1d, first)
                value_rows = Slice (value, begin_1d, end_1d, first)
                query_one = Unsqueeze (query_rows, first)
                key_one = Unsqueeze (key_rows, first)
                value_one = Unsqueeze (value_rows, first)
                attended_one = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>
                    (query_one, key_one, value_one)
                attended_rows = Squeeze (attended_one, first)
                done_out = Concat <axis = 0> (done, attended_rows)
            }>
        }
    >
}
"""
_BODIES: Mapping[str, str] = {
    "CachedAttention": _CACHED.replace("APPEND", _APPEND.replace("PART", "key") + _APPEND.replace("PART", "value")),
    "CachedAttentionFp16": _CACHED_FP16,
    "SegmentAttention": _SEGMENT,
}


class AttentionToCuda(ir.passes.InPlacePass):
    """CachedAttention and SegmentAttention get bodies of operators that have CUDA kernels.

    1. A cache of fp32 is written by ScatterND and read by MatMul and Softmax, which hold all scores of one layer: the
       fused kernels are for half precision. Heads that share a key/value head are rows of one matrix. Where to write
       and what is visible is computed once per graph.
    2. A cache of fp16 is GroupQueryAttention's.
    3. Segments are MultiHeadAttention's.

    The bodies are functions; inlining them is another pass.

    Ensures: every operator of attention over a cache is one of :data:`CUDA_CACHES`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type in _BODIES]
        bodies = {node.op_type: _filled(_BODIES[node.op_type], node) for node in nodes}
        cached = [node for node in nodes if node.op_type == "CachedAttention"]
        if cached:
            bodies["CachePlaces"] = _filled(_PLACES, cached[0])
            _give_places(model.graph, cached)
        for proto in parse_functions(bodies.values(), com_microsoft=1).values():
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        if bodies:
            model.graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, bool(bodies))

    def ensures(self, model: ir.Model) -> None:
        """Check that there is no cache of another kind."""
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type.startswith("CachedAttention") and node.op_type not in CUDA_CACHES:
                raise ir.passes.PostconditionError(f"no body for {node.op_type}")


def _give_places(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    position_ids = next(value for value in graph.inputs if value.name == "position_ids")
    past_key, past_lengths = nodes[0].inputs[3], nodes[0].inputs[5]
    places = ir.node("CachePlaces", [position_ids, past_lengths, past_key], domain=DOMAIN, num_outputs=2)
    graph.insert_before(nodes[0], places)
    for node in nodes:
        count = len(node.inputs)
        node.resize_inputs(count + 2)
        for index, value in enumerate(places.outputs, start=count):
            node.replace_input_with(index, value)


def _filled(text: str, node: ir.Node) -> str:
    """A text with the sizes of a node; the layers of a model are alike."""
    query = node.inputs[0]
    assert query is not None and query.shape is not None
    width, heads = query.shape[-1], node.attributes.get_int("num_heads")
    assert isinstance(width, int)
    kv_heads = node.attributes.get_int("kv_num_heads", heads)
    group = heads // kv_heads
    lists = {
        "{GROUP_ZEROS}": [0] * group,
        "{ZEROS}": [0] * kv_heads,
        "{HEADS}": list(range(kv_heads)),
    }
    for name, numbers in lists.items():
        text = text.replace(name, "{" + ", ".join(map(str, numbers)) + "}")
    sizes = {"KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": width // heads, "WIDTH": width}
    for name, value in sizes.items():
        text = text.replace(name, str(value))
    return text
