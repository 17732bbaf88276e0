"""Declare a graph as opset 17, and check that it is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from deepstitch.export.passes.plugin_nodes import PLUGIN_OPSET
from deepstitch.plugins.common.schema import DOMAIN

__all__ = ["Opset17"]

_OPSET, _IR_VERSION = 17, 8  # those of ONNX 1.12 and 1.13
_INT32 = np.iinfo(np.int32)


class Opset17(ir.passes.InPlacePass):
    """Opset 17 of the standard operators, the plugins' own domain, and nothing else.

    1. The graph's imports and the version of its file format are those of opset 17.

    Ensures, for TensorRT 8.6: every operator has such inputs and attributes in opset 17 or is a plugin's; no input is
    left out; Shape gives all of it, because the parser takes no notice of ``start`` and ``end``; constants of 64 bits
    fit into 32, which is what becomes of them; no function is left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        plugins = {DOMAIN: PLUGIN_OPSET} if any(node.domain == DOMAIN for node in model.graph) else {}
        model.graph.opset_imports.clear()
        model.graph.opset_imports.update({"": _OPSET, **plugins})
        model.ir_version = _IR_VERSION
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check every node and constant."""
        problems = [f"function {function.name}" for function in model.functions.values()]
        for node in model.graph.all_nodes():
            problem = _problem(node)
            if problem:
                problems.append(f"{node.op_type} '{node.name}' {problem}")
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.dtype == ir.DataType.INT64 and not _fits(value.const_value):
                problems.append(f"constant '{value.name}' does not fit into 32 bits")
        if problems:
            raise ir.passes.PostconditionError(f"not for TensorRT 8.6: {'; '.join(problems[:5])}")


def _problem(node: ir.Node) -> str:
    """Why a node is not one of opset 17; empty where it is."""
    if None in node.inputs:
        return "leaves an input out"
    if node.domain == DOMAIN:
        return ""
    if node.op_type == "Shape" and node.attributes:
        return "gives a part of the shape"
    if node.domain != "" or not onnx.defs.has(node.op_type, node.domain):
        return f"is of domain '{node.domain}'"
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=_OPSET)
    except onnx.defs.SchemaError:
        return "came later"
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        return f"has {len(node.inputs)} inputs"
    unknown = sorted(set(node.attributes) - set(schema.attributes))
    return f"has the attributes {unknown}" if unknown else ""


def _fits(constant: ir.TensorProtocol) -> bool:
    values = constant.numpy()
    return values.size == 0 or bool(values.min() >= _INT32.min and values.max() <= _INT32.max)
