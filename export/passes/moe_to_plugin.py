"""MoEExperts to its plugin."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.errors import UnsupportedError
from deepstitch.export.functions import DOMAIN
from deepstitch.export.passes.linear_to_plugin import LINEAR_GROUP, refuse_format, weight_format
from deepstitch.export.passes.plugin_nodes import plugin_node
from deepstitch.export.quantize.stored import QuantizedWeight
from deepstitch.export.weights import Relayout, WeightPlan
from deepstitch.plugins.moe_experts.schema import SCHEMA

__all__ = ["MoEToPlugin"]

_MOST_EXPERTS, _MOST_CHOSEN = 256, 16


class MoEToPlugin(ir.passes.InPlacePass):
    """``deepstitch.MoEExperts`` becomes ``deepstitch.plugins.MoEExperts`` over weights as its kernel reads them.

    1. Floats: the first weight ``[E, H, 2I]`` is stored as ``[E, 2I, H]``, the second ``[E, I, H]`` as ``[E, H, I]``.
    2. Integers lie so already; four int8 or eight int4 numbers are one INT32.

    Ensures: no MoEExperts of the canonical graph is left.
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "MoEExperts")]
        for node in nodes:
            self._rewrite(model.graph, node)
        return ir.passes.PassResult(model, bool(nodes))

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> None:
        hidden, logits, gate_up, down = node.inputs
        assert gate_up is not None and down is not None and down.shape is not None
        experts, intermediate, width = down.shape.numpy()
        top_k = node.attributes.get_int("top_k")
        _check(experts, top_k, intermediate, width)
        integers = [self._integers(value) for value in (gate_up, down)]
        weights: list[ir.Value] = []
        for value, integer in zip((gate_up, down), integers, strict=True):
            if integer is not None:
                refuse_format(integer)
                weights += self.plan.add_quantized(integer, "plugin", graph)
            else:
                weights.append(self.plan.relayout(value, Relayout.transpose(self.plan.shape(value)), graph, node))
        attributes = {
            "top_k": top_k,
            "norm_topk_prob": node.attributes.get_int("norm_topk_prob"),
            "weight_format": weight_format(self.plan, down, integers[1]),
            "block_size": integers[1].stored.block if integers[1] is not None else 0,
            "num_experts": experts,
            "intermediate_size": intermediate,
        }
        moe = plugin_node(SCHEMA, attributes, [hidden, logits, *weights], like=node)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [moe], [node.outputs[0]], [moe.outputs[0]])

    def _integers(self, value: ir.Value) -> QuantizedWeight | None:
        """The integers behind ``Transpose(DequantizeLinear(W))``."""
        transpose = value.producer()
        dequantized = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        dequantize = dequantized.producer() if dequantized is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return None
        return self.plan.quantized(dequantize.inputs[0])

    def ensures(self, model: ir.Model) -> None:
        """Check that every MoEExperts was replaced."""
        if any((node.domain, node.op_type) == (DOMAIN, "MoEExperts") for node in model.graph):
            raise ir.passes.PostconditionError("a MoEExperts node is left")


def _check(experts: int, top_k: int, intermediate: int, width: int) -> None:
    """Refuse what the kernel has no room for.

    Raises:
        UnsupportedError: too many experts, or widths that are not whole groups.
    """
    if experts > _MOST_EXPERTS or top_k > _MOST_CHOSEN:
        raise UnsupportedError(
            f"{experts} experts, {top_k} of them per token; the MoEExperts plugin of the TensorRT targets takes up to "
            f"{_MOST_EXPERTS} and {_MOST_CHOSEN}; use --target ort-cpu or portable"
        )
    if intermediate % LINEAR_GROUP or width % LINEAR_GROUP:
        raise UnsupportedError(
            f"experts of this model map {width} to {intermediate} and back; the MoEExperts plugin of the TensorRT "
            f"targets takes multiples of {LINEAR_GROUP}; use --target ort-cpu or portable"
        )
