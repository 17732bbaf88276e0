"""The definition of every ``deepstitch`` operator: an ONNX function whose body is standard ONNX.

Written in ONNX's own textual syntax (onnx/docs/Syntax.md), so that what is read here is what a runtime
executes. ``deepstitch.models.ops`` holds the same operators in PyTorch; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

import onnx
import onnx.parser
import onnx_ir as ir

from deepstitch.plugins.common.mrope_function import MROPE_ANGLES

__all__ = [
    "DOMAIN",
    "OPSET",
    "VERSION",
    "attach_functions",
    "cached_attention",
    "function_proto",
    "parse_functions",
    "segment_attention",
]

DOMAIN = "deepstitch"
VERSION = 1
OPSET = 24  # the first with TensorScatter, which writes a static KV cache

_M_ROTARY_COS_SIN = f"""
MRotaryCosSin <mrope_section> (position_ids, inv_freq) => (cos, sin)
{{
    {MROPE_ANGLES}
    cos = Cos (angles)
    sin = Sin (angles)
}}
"""

# Keys and values are written at past_lengths; key slot j is visible to query s iff j <= past_lengths + s.
_CACHED_ATTENTION = """
NAME <num_heads, kv_num_heads, scale>
    (query, key, value, past_key, past_value, past_lengths, query_lengths SCALES) => (output, present_key,
    present_value)
{
    CONSTANTS
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    keep_two = Constant <value_ints = [0, 0]> ()
    rest = Constant <value_ints = [-1]> ()
    heads_scalar = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_scalar, rest)
    kv_heads_scalar = Constant <value_int: int = @kv_num_heads> ()
    kv_heads = Reshape (kv_heads_scalar, rest)
    query_shape = Concat <axis = 0> (keep_two, heads, rest)
    kv_shape = Concat <axis = 0> (keep_two, kv_heads, rest)
    query_split = Reshape (query, query_shape)
    key_split = Reshape (key, kv_shape)
    value_split = Reshape (value, kv_shape)
    query_heads = Transpose <perm = [0, 2, 1, 3]> (query_split)
    key_heads = Transpose <perm = [0, 2, 1, 3]> (key_split)
    value_heads = Transpose <perm = [0, 2, 1, 3]> (value_split)
    first_slot = Cast <to = 7> (past_lengths)
    STORE
    present_key = TensorScatter <axis = 2, mode = "linear"> (past_key, key_stored, first_slot)
    present_value = TensorScatter <axis = 2, mode = "linear"> (past_value, value_stored, first_slot)
    READ
    capacity_1d = Shape <start = 2, end = 3> (past_key)
    capacity = Squeeze (capacity_1d)
    slot = Range (zero, capacity, one)
    new_1d = Shape <start = 1, end = 2> (query)
    new = Squeeze (new_1d)
    step = Range (zero, new, one)
    axis_one = Constant <value_ints = [1]> ()
    first_column = Unsqueeze (first_slot, axis_one)
    last_visible = Add (first_column, step)
    mask_axes = Constant <value_ints = [1, 3]> ()
    last_visible_4d = Unsqueeze (last_visible, mask_axes)
    visible = LessOrEqual (slot, last_visible_4d)
    attended = Attention <scale: float = @scale> (query_heads, key_read, value_read, visible)
    attended_tokens = Transpose <perm = [0, 2, 1, 3]> (attended)
    merged_shape = Concat <axis = 0> (keep_two, rest)
    output = Reshape (attended_tokens, merged_shape)
}
"""

_SEGMENTS = """
SegmentAttention <num_heads, scale> (query, key, value, cu_seqlens) => (output)
{
    one = Constant <value_int = 1> ()
    batch_axis = Constant <value_ints = [0]> ()
    bounds = Cast <to = 7> (cu_seqlens)
    num_bounds = Size (bounds)
    num_segments = Sub (num_bounds, one)
    keep_going = Constant <value = bool {1}> ()
    NODES
}
"""

# A loop over segments, so that memory grows with the longest segment and not with the sum of all.
_SEGMENT_LOOP = """
    none_yet = SequenceEmpty <dtype = 1> ()
    segments = Loop (num_segments, keep_going, none_yet) <body = one_segment
        (int64 segment, bool condition, seq(float[rows, width]) done) =>
        (bool condition_out, seq(float[rows, width]) done_out)
    {
        condition_out = Identity (condition)
        begin = Gather (bounds, segment)
        next = Add (segment, one)
        end = Gather (bounds, next)
        begin_1d = Unsqueeze (begin, batch_axis)
        end_1d = Unsqueeze (end, batch_axis)
        query_rows = Slice (query, begin_1d, end_1d, batch_axis)
        key_rows = Slice (key, begin_1d, end_1d, batch_axis)
        value_rows = Slice (value, begin_1d, end_1d, batch_axis)
        query_batch = Unsqueeze (query_rows, batch_axis)
        key_batch = Unsqueeze (key_rows, batch_axis)
        value_batch = Unsqueeze (value_rows, batch_axis)
        attended = KERNEL (query_batch, key_batch, value_batch)
        attended_rows = Squeeze (attended, batch_axis)
        done_out = SequenceInsert (done, attended_rows)
    }>
    OUTPUT = ConcatFromSequence <axis = 0> (segments)
