"""``ort-cpu``: ONNX Runtime's fused CPU kernels."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import parse_functions, segment_attention
from deepstitch.export.lower import Target
from deepstitch.export.passes.constant_reshapes import ConstantReshapes
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.moe_to_ort import MoEToOrt
from deepstitch.export.passes.mrotary_to_ort import MRotaryToOrt
from deepstitch.export.passes.name_nodes import NameNodes
from deepstitch.export.passes.transpose_weights import TransposeWeights
from deepstitch.export.weights import WeightPlan

__all__ = ["TARGET"]

# The kernel writes the cache itself, in place where past and present are bound to the same memory.
_CACHED_ATTENTION = """
CachedAttention <num_heads, kv_num_heads, scale>
    (query, key, value, past_key, past_value, past_lengths, query_lengths) => (output, present_key,
    present_value)
{
    one = Constant <value = int32[1] {1}> ()
    total_lengths = Add (past_lengths, query_lengths)
    last_positions = Sub (total_lengths, one)
    longest = ReduceMax <keepdims = 1> (total_lengths)
    output, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale>
        (query, key, value, past_key, past_value, last_positions, longest)
}
"""

# The kernel does not hold a whole score matrix.
_VISION_KERNEL = "com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>"


def _passes(plan: WeightPlan) -> list[ir.passes.InPlacePass]:
    return [
        ConstantReshapes(),
        MoEToOrt(plan),
        MRotaryToOrt(),
        TransposeWeights(plan),
        InlineFunctions(parse_functions((_CACHED_ATTENTION, segment_attention(_VISION_KERNEL)), com_microsoft=1)),
        NameNodes(),
    ]


# GroupQueryAttention on the CPU refuses batch > 1 with several new tokens over a filled cache.
TARGET = Target(name="ort-cpu", passes=_passes, batched_continuation=False)
