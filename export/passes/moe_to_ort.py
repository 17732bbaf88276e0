"""MoEExperts to ONNX Runtime's fused mixture of experts."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN
from deepstitch.export.passes.linear_to_nbits import INT8_ACTIVATIONS
from deepstitch.export.quantize.stored import QuantizedWeight
from deepstitch.export.weights import Relayout, WeightPlan

__all__ = ["MoEToOrt"]


class MoEToOrt(ir.passes.InPlacePass):
    """``deepstitch.MoEExperts`` becomes ``com.microsoft.MoE``, or ``QMoE`` over integer weights.

    1. The first weight ``[E, H, 2I]`` is stored as ``[E, 2I, H]`` with gate and up rows alternating: row
       ``2j`` is gate ``j``, row ``2j + 1`` is up ``j``. The CPU kernel takes SwiGLU in this order only.
    2. The second weight ``[E, I, H]`` is stored as ``[E, H, I]``.
    3. Router logits become ``[n, E]``; softmax, top-k and renormalisation happen inside the kernel.
    4. The kernel always renormalises. Where the model does not, its result is multiplied by the sum of the selected
       probabilities. (``normalize_routing_weights=0`` would say the same, but onnxruntime 1.31.1 then lets the output
       share the memory of its input and returns garbage; ``QMoE`` likewise.)
    5. Integer weights are stored as ``[E, 2I, H]`` and ``[E, H, I]`` already; only their rows alternate. Blocks and
       ``accuracy_level=4`` take the kernels that multiply integers; a scale per row would be dequantized every time.

    Ensures: no MoEExperts node is left.
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, "MoEExperts")]
        for node in nodes:
            self._rewrite(model.graph, node)
        if nodes:
            model.graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, bool(nodes))

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> None:
        hidden, logits, gate_up, down = node.inputs
        assert gate_up is not None and down is not None and gate_up.shape is not None
        experts = gate_up.shape.numpy()[0]
        top_k = node.attributes.get_int("top_k")
        shape = ir.node("Constant", [], {"value_ints": [-1, experts]})
        flat = ir.node("Reshape", [logits, shape.outputs[0]])
        quantized = self._integers(gate_up), self._integers(down)
        common = {
            "k": top_k,
            "normalize_routing_weights": 1,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
        if quantized[0] is not None and quantized[1] is not None:
            moe = self._integer_node(graph, hidden, flat.outputs[0], quantized[0], quantized[1], common)
        else:
            moe = self._float_node(graph, node, flat.outputs[0], common)
        nodes = [shape, flat, moe]
        if not node.attributes.get_int("norm_topk_prob"):
            nodes += _times_selected_probability(moe.outputs[0], logits, top_k)
        for each in nodes:
            each.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]])

    def _integers(self, value: ir.Value) -> QuantizedWeight | None:
        """The integers behind ``Transpose(DequantizeLinear(W))``."""
        transpose = value.producer()
        dequantized = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        dequantize = dequantized.producer() if dequantized is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            return None
        return self.plan.quantized(dequantize.inputs[0])

    def _float_node(self, graph: ir.Graph, node: ir.Node, router: ir.Value, common: dict[str, Any]) -> ir.Node:
        hidden, _, gate_up, down = node.inputs
        assert gate_up is not None and down is not None
        experts, width, gate_and_up = self.plan.shape(gate_up)
        half = gate_and_up // 2
        interleave = Relayout((experts, width, 2, half), (0, 3, 2, 1), (experts, gate_and_up, width))
        first = self.plan.relayout(gate_up, interleave, graph, node)
        second = self.plan.relayout(down, Relayout.transpose(self.plan.shape(down)), graph, node)
        return ir.node("MoE", [hidden, router, first, None, second], common, domain="com.microsoft")

    def _integer_node(
        self,
        graph: ir.Graph,
        hidden: ir.Value | None,
        router: ir.Value,
        gate_up: QuantizedWeight,
        down: QuantizedWeight,
        common: dict[str, Any],
    ) -> ir.Node:
        first, first_scales, *first_zeros = self.plan.add_quantized(gate_up, "qmoe-interleaved", graph)
        second, second_scales, *second_zeros = self.plan.add_quantized(down, "qmoe", graph)
        inputs = [hidden, router, first, first_scales, None, second, second_scales]
        if first_zeros:
            inputs += [None, None, None, None, *first_zeros, *second_zeros]
        attributes = common | {
            "expert_weight_bits": gate_up.stored.bits,
            "block_size": gate_up.stored.block,
            "accuracy_level": INT8_ACTIVATIONS,
        }
        return ir.node("QMoE", inputs, attributes, domain="com.microsoft")

    def ensures(self, model: ir.Model) -> None:
        """Check that every MoEExperts node was replaced."""
        if any(node.op_type == "MoEExperts" for node in model.graph):
            raise ir.passes.PostconditionError("a MoEExperts node is left")


def _times_selected_probability(value: ir.Value, logits: ir.Value | None, top_k: int) -> list[ir.Node]:
    """Nodes that multiply ``value [B, S, H]`` by the sum of each token's ``top_k`` largest probabilities."""
    count, last_axis = (ir.node("Constant", [], {"value_ints": [number]}) for number in (top_k, -1))
    probabilities = ir.node("Softmax", [logits], {"axis": -1})
    top = ir.node("TopK", [probabilities.outputs[0], count.outputs[0]], {"axis": -1}, num_outputs=2)
    total = ir.node("ReduceSum", [top.outputs[0], last_axis.outputs[0]], {"keepdims": 1})
    scaled = ir.node("Mul", [value, total.outputs[0]])
    return [count, last_axis, probabilities, top, total, scaled]
