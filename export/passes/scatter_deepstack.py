"""DeepStackAdd to an addition on the rows that have something to add."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN

__all__ = ["ScatterDeepStack"]


class ScatterDeepStack(ir.passes.InPlacePass):
    """``deepstitch.DeepStackAdd`` becomes ``ScatterND <reduction = "add">`` on the visual tokens.

    1. Once per graph: where ``deepstack_index`` is not zero, and the rows it names, split into one part per layer.
    2. Each DeepStackAdd scatters its part. Where there are no such tokens (text, decoding) it has nothing to do: the
       kernel works in the memory of its input.

    Ensures: no DeepStackAdd node is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        graph = model.graph
        nodes = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, "DeepStackAdd")]
        if not nodes:
            return ir.passes.PassResult(model, False)
        places, parts = _visual_rows(graph, nodes)
        for node in nodes:
            updates = parts[node.attributes.get_int("layer")]
            scatter = ir.node("ScatterND", [node.inputs[0], places, updates], {"reduction": "add"})
            scatter.metadata_props.update(node.metadata_props)
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [scatter], [node.outputs[0]], [scatter.outputs[0]]
            )
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check that every DeepStackAdd node was replaced."""
        if any(node.op_type == "DeepStackAdd" for node in model.graph):
            raise ir.passes.PostconditionError("a DeepStackAdd node is left")


def _visual_rows(graph: ir.Graph, nodes: Iterable[ir.Node]) -> tuple[ir.Value, list[ir.Value]]:
    """Where visual tokens stand, ``[n, 2]`` positions in ``[B, S]``, and what each layer adds to them, ``[n, H]``."""
    first = next(iter(nodes))
    hidden, embeds, index = first.inputs
    assert hidden is not None and hidden.shape is not None and embeds is not None and embeds.shape is not None
    width, total = hidden.shape[-1], embeds.shape[-1]
    assert isinstance(width, int) and isinstance(total, int)
    found = ir.node("NonZero", [index])
    places = ir.node("Transpose", [found.outputs[0]], {"perm": [1, 0]})
    numbers = ir.node("GatherND", [index, places.outputs[0]])
    rows = ir.node("Gather", [embeds, numbers.outputs[0]], {"axis": 0})
    split = ir.node("Split", [rows.outputs[0]], {"axis": -1, "num_outputs": total // width}, num_outputs=total // width)
    graph.insert_before(first, (found, places, numbers, rows, split))
    return places.outputs[0], list(split.outputs)
