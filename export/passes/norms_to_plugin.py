"""RMSNormalization to the RMSNormRope plugin, together with the addition in front of it."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.passes.plugin_nodes import plugin_node
from deepstitch.plugins.rms_norm_rope.schema import SCHEMA

__all__ = ["NormsToPlugin", "sum_of_equals"]


class NormsToPlugin(ir.passes.InPlacePass):
    """``RMSNormalization`` becomes ``deepstitch.plugins.RMSNormRope`` with mode ``norm``.

    1. Where it norms a sum of two tensors of one shape, the plugin adds them and gives both sum and norm; it stands
       where the Add stood.
    2. Of two norms of one sum, the first takes it.

    Ensures: no RMSNormalization is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        norms = [node for node in model.graph if node.op_type == "RMSNormalization" and node.domain == ""]
        for node in norms:
            self._rewrite(model.graph, node)
        return ir.passes.PassResult(model, bool(norms))

    def _rewrite(self, graph: ir.Graph, norm: ir.Node) -> None:
        x, weight = norm.inputs
        add = sum_of_equals(x)
        attributes = {
            "mode": "norm",
            "epsilon": norm.attributes.get_float("epsilon", 1e-5),
            "has_residual": int(add is not None),
        }
        inputs = [*add.inputs, weight] if add is not None else [x, weight]
        fused = plugin_node(SCHEMA, attributes, inputs, like=norm)
        if add is None:
            ir.convenience.replace_nodes_and_values(graph, norm, [norm], [fused], [norm.outputs[0]], [fused.outputs[0]])
            return
        ir.convenience.replace_nodes_and_values(
            graph, add, [norm, add], [fused], [norm.outputs[0], add.outputs[0]], list(fused.outputs)
        )

    def ensures(self, model: ir.Model) -> None:
        """Check that every RMSNormalization was replaced."""
        if any(node.op_type == "RMSNormalization" for node in model.graph):
            raise ir.passes.PostconditionError("a RMSNormalization node is left")


def sum_of_equals(value: ir.Value | None) -> ir.Node | None:
    """The Add of two equally shaped tensors that makes a value."""
    add = value.producer() if value is not None else None
    if add is None or add.op_type != "Add" or add.domain != "":
        return None
    left, right = add.inputs
    if left is None or right is None or left.shape is None or left.shape != right.shape:
        return None
    return add
