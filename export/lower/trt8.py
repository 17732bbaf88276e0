"""``trt8``: what TensorRT 8.6's parser takes, with our plugins; for SM61 first, hence fp32 arithmetic throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from deepstitch.errors import UnsupportedError
from deepstitch.export.kv_functions import KV_CACHES
from deepstitch.export.lower import Target
from deepstitch.export.passes.attention_to_plugin import ATTENTIONS, AttentionToPlugin
from deepstitch.export.passes.constant_reshapes import ConstantReshapes
from deepstitch.export.passes.deepstack_to_plugin import DeepStackToPlugin
from deepstitch.export.passes.head_norms_to_plugin import HeadNormsToPlugin
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.linear_to_plugin import LinearToPlugin
from deepstitch.export.passes.moe_to_plugin import MoEToPlugin
from deepstitch.export.passes.name_nodes import NameNodes
from deepstitch.export.passes.norms_to_plugin import NormsToPlugin
from deepstitch.export.passes.older_operators import OlderOperators
from deepstitch.export.passes.opset_17 import Opset17
from deepstitch.export.passes.split_sequences import SplitSequences
from deepstitch.export.passes.transpose_weights import TransposeWeights
from deepstitch.export.weights import WeightPlan

if TYPE_CHECKING:
    from deepstitch.export.exporter import ExportConfig

__all__ = ["TARGET"]


def _check(config: ExportConfig) -> None:
    """Refuse what no kernel reads, before any work.

    Raises:
        UnsupportedError: a flag asks for it.
    """
    kinds = [kind.name for kind in KV_CACHES.values() if kind.operator in ATTENTIONS]
    if config.kv_cache not in kinds:
        raise UnsupportedError(
            f"--kv-cache {config.kv_cache}: --target trt8 keeps keys and values as {', '.join(kinds)}"
        )
    if config.by_reference:
        raise UnsupportedError(
            "--by-reference: --target trt8 stores weights in another order than the checkpoint; leave the flag out"
        )
    if not config.quantization.symmetric:
        raise UnsupportedError("--asymmetric: the kernels behind --target trt8 have no zero points; leave the flag out")


def _passes(plan: WeightPlan) -> list[ir.passes.InPlacePass]:
    return [
        ConstantReshapes(),
        SplitSequences(),
        HeadNormsToPlugin(),
        NormsToPlugin(),  # before the linear layers, which take what additions are left
        MoEToPlugin(plan),
        LinearToPlugin(plan),
        DeepStackToPlugin(),
        AttentionToPlugin(),
        OlderOperators(),
        TransposeWeights(plan),
        InlineFunctions(),
        NameNodes(),
        Opset17(),
    ]


# ScatterND's result is not its input's memory in TensorRT.
TARGET = Target(name="trt8", passes=_passes, batched_continuation=True, kv_cache_in_place=False, check=_check)
