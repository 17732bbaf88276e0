"""Linear layers over half-precision weights, multiplied in half precision."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.export.passes.linear_to_plugin import is_plain
from deepstitch.export.weights import WeightPlan

__all__ = ["LinearToHalf"]

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


class LinearToHalf(ir.passes.InPlacePass):
    """MatMul and Gemm over weights stored as fp16 become products of fp16 numbers that are summed in fp32.

    1. ``MatMul(x, W)``: x is rounded to fp16, and so is the product. Both x and W are cast to fp32 right in front of
       the MatMul: so a strongly typed network asks TensorRT for fp32 sums, and gets one kernel for inputs of fp16.
       Over inputs of fp16 themselves it may sum in fp16.
    2. ``Gemm(x, W, bias)`` likewise, and the bias is added in fp32 afterwards.
    3. The weight, or the Transpose of it, is read through a Cast to fp16, which goes when the weight gets the type that
       it is stored in (:meth:`WeightPlan.bind`).

    Everything around the products stays fp32: sums of residuals, norms, softmax, routers (whose weights are fp32).
    """

    def __init__(self, plan: WeightPlan) -> None:
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        modified = False
        for node in list(model.graph):
            reader = _reader(node)
            weight = reader.inputs[0 if reader.op_type == "Transpose" else 1] if reader is not None else None
            if reader is None or weight is None or not self.plan.is_parameter(weight):
                continue
            if self.plan.quantized(weight) is None and self.plan.dtype(weight) == "F16":
                _read_as_stored(model.graph, reader, weight)
                _rewrite(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)


def _reader(node: ir.Node) -> ir.Node | None:
    """The node that reads the second matrix of a product: the product itself, or a Transpose."""
    matrix = node.inputs[1] if node.domain == "" and node.op_type in ("MatMul", "Gemm") else None
    if matrix is None or (node.op_type == "Gemm" and not is_plain(node)):
        return None
    producer = matrix.producer()
    if producer is None:
        return node
    return producer if producer.op_type == "Transpose" else None


def _read_as_stored(graph: ir.Graph, reader: ir.Node, weight: ir.Value) -> None:
    cast = _cast(weight, _HALF, reader)
    reader.replace_input_with(list(reader.inputs).index(weight), cast.outputs[0])
    graph.insert_before(reader, cast)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    x, matrix, *bias = node.inputs
    rounded = _cast(x, _HALF, node)
    factors = [_cast(value, _SINGLE, node) for value in (rounded.outputs[0], matrix)]
    product = ir.Node(node.domain, node.op_type, [each.outputs[0] for each in factors], node.attributes.values())
    product.metadata_props.update(node.metadata_props)
    stored = _cast(product.outputs[0], _HALF, node)
    nodes = [rounded, *factors, product, stored, _cast(stored.outputs[0], _SINGLE, node)]
    if bias:
        added = ir.node("Add", [nodes[-1].outputs[0], bias[0]])
        added.metadata_props.update(node.metadata_props)
        nodes.append(added)
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [node.outputs[0]], [nodes[-1].outputs[0]])


def _cast(value: ir.Value | None, dtype: ir.DataType, like: ir.Node) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": dtype})
    cast.metadata_props.update(like.metadata_props)
    return cast
