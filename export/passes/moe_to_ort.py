"""MoEExperts to ONNX Runtime's fused mixture of experts."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.functions import DOMAIN
from deepstitch.export.weights import Relayout, WeightPlan

__all__ = ["MoEToOrt"]


class MoEToOrt(ir.passes.InPlacePass):
    """``deepstitch.MoEExperts`` becomes ``com.microsoft.MoE``.

    1. The first weight ``[E, H, 2I]`` is stored as ``[E, 2I, H]`` with gate and up rows alternating: row
       ``2j`` is gate ``j``, row ``2j + 1`` is up ``j``. The CPU kernel takes SwiGLU in this order only.
    2. The second weight ``[E, I, H]`` is stored as ``[E, H, I]``.
    3. Router logits become ``[n, E]``; softmax, top-k and renormalisation happen inside the kernel.
    4. The kernel always renormalises. Where the model does not, its result is multiplied by the sum of the selected
       probabilities. (``normalize_routing_weights=0`` would say the same, but onnxruntime 1.31.1 then lets the output
       share the memory of its input and returns garbage.)

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
        assert gate_up is not None and down is not None
        experts, width, gate_and_up = self.plan.shape(gate_up)
        half = gate_and_up // 2
        interleave = Relayout((experts, width, 2, half), (0, 3, 2, 1), (experts, gate_and_up, width))
        first = self.plan.relayout(gate_up, interleave, graph, node)
        second = self.plan.relayout(down, Relayout.transpose(self.plan.shape(down)), graph, node)
        top_k = node.attributes.get_int("top_k")
        shape = ir.node("Constant", [], {"value_ints": [-1, experts]})
        flat = ir.node("Reshape", [logits, shape.outputs[0]])
        moe = ir.node(
            "MoE",
            [hidden, flat.outputs[0], first, None, second],
            {
                "k": top_k,
                "normalize_routing_weights": 1,
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                "activation_alpha": 1.0,
                "activation_beta": 0.0,
            },
            domain="com.microsoft",
        )
        nodes = [shape, flat, moe]
        if not node.attributes.get_int("norm_topk_prob"):
            nodes += _times_selected_probability(moe.outputs[0], logits, top_k)
        for each in nodes:
            each.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]])

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
