"""DeepStackAdd with the bounds of its slice as constants."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN

__all__ = ["DeepStackToSlices"]


class DeepStackToSlices(ir.passes.InPlacePass):
    """``deepstitch.DeepStackAdd`` becomes Slice, Gather and Add.

    1. The definition computes the bounds of the layer's slice from a shape; here they are constants, so that nothing of
       it is computed on the CPU.

    Ensures: no DeepStackAdd node is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "DeepStackAdd")]
        for node in nodes:
            hidden, embeds, index = node.inputs
            assert hidden is not None and hidden.shape is not None
            width, layer = hidden.shape[-1], node.attributes.get_int("layer")
            assert isinstance(width, int)
            bounds = [layer * width], [(layer + 1) * width], [1]
            constants = [ir.node("Constant", [], {"value_ints": each}) for each in bounds]
            slice_ = ir.node("Slice", [embeds, *(each.outputs[0] for each in constants)])
            rows = ir.node("Gather", [slice_.outputs[0], index], {"axis": 0})
            added = ir.node("Add", [hidden, rows.outputs[0]])
            for value in (rows.outputs[0], added.outputs[0]):
                value.shape, value.type = hidden.shape, hidden.type
            for each in (slice_, rows, added):
                each.metadata_props.update(node.metadata_props)
            ir.convenience.replace_nodes_and_values(
                model.graph,
                node,
                [node],
                [*constants, slice_, rows, added],
                [node.outputs[0]],
                [added.outputs[0]],
            )
        return ir.passes.PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """Check that every DeepStackAdd node was replaced."""
        if any(node.op_type == "DeepStackAdd" for node in model.graph):
            raise ir.passes.PostconditionError("a DeepStackAdd node is left")
