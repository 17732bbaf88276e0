"""Norm and rotation of query and key heads to the RMSNormRope plugin."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN
from deepstitch.export.passes.plugin_nodes import plugin_node
from deepstitch.plugins.rms_norm_rope.schema import SCHEMA

__all__ = ["HeadNormsToPlugin"]


class HeadNormsToPlugin(ir.passes.InPlacePass):
    """``RotaryEmbedding(Reshape(RMSNormalization(Reshape(x))), MRotaryCosSin(positions))`` becomes one node.

    1. The plugin reads the projection as it is, the positions as INT32, and the frequencies.
    2. Cosine and sine are not stored; MRotaryCosSin goes once nobody reads it.

    Ensures: no rotation by MRotaryCosSin is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        rotations = [node for node in model.graph if _angles(node) is not None]
        for node in rotations:
            self._rewrite(model.graph, node)
        return ir.passes.PassResult(model, bool(rotations))

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> None:
        angles = _angles(node)
        norm = _behind(_behind(node, "Reshape"), "RMSNormalization")
        split = _behind(norm, "Reshape")
        if angles is None or norm is None or split is None:
            return
        position_ids, inv_freq = angles.inputs
        positions = ir.node("Cast", [position_ids], {"to": ir.DataType.INT32})
        attributes = {
            "mode": "norm_rope",
            "epsilon": norm.attributes.get_float("epsilon", 1e-5),
            "num_heads": node.attributes.get_int("num_heads"),
            "mrope_section": list(angles.attributes.get_ints("mrope_section")),
        }
        inputs = [split.inputs[0], norm.inputs[1], positions.outputs[0], inv_freq]
        fused = plugin_node(SCHEMA, attributes, inputs, like=norm)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [positions, fused], [node.outputs[0]], [fused.outputs[0]]
        )

    def ensures(self, model: ir.Model) -> None:
        """Check that every rotation by positions was taken."""
        left = [node.name for node in model.graph if _angles(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"rotations without a norm of the heads: {left}")


def _angles(node: ir.Node) -> ir.Node | None:
    """The MRotaryCosSin a rotation reads."""
    cos = node.inputs[1] if node.op_type == "RotaryEmbedding" and node.domain == "" else None
    producer = cos.producer() if cos is not None else None
    found = producer is not None and (producer.domain, producer.op_type) == (DOMAIN, "MRotaryCosSin")
    return producer if found else None


def _behind(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The node that makes the first input, if it is of that type and nothing else reads it."""
    value = node.inputs[0] if node is not None else None
    producer = value.producer() if value is not None else None
    if value is None or producer is None or producer.op_type != op_type or len(value.uses()) != 1:
        return None
    return producer
