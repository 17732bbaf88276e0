"""DeepStackAdd to its plugin."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN
from deepstitch.export.passes.plugin_nodes import plugin_node
from deepstitch.plugins.deepstack_add.schema import SCHEMA

__all__ = ["DeepStackToPlugin"]


class DeepStackToPlugin(ir.passes.InPlacePass):
    """``deepstitch.DeepStackAdd`` becomes ``deepstitch.plugins.DeepStackAdd``, which takes the same inputs.

    Ensures: no DeepStackAdd of the canonical graph is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "DeepStackAdd")]
        for node in nodes:
            added = plugin_node(SCHEMA, {"layer": node.attributes.get_int("layer")}, node.inputs, like=node)
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [added], [node.outputs[0]], [added.outputs[0]]
            )
        return ir.passes.PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """Check that every DeepStackAdd was replaced."""
        if any((node.domain, node.op_type) == (DOMAIN, "DeepStackAdd") for node in model.graph):
            raise ir.passes.PostconditionError("a DeepStackAdd node is left")