"""

# Equal segments are one batch.
_SEGMENT_BATCH = """
    first_1d = Constant <value_ints = [1]> ()
    last_1d = Constant <value_ints = [-1]> ()
    behind_all = Constant <value_ints = [9223372036854775807]> ()
    begins = Slice (bounds, batch_axis, last_1d, batch_axis)
    ends = Slice (bounds, first_1d, behind_all, batch_axis)
    lengths = Sub (ends, begins)
    longest = ReduceMax <keepdims = 1> (lengths)
    shortest = ReduceMin <keepdims = 1> (lengths)
    all_equal = Equal (longest, shortest)
    batch = Reshape (num_segments, first_1d)
    batch_shape = Concat <axis = 0> (batch, longest, last_1d)
    rows_shape = Shape (query)
    output = If (all_equal) <
        then_branch = one_batch () => (float[rows, width] output_batch)
        {
            query_batch = Reshape (query, batch_shape)
            key_batch = Reshape (key, batch_shape)
            value_batch = Reshape (value, batch_shape)
            attended = KERNEL (query_batch, key_batch, value_batch)
            output_batch = Reshape (attended, rows_shape)
        },
        else_branch = one_by_one () => (float[rows, width] output_loop)
        {
            LOOP
        }
    >
"""

# A loop over the experts that were chosen at all; each sees only its own tokens (a token whose weight
# underflowed to zero would add zero).
_MOE_EXPERTS = """
MoEExperts <top_k, norm_topk_prob> (x, router_logits, gate_up_proj, down_proj) => (output)
{
    zero = Constant <value_float = 0.0> ()
    last_axis = Constant <value_ints = [-1]> ()
    tokens = Flatten <axis = -1> (x)
    logits = Flatten <axis = -1> (router_logits)
    probabilities = Softmax <axis = -1> (logits)
    top_k_scalar = Constant <value_int: int = @top_k> ()
    top_k_1d = Reshape (top_k_scalar, last_axis)
    top, chosen = TopK <axis = -1> (probabilities, top_k_1d)
    sum = ReduceSum <keepdims = 1> (top, last_axis)
    normalized = Div (top, sum)
    normalize_int = Constant <value_int: int = @norm_topk_prob> ()
    normalize = Cast <to = 9> (normalize_int)
    weights = Where (normalize, normalized, top)
    active, active_first, active_inverse, active_counts = Unique <sorted = 1> (chosen)
    num_active = Size (active)
    tokens_shape = Shape (tokens)
    nothing = ConstantOfShape <value = float[1] {0.0}> (tokens_shape)
    keep_going = Constant <value = bool {1}> ()
    mixed = Loop (num_active, keep_going, nothing) <body = one_expert
        (int64 turn, bool condition, float[n, h] mixed_in) => (bool condition_out, float[n, h] mixed_out)
    {
        condition_out = Identity (condition)
        expert = Gather (active, turn)
        hit = Equal (chosen, expert)
        hit_weights = Where (hit, weights, zero)
        weight_of_token = ReduceSum <keepdims = 0> (hit_weights, last_axis)
        rows_as_columns = NonZero (weight_of_token)
        rows = Transpose <perm = [1, 0]> (rows_as_columns)
        routed = GatherND (tokens, rows)
        gate_up_matrix = Gather (gate_up_proj, expert)
        gate_up = MatMul (routed, gate_up_matrix)
        gate, up = Split <axis = -1, num_outputs = 2> (gate_up)
        silu = Swish (gate)
        activated = Mul (silu, up)
        down_matrix = Gather (down_proj, expert)
        result = MatMul (activated, down_matrix)
        row_weights = Gather (weight_of_token, rows)
        weighted = Mul (result, row_weights)
        mixed_out = ScatterND <reduction = "add"> (mixed_in, rows, weighted)
    }>
    shape = Shape (x)
    output = Reshape (mixed, shape)
}
"""

_DEEP_STACK_ADD = """
DeepStackAdd <layer> (hidden_states, deepstack_embeds, deepstack_index) => (output)
{
    column_axis = Constant <value_ints = [1]> ()
    layer_index = Constant <value_int: int = @layer> ()
    width = Shape <start = -1> (hidden_states)
    begin = Mul (width, layer_index)
    end = Add (begin, width)
    slice = Slice (deepstack_embeds, begin, end, column_axis)
    rows = Gather <axis = 0> (slice, deepstack_index)
    output = Add (hidden_states, rows)
}
"""


def segment_attention(kernel: str, *, batches: bool = False) -> str:
    """Text of SegmentAttention around an attention operator that takes ``[N, rows, heads * D]`` each of q, k, v.

    Args:
        kernel: operator with its attributes, e.g. ``Attention <scale: float = @scale>``.
        batches: hand segments of equal length to the operator as one batch; its memory must then not grow with the
            square of a segment's length times their number.
    """
    if batches:
        nodes = _SEGMENT_BATCH.replace("LOOP", _SEGMENT_LOOP.replace("OUTPUT", "output_loop"))
    else:
        nodes = _SEGMENT_LOOP.replace("OUTPUT", "output")
    return _SEGMENTS.replace("NODES", nodes).replace("KERNEL", kernel)


def cached_attention(
    name: str = "CachedAttention", *, scales: str = "", constants: str = "", store: str = "", read: str = ""
) -> str:
    """The definition of attention over a KV cache.

    Args:
        name: of the operator.
        scales: further inputs.
        constants: nodes ``store`` and ``read`` need.
        store: nodes that make ``key_stored`` and ``value_stored``, as they lie in the cache, from ``key_heads`` and
            ``value_heads``; empty where they are the same.
        read: nodes that make ``key_read`` and ``value_read`` from ``present_key`` and ``present_value``; likewise.
    """
    text = _CACHED_ATTENTION
    for part in ("key", "value"):
        text = text if store else text.replace(f"{part}_stored", f"{part}_heads")
        text = text if read else text.replace(f"{part}_read", f"present_{part}")
    for placeholder, nodes in {"SCALES": scales, "CONSTANTS": constants, "STORE": store, "READ": read}.items():
        text = text.replace(placeholder, nodes)
    return text.replace("NAME", name)


_STANDARD_KERNEL = "Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @scale>"
_TEXTS = (
    _M_ROTARY_COS_SIN,
    cached_attention(),
    segment_attention(_STANDARD_KERNEL),
    _MOE_EXPERTS,
    _DEEP_STACK_ADD,
)


@cache
def _definitions() -> Mapping[str, onnx.FunctionProto]:
    return MappingProxyType(parse_functions(_TEXTS))


def parse_functions(texts: Iterable[str], **opset_imports: int) -> dict[str, onnx.FunctionProto]:
    """Parse operator bodies.

    Args:
        texts: functions in ONNX's textual syntax.
        **opset_imports: further domains the bodies use, dots written as underscores (``com_microsoft=1``).

    Returns:
        The functions by operator name.
    """
    imports = {"": OPSET} | {domain.replace("_", "."): version for domain, version in opset_imports.items()}
    listed = ", ".join(f'"{domain}" : {version}' for domain, version in imports.items())
    header = f'<domain: "{DOMAIN}", opset_import: [{listed}]>'
    parsed = [onnx.parser.parse_function(header + text) for text in texts]
    return {proto.name: proto for proto in parsed}


def function_proto(name: str) -> onnx.FunctionProto:
    """The definition of one operator.

    Raises:
        KeyError: there is no such operator.
    """
    return _definitions()[name]


def attach_functions(model: ir.Model) -> None:
    """Give ``model`` the definitions of the ``deepstitch`` operators it uses."""
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(used):
        function = ir.serde.deserialize_function(function_proto(name))
        model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = VERSION
