"""Linear layers over integer weights to ONNX Runtime's MatMulNBits."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.weights import WeightPlan

__all__ = ["INT8_ACTIVATIONS", "LinearToNBits"]

INT8_ACTIVATIONS = 4  # accuracy_level: inputs are quantized per block on the fly; the kernels for it are the fast ones


class LinearToNBits(ir.passes.InPlacePass):
    """``MatMul(x, Transpose(DequantizeLinear(W)))`` and the same as Gemm become ``com.microsoft.MatMulNBits``.

    1. The integers are laid out as ``[N, K/block, block*bits/8]`` bytes; they are the same bytes.
    2. A bias becomes the operator's own, or an addition behind it.

    Ensures: no linear layer reads a DequantizeLinear.
    """

    def __init__(self, plan: WeightPlan, *, accuracy_level: int = INT8_ACTIVATIONS, takes_bias: bool = True) -> None:
        """Take the weights.

        Args:
            plan: of the weights.
            accuracy_level: of the operator; 0 keeps its inputs as they are.
            takes_bias: the operator adds the bias.
        """
        super().__init__()
        self.plan = plan
        self.accuracy_level = accuracy_level
        self.takes_bias = takes_bias

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        modified = False
        for node in list(model.graph):
            weight = _dequantized_weight(node)
            if weight is None:
                continue
            self._rewrite(model.graph, node, weight)
            modified = True
        if modified:
            model.graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, node: ir.Node, dequantize: ir.Node) -> None:
        weight = self.plan.quantized(dequantize.inputs[0])
        assert weight is not None
        values, scales, *zero_points = self.plan.add_quantized(weight, "nbits", graph)
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        inputs: list[ir.Value | None] = [node.inputs[0], values, scales, *zero_points]
        inputs += [None] * (5 - len(inputs)) + [bias if self.takes_bias else None]  # no zero points, no group indices
        while inputs[-1] is None:
            inputs.pop()
        rows, columns = weight.shape
        linear = ir.node(
            "MatMulNBits",
            inputs,
            {
                "K": columns,
                "N": rows,
                "bits": weight.stored.bits,
                "block_size": weight.stored.block,
                "accuracy_level": self.accuracy_level,
            },
            domain="com.microsoft",
        )
        nodes = [linear]
        if bias is not None and not self.takes_bias:
            nodes.append(ir.node("Add", [linear.outputs[0], bias]))
        for each in nodes:
            each.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]])

    def ensures(self, model: ir.Model) -> None:
        """Check that no linear layer is left on integer weights."""
        for node in model.graph:
            if _dequantized_weight(node) is not None:
                raise ir.passes.PostconditionError(f"{node.op_type} '{node.name}' still reads a DequantizeLinear")


def _dequantized_weight(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear behind the weight of a linear layer, if that is where it comes from."""
    weight = node.inputs[1] if node.domain == "" and node.op_type in ("MatMul", "Gemm") else None
    producer = weight.producer() if weight is not None else None
    if node.op_type == "MatMul" and producer is not None and producer.op_type == "Transpose":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None
