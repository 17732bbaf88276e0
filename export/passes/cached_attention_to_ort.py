"""CachedAttention to ONNX Runtime's GroupQueryAttention, with a faster form of it for one new token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deepstitch.export.functions import DOMAIN, parse_functions

__all__ = ["CachedAttentionToOrt"]

# Measured: with two query heads per key/value head, or over a short cache, the kernel as it is was faster.
_LEAST_GROUP = 4
_LEAST_TOKENS = 1024  # divided by the group

# The kernel writes the cache itself, in place where past and present are bound to the same memory.
_KERNEL = """
OrtCachedAttention <num_heads, kv_num_heads, scale>
    (query, key, value, past_key, past_value, last_positions, longest) => (output, present_key, present_value)
{
    output, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale>
        (query, key, value, past_key, past_value, last_positions, longest)
}
"""

# In `grouped` the query heads of one key/value head stand in for successive tokens that all see the whole cache. The
# kernel takes queries without new keys, so the new key and value are written first.
_KERNEL_OR_GROUPED = """
OrtGroupedAttention <num_heads, kv_num_heads, scale>
    (query, key, value, past_key, past_value, last_positions, longest, first_slot, nothing, one_row)
    => (output, present_key, present_value)
{
    output, present_key, present_value = If (one_row) <
        then_branch = grouped () => (float[b, s, w] output_g, float[b, h, c, d] key_g, float[b, h, c, d] value_g)
        {
            one = Constant <value_ints = [1]> ()
            rest = Constant <value_ints = [-1]> ()
            heads_scalar = Constant <value_int: int = @num_heads> ()
            kv_heads_scalar = Constant <value_int: int = @kv_num_heads> ()
            group_scalar = Div (heads_scalar, kv_heads_scalar)
            kv_heads = Reshape (kv_heads_scalar, rest)
            group = Reshape (group_scalar, rest)
            cache_shape = Concat <axis = 0> (one, kv_heads, one, rest)
            new_key = Reshape (key, cache_shape)
            new_value = Reshape (value, cache_shape)
            key_g = TensorScatter <axis = 2, mode = "linear"> (past_key, new_key, first_slot)
            value_g = TensorScatter <axis = 2, mode = "linear"> (past_value, new_value, first_slot)
            by_group_shape = Concat <axis = 0> (one, kv_heads, group, rest)
            query_by_group = Reshape (query, by_group_shape)
            query_as_tokens = Transpose <perm = [0, 2, 1, 3]> (query_by_group)
            tokens_shape = Concat <axis = 0> (one, group, rest)
            query_tokens = Reshape (query_as_tokens, tokens_shape)
            attended = com.microsoft.GroupQueryAttention
                <num_heads: int = @kv_num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, causal = 0>
                (query_tokens, nothing, nothing, key_g, value_g, last_positions, longest)
            by_token_shape = Concat <axis = 0> (one, group, kv_heads, rest)
            attended_by_token = Reshape (attended, by_token_shape)
            attended_by_group = Transpose <perm = [0, 2, 1, 3]> (attended_by_token)
            merged_shape = Concat <axis = 0> (one, one, rest)
            output_g = Reshape (attended_by_group, merged_shape)
        },
        else_branch = kernel () => (float[b, s, w] output_k, float[b, h, c, d] key_k, float[b, h, c, d] value_k)
        {
            output_k, key_k, value_k = com.microsoft.GroupQueryAttention
                <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale>
                (query, key, value, past_key, past_value, last_positions, longest)
        }
    >
}
"""


class CachedAttentionToOrt(ir.passes.InPlacePass):
    """``deepstitch.CachedAttention`` becomes ``com.microsoft.GroupQueryAttention``.

    1. Lengths are computed once for all layers.
    2. For one new token of one row the kernel runs with its roles changed: the ``g`` query heads that share a key/value
       head become ``g`` queries of that one head, so that each key and value is read once instead of ``g`` times.
    3. That form is taken where it is faster: four or more heads that share, and 1024 / g or more tokens. (The kernel
       itself needs as many tokens as there are queries.)

    Ensures: no CachedAttention node is left.
    """

    def __init__(self, *, grouped: bool = True) -> None:
        """Take whether rule 2 applies at all."""
        super().__init__()
        self.grouped = grouped

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "CachedAttention")]
        if not nodes:
            return ir.passes.PassResult(model, False)
        last_positions, longest = _lengths(model.graph, nodes[0])
        grouped = [node for node in nodes if self.grouped and _group(node) >= _LEAST_GROUP]
        extra = _grouped_inputs(model.graph, grouped[0], longest) if grouped else ()
        for node in nodes:
            node.op_type = "OrtGroupedAttention" if node in grouped else "OrtCachedAttention"
            values = (last_positions, longest, *(extra if node in grouped else ()))
            node.resize_inputs(5 + len(values))
            for index, value in enumerate(values, start=5):
                node.replace_input_with(index, value)
        for proto in parse_functions((_KERNEL, _KERNEL_OR_GROUPED), com_microsoft=1).values():
            function = ir.serde.deserialize_function(proto)
            if any(node.op_type == function.name for node in nodes):
                model.functions[function.identifier()] = function
        model.graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that every CachedAttention node was replaced."""
        if any(node.op_type == "CachedAttention" for node in model.graph):
            raise ir.passes.PostconditionError("a CachedAttention node is left")


def _group(node: ir.Node) -> int:
    return node.attributes.get_int("num_heads") // node.attributes.get_int("kv_num_heads")


def _lengths(graph: ir.Graph, first: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Last valid cache slot of each row, and the largest number of valid slots."""
    past_lengths, query_lengths = first.inputs[5:7]
    one = ir.node("Constant", [], {"value": ir.tensor([1], ir.DataType.INT32)})
    total = ir.node("Add", [past_lengths, query_lengths])
    last = ir.node("Sub", [total.outputs[0], one.outputs[0]])
    longest = ir.node("ReduceMax", [total.outputs[0]], {"keepdims": 1})
    graph.insert_before(first, (one, total, last, longest))
    return last.outputs[0], longest.outputs[0]


def _grouped_inputs(graph: ir.Graph, first: ir.Node, longest: ir.Value) -> tuple[ir.Value, ...]:
    """Slot of the first new token, no keys at all, and whether this call is one for the other form."""
    query, key, past_lengths, group = first.inputs[0], first.inputs[1], first.inputs[5], _group(first)
    one = ir.node("Constant", [], {"value_ints": [1]})
    least = ir.node("Constant", [], {"value": ir.tensor([max(_LEAST_TOKENS // group, group)], ir.DataType.INT32)})
    slot = ir.node("Cast", [past_lengths], {"to": ir.DataType.INT64})
    assert key is not None and key.shape is not None
    width = key.shape[-1]
    assert isinstance(width, int)
    no_keys: npt.NDArray[np.float32] = np.zeros([1, 0, width], np.float32)
    nothing = ir.node("Constant", [], {"value": ir.tensor(no_keys)})
    shape = ir.node("Shape", [query], {"start": 0, "end": 2})
    tokens = ir.node("ReduceProd", [shape.outputs[0]], {"keepdims": 1})
    single = ir.node("Equal", [tokens.outputs[0], one.outputs[0]])
    enough = ir.node("GreaterOrEqual", [longest, least.outputs[0]])
    both = ir.node("And", [single.outputs[0], enough.outputs[0]])
    nodes = (one, least, slot, nothing, shape, tokens, single, enough, both)
    graph.insert_before(first, nodes)
    return slot.outputs[0], nothing.outputs[0], both.outputs[0]
