"""``ort-cuda``: ONNX Runtime's CUDA kernels, from the releases on that still have code for compute capability 6.1.

Arithmetic is fp32, with two exceptions that are asked for: fp16 weights are multiplied in fp16, and a KV cache of fp16
is read by GroupQueryAttention in fp16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deepstitch.errors import UnsupportedError
from deepstitch.export.kv_functions import KV_CACHES
from deepstitch.export.lower import Target
from deepstitch.export.passes.attention_to_cuda import CUDA_CACHES, AttentionToCuda
from deepstitch.export.passes.constant_reshapes import ConstantReshapes
from deepstitch.export.passes.declare_opset import DeclareOpset, Dialect
from deepstitch.export.passes.deepstack_to_slices import DeepStackToSlices
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.linear_to_half import LinearToHalf
from deepstitch.export.passes.linear_to_nbits import LinearToNBits
from deepstitch.export.passes.moe_to_cuda import MoEToCuda
from deepstitch.export.passes.name_nodes import NameNodes
from deepstitch.export.passes.norms_to_ort import NormsToOrt
from deepstitch.export.passes.operators_to_ort import OperatorsToOrt
from deepstitch.export.passes.require_cuda_kernels import RequireCudaKernels
from deepstitch.export.passes.split_sequences import SplitSequences
from deepstitch.export.passes.transpose_weights import TransposeWeights
from deepstitch.export.weights import WeightPlan

if TYPE_CHECKING:
    from deepstitch.export.exporter import ExportConfig

__all__ = ["TARGET"]

# Newer opsets come to CUDA later than to ONNX; of this one, releases that still run on Pascal have all kernels.
_DIALECT = Dialect(
    parser="ONNX Runtime 1.20",
    opset=17,
    ir_version=8,
    has_int64=True,
    has_shape_parts=True,
    domains={"com.microsoft": 1},
)


def _check(config: ExportConfig) -> None:
    """Refuse what no CUDA kernel reads, before any work.

    Raises:
        UnsupportedError: a flag asks for it.
    """
    kinds = list(CUDA_CACHES.values())
    if config.kv_cache not in kinds:
        assert config.kv_cache in KV_CACHES
        raise UnsupportedError(
            f"--kv-cache {config.kv_cache}: --target ort-cuda keeps keys and values as {', '.join(kinds)}"
        )
    if config.by_reference:
        raise UnsupportedError(
            "--by-reference: --target ort-cuda stores weights in another order than the checkpoint; leave the flag out"
        )


def _passes(plan: WeightPlan) -> list[ir.passes.InPlacePass]:
    return [
        ConstantReshapes(),
        SplitSequences(),
        DeepStackToSlices(),  # before the norms, which take the addition too
        NormsToOrt(),
        OperatorsToOrt(),
        MoEToCuda(plan),
        LinearToNBits(plan, accuracy_level=0, takes_bias=False),
        AttentionToCuda(),
        TransposeWeights(plan),
        LinearToHalf(plan),
        InlineFunctions(),
        NameNodes(),
        DeclareOpset(_DIALECT),
        RequireCudaKernels(),
    ]


# GroupQueryAttention refuses batch > 1 with several new tokens over a filled cache.
TARGET = Target(name="ort-cuda", passes=_passes, batched_continuation=True, unbatched_caches=("fp16",), check=_check)
