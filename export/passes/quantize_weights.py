"""Put DequantizeLinear in front of the readers of weights that are stored as integers."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.quantize.recipe import is_expert
from deepstitch.export.weights import WeightPlan

__all__ = ["QuantizeWeights"]


class QuantizeWeights(ir.passes.InPlacePass):
    """A weight of the recipe becomes ``DequantizeLinear(values, scales, zero_points)``, blocks along its inputs.

    1. A linear weight ``[N, K]`` is replaced by the node's output.
    2. Experts ``[E, K, N]`` are stored as ``[E, N, K]``, so a Transpose follows.

    Ensures: no floating-point initializer is left for a parameter of the recipe.
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        modified = False
        for value in list(model.graph.initializers.values()):
            if self.plan.quantized(value) is not None and value.uses():
                self._rewrite(value, model.graph)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, value: ir.Value, graph: ir.Graph) -> None:
        weight = self.plan.quantized(value)
        assert weight is not None
        users = list(value.uses())
        value.name = weight.name  # a tied head is the embedding
        inputs = self.plan.add_quantized(weight, "onnx", graph)
        axis = len(weight.shape) - 1
        node = ir.node("DequantizeLinear", inputs, {"axis": axis, "block_size": weight.stored.block})
        nodes = [node]
        if is_expert(weight.name):
            nodes.append(ir.node("Transpose", [node.outputs[0]], {"perm": [0, 2, 1]}))
        shape = weight.shape
        for each in nodes:
            each.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            each.outputs[0].shape = ir.Shape(shape)
            each.metadata_props.update(users[0].node.metadata_props)
            shape = (*shape[:-2], shape[-1], shape[-2])
        for user, index in users:
            user.replace_input_with(index, nodes[-1].outputs[0])
        graph.insert_before(next(iter(graph)), nodes)

    def ensures(self, model: ir.Model) -> None:
        """Check that every parameter of the recipe is read through DequantizeLinear."""
        for value in model.graph.initializers.values():
            if self.plan.quantized(value) is not None:
                readers = {node.op_type for node, _ in value.uses()}
                if readers - {"DequantizeLinear"}:
                    raise ir.passes.PostconditionError(f"'{value.name}' is read by {sorted(readers)}")
