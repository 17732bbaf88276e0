"""``portable``: plain ONNX, the reference every other target is compared with."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.lower import Target
from deepstitch.export.passes.constant_reshapes import ConstantReshapes
from deepstitch.export.passes.inline_functions import InlineFunctions
from deepstitch.export.passes.name_nodes import NameNodes
from deepstitch.export.passes.split_sequences import SplitSequences
from deepstitch.export.passes.transpose_weights import TransposeWeights
from deepstitch.export.weights import WeightPlan

__all__ = ["TARGET"]


def _passes(plan: WeightPlan) -> list[ir.passes.InPlacePass]:
    return [ConstantReshapes(), SplitSequences(), TransposeWeights(plan), InlineFunctions(), NameNodes()]


TARGET = Target(name="portable", passes=_passes, batched_continuation=True)
