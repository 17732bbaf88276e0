"""Store linear weights the way MatMul reads them."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.weights import Relayout, WeightPlan

__all__ = ["TransposeWeights"]


class TransposeWeights(ir.passes.InPlacePass):
    """``MatMul(x, Transpose(W))`` becomes ``MatMul(x, W')`` with W' written transposed.

    1. W must be a checkpoint matrix whose only reader is that Transpose.
    2. W must not be shared (a tied head reads the embedding's own bytes).
    3. W must not stay in the checkpoint's own bytes.
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        modified = False
        for node in list(model.graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is None or not self.plan.is_parameter(weight):
                continue
            if len(weight.uses()) != 1 or not self.plan.may_move(weight):
                continue
            if self.plan.is_referenced(weight.name or ""):
                continue
            relayout = Relayout.transpose(self.plan.shape(weight))
            self.plan.relayout(weight, relayout, model.graph, node)
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)
