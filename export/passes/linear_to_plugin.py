"""Linear layers over half-precision and integer weights to the QuantizedLinear plugin."""

from __future__ import annotations

import onnx_ir as ir

from deepstitch.errors import UnsupportedError
from deepstitch.export.passes.plugin_nodes import plugin_node
from deepstitch.export.quantize.stored import QuantizedWeight
from deepstitch.export.weights import WeightPlan
from deepstitch.plugins.quantized_linear.schema import BLOCKS, SCHEMA

__all__ = ["LINEAR_GROUP", "LinearToPlugin", "is_plain", "refuse_format", "weight_format"]

LINEAR_GROUP = 32  # the kernels read inputs of a matrix in groups of this many
_FORMATS = {"F32": "float32", "F16": "float16"}


class LinearToPlugin(ir.passes.InPlacePass):
    """``MatMul(x, Transpose(W))`` and ``Gemm(x, W, bias)`` become ``deepstitch.plugins.QuantizedLinear``.

    1. Only for W stored as integers or fp16. fp32 is TensorRT's own work; a Cast of fp16 weights it would carry out
       while building, and keep four bytes of each.
    2. W stays ``[N, K]``; four int8 or eight int4 numbers are one INT32.
    3. A bias becomes the plugin's, and so does an addition of equal shape that is all that reads the result.
    4. fp16 weights whose K is not whole groups stay with TensorRT, and all of them where it multiplies in fp16.

    Ensures: no linear layer reads a DequantizeLinear.
    """

    def __init__(self, plan: WeightPlan, *, halves: bool = True) -> None:
        """Take the weights.

        Args:
            plan: of the weights.
            halves: take fp16 weights too.
        """
        super().__init__()
        self.plan = plan
        self.halves = halves

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        modified = False
        for node in list(model.graph):
            weight = _matrix(node)
            if weight is not None and self._is_taken(weight):
                self._rewrite(model.graph, node, weight)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _is_taken(self, weight: ir.Value) -> bool:
        if self.plan.quantized(weight) is not None:
            return True
        if not self.halves or not self.plan.is_parameter(weight) or self.plan.dtype(weight) != "F16":
            return False
        return self.plan.shape(weight)[-1] % LINEAR_GROUP == 0

    def _rewrite(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
        integer = self.plan.quantized(weight)
        if integer is not None:
            refuse_format(integer)
        rows = integer.shape[0] if integer is not None else self.plan.shape(weight)[0]
        matrix = [weight] if integer is None else self.plan.add_quantized(integer, "plugin", graph)
        bias = node.inputs[2:3]
        add, residual = _addition(node.outputs[0])
        attributes = {
            "weight_format": weight_format(self.plan, weight, integer),
            "block_size": integer.stored.block if integer is not None else 0,
            "has_bias": len(bias),
            "has_residual": int(add is not None),
            "out_features": rows,
        }
        added = [residual] if add is not None else []
        linear = plugin_node(SCHEMA, attributes, [node.inputs[0], *matrix, *bias, *added], like=node)
        last = add or node  # the residual may be younger than the layer
        replaced = [add, node] if add is not None else [node]
        ir.convenience.replace_nodes_and_values(graph, last, replaced, [linear], [last.outputs[0]], [linear.outputs[0]])

    def ensures(self, model: ir.Model) -> None:
        """Check that no linear layer is left on integer weights."""
        for node in model.graph:
            weight = _matrix(node)
            if weight is not None and self.plan.quantized(weight) is not None:
                raise ir.passes.PostconditionError(f"{node.op_type} '{node.name}' still reads integers")


def weight_format(plan: WeightPlan, weight: ir.Value, integer: QuantizedWeight | None) -> str:
    """The plugins' name for what a parameter is stored as."""
    return f"int{integer.stored.bits}" if integer is not None else _FORMATS[plan.dtype(weight)]


def refuse_format(weight: QuantizedWeight) -> None:
    """Refuse integers that the kernels cannot read.

    Raises:
        UnsupportedError: zero points, or other blocks.
    """
    stored = weight.stored
    flag = "--vision-weights" if ".visual." in weight.name else "--weights"
    if not stored.symmetric:
        raise UnsupportedError("--asymmetric: the kernels of the TensorRT targets know no zero points; leave it out")
    if stored.block not in BLOCKS:
        allowed = ", ".join(str(block) for block in BLOCKS if block)
        raise UnsupportedError(
            f"'{weight.name}' has {weight.shape[-1]} inputs, which take blocks of {stored.block}; the kernels of the "
            f"TensorRT targets read blocks of {allowed}; use {flag} fp16 or fp32"
        )


def _matrix(node: ir.Node) -> ir.Value | None:
    """The initializer ``[N, K]`` that a linear layer multiplies with, stored as whatever it is."""
    weight = node.inputs[1] if node.domain == "" and node.op_type in ("MatMul", "Gemm") else None
    if weight is None or (node.op_type == "Gemm" and not is_plain(node)):
        return None
    if node.op_type == "MatMul":
        transpose = weight.producer()
        if transpose is None or transpose.op_type != "Transpose":
            return None
        weight = transpose.inputs[0]
    producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        weight = producer.inputs[0]
    return weight if weight is not None and weight.is_initializer() else None


def is_plain(gemm: ir.Node) -> bool:
    """Whether a Gemm is ``x @ W.T + bias`` and nothing more."""
    attributes = gemm.attributes
    factors = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    return factors == (1.0, 1.0) and (attributes.get_int("transA", 0), attributes.get_int("transB", 0)) == (0, 1)


def _addition(value: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add that is all that reads a value, and what it adds, if both have one shape."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None, None
    add, index = users[0]
    other = add.inputs[1 - index] if add.op_type == "Add" and add.domain == "" else None
    if other is None or other is value or value.shape is None or other.shape != value.shape:
        return None, None
    return add, other
