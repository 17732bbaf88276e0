"""What the TensorRT targets share: plugins for what has no operator there, and weights as their kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from deepstitch.errors import UnsupportedError
from deepstitch.export.kv_functions import KV_CACHES
from deepstitch.export.lower import Target
from deepstitch.export.passes.attention_to_plugin import ATTENTIONS, AttentionToPlugin
from deepstitch.export.passes.constant_reshapes import ConstantReshapes
from deepstitch.export.passes.declare_opset import DeclareOpset, Dialect
from deepstitch.export.passes.deepstack_to_plugin import DeepStackToPlugin
from deepstitch.export.passes.head_norms_to_plugin import HeadNormsToPlugin
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.linear_to_half import LinearToHalf
from deepstitch.export.passes.linear_to_plugin import LinearToPlugin
from deepstitch.export.passes.moe_to_plugin import MoEToPlugin
from deepstitch.export.passes.name_nodes import NameNodes
from deepstitch.export.passes.norms_to_plugin import NormsToPlugin
from deepstitch.export.passes.older_operators import OlderOperators
from deepstitch.export.passes.split_sequences import SplitSequences
from deepstitch.export.passes.transpose_weights import TransposeWeights
from deepstitch.export.weights import WeightPlan

if TYPE_CHECKING:
    from deepstitch.export.exporter import ExportConfig

__all__ = ["tensorrt_target"]


def tensorrt_target(name: str, dialect: Dialect, *, half_arithmetic: bool) -> Target:
    """A target.

    Args:
        name: of the target.
        dialect: of its oldest parser.
        half_arithmetic: linear layers over fp16 weights are multiplied in fp16 and summed in fp32; else a plugin reads
            them, and multiplies in fp32.
    """

    def passes(plan: WeightPlan) -> list[ir.passes.InPlacePass]:
        return [
            ConstantReshapes(),
            SplitSequences(),
            HeadNormsToPlugin(),
            NormsToPlugin(),  # before the linear layers, which take what additions are left
            MoEToPlugin(plan),
            LinearToPlugin(plan, halves=not half_arithmetic),
            DeepStackToPlugin(),
            AttentionToPlugin(),
            OlderOperators(dialect.opset),
            TransposeWeights(plan),
            *([LinearToHalf(plan)] if half_arithmetic else []),
            InlineFunctions(),
            NameNodes(),
            DeclareOpset(dialect),
        ]

    return Target(
        name=name,
        passes=passes,
        batched_continuation=True,
        check=_refusal(name),
    )


def _refusal(name: str) -> Callable[[ExportConfig], None]:
    def check(config: ExportConfig) -> None:
        """Refuse what no kernel reads, before any work.

        Raises:
            UnsupportedError: a flag asks for it.
        """
        kinds = [kind.name for kind in KV_CACHES.values() if kind.operator in ATTENTIONS]
        if config.kv_cache not in kinds:
            raise UnsupportedError(
                f"--kv-cache {config.kv_cache}: --target {name} keeps keys and values as {', '.join(kinds)}"
            )
        if config.by_reference:
            raise UnsupportedError(
                f"--by-reference: --target {name} stores weights in another order than the checkpoint; leave the flag "
                "out"
            )
        if not config.quantization.symmetric:
            raise UnsupportedError(
                f"--asymmetric: the kernels behind --target {name} have no zero points; leave the flag out"
            )

    return check
