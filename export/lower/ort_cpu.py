"""``ort-cpu``: ONNX Runtime's fused CPU kernels."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import parse_functions, segment_attention
from deepstitch.export.kv_functions import ORT_CPU_TEXTS
from deepstitch.export.lower import Target
from deepstitch.export.passes.cached_attention_to_ort import CachedAttentionToOrt
from deepstitch.export.passes.constant_reshapes import ConstantReshapes
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.linear_to_nbits import LinearToNBits
from deepstitch.export.passes.moe_to_ort import MoEToOrt
from deepstitch.export.passes.name_nodes import NameNodes
from deepstitch.export.passes.scatter_deepstack import ScatterDeepStack
from deepstitch.export.passes.split_sequences import SplitSequences
from deepstitch.export.passes.transpose_weights import TransposeWeights
from deepstitch.export.weights import WeightPlan

__all__ = ["TARGET"]

# The kernel does not hold a whole score matrix.
_SEGMENT_ATTENTION = segment_attention(
    "com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>", batches=True
)


def _passes(plan: WeightPlan) -> list[ir.passes.InPlacePass]:
    return [
        ConstantReshapes(),
        SplitSequences(),
        MoEToOrt(plan),
        LinearToNBits(plan),
        ScatterDeepStack(),
        CachedAttentionToOrt(),
        TransposeWeights(plan),
        InlineFunctions(parse_functions((_SEGMENT_ATTENTION, *ORT_CPU_TEXTS), com_microsoft=1)),
        NameNodes(),
    ]


# GroupQueryAttention on the CPU refuses batch > 1 with several new tokens over a filled cache.
TARGET = Target(name="ort-cpu", passes=_passes, batched_continuation=False)
