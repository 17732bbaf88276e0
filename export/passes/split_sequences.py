"""Splitting into a sequence and taking its elements, as one Split."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["SplitSequences"]


class SplitSequences(ir.passes.InPlacePass):
    """``SequenceAt(SplitToSequence(x, sizes), i)`` becomes output ``i`` of ``Split(x, sizes)``.

    1. Sizes and positions must be constants, and every reader of the sequence such a SequenceAt.

    A sequence holds copies of its elements, and taking one out of it copies again.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "SplitToSequence" and node.domain == "":
                modified |= _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else ir.convenience.get_const_tensor(value)


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    sizes = _constant(node, 1)
    readers = [reader for reader, _ in node.outputs[0].uses()]
    if sizes is None or sizes.size == 1 or any(reader.op_type != "SequenceAt" for reader in readers):
        return False
    places = [place for reader in readers if (place := _constant(reader, 1)) is not None]
    if len(places) != len(readers):
        return False
    split = ir.node("Split", node.inputs[:2], {"axis": node.attributes.get_int("axis", 0)}, num_outputs=int(sizes.size))
    split.metadata_props.update(node.metadata_props)
    graph.insert_before(node, split)
    for reader, place in zip(readers, places, strict=True):
        taken, output = reader.outputs[0], split.outputs[int(place.numpy())]
        output.shape, output.type = taken.shape, taken.type
        ir.convenience.replace_all_uses_with(taken, output)
        graph.remove(reader, safe=True)
    graph.remove(node, safe=True)
    return True
