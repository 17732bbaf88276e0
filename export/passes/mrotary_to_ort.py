"""Multimodal rotary embedding to ONNX Runtime's MRotaryEmbedding."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN

__all__ = ["MRotaryToOrt"]

_INTERLEAVED_LAYOUT = 1  # the rule of Qwen3-VL; 0 is Qwen2.5-VL's sections


class MRotaryToOrt(ir.passes.InPlacePass):
    """RotaryEmbedding fed by MRotaryCosSin becomes ``com.microsoft.MRotaryEmbedding`` layout 1.

    The operator looks positions up in a cosine table. A table up to the longest context would be weights of
    hundreds of megabytes, so the table holds just the ``3*B*S`` positions of this call and the operator is
    given their row numbers.

    1. Once per graph: ``angles = position_ids.flatten() * inv_freq``, its cosine and sine, and row numbers
       ``[3, B, S]``.
    2. Every RotaryEmbedding on MRotaryCosSin's outputs takes those and selects t, h, w inside the kernel.

    Ensures: no MRotaryCosSin node is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        sources = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "MRotaryCosSin")]
        for node in sources:
            self._rewrite(model.graph, node)
        if sources:
            model.graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, bool(sources))

    def _rewrite(self, graph: ir.Graph, source: ir.Node) -> None:
        position_ids, inv_freq = source.inputs
        section = source.attributes.get_ints("mrope_section")
        column = ir.node("Constant", [], {"value_ints": [-1, 1]})
        flat = ir.node("Reshape", [position_ids, column.outputs[0]])
        as_float = ir.node("Cast", [flat.outputs[0]], {"to": ir.DataType.FLOAT})
        angles = ir.node("Mul", [as_float.outputs[0], inv_freq])
        cos, sin = (ir.node(op, [angles.outputs[0]]) for op in ("Cos", "Sin"))
        zero, one = (ir.node("Constant", [], {"value_int": number}) for number in (0, 1))
        count = ir.node("Size", [position_ids])
        numbers = ir.node("Range", [zero.outputs[0], count.outputs[0], one.outputs[0]])
        shape = ir.node("Shape", [position_ids])
        rows = ir.node("Reshape", [numbers.outputs[0], shape.outputs[0]])
        graph.insert_before(source, (column, flat, as_float, angles, cos, sin, zero, one, count, numbers, shape, rows))
        for rotary in dict.fromkeys(user for output in source.outputs for user, _ in output.uses()):
            rotated = ir.node(
                "MRotaryEmbedding",
                [rotary.inputs[0], rows.outputs[0], cos.outputs[0], sin.outputs[0]],
                {
                    "num_heads": rotary.attributes.get_int("num_heads"),
                    "mrope_section": section,
                    "mrope_layout": _INTERLEAVED_LAYOUT,
                },
                domain="com.microsoft",
            )
            rotated.metadata_props.update(rotary.metadata_props)
            ir.convenience.replace_nodes_and_values(
                graph, rotary, [rotary], [rotated], [rotary.outputs[0]], [rotated.outputs[0]]
            )
        graph.remove(source, safe=True)

    def ensures(self, model: ir.Model) -> None:
        """Check that every MRotaryCosSin node was replaced."""
        if any(node.op_type == "MRotaryCosSin" for node in model.graph):
            raise ir.passes.PostconditionError("a MRotaryCosSin node is left")
