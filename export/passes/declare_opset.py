"""Declare a graph as one of an older opset, and check that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from deepstitch.export.passes.plugin_nodes import PLUGIN_OPSET
from deepstitch.plugins.common.schema import DOMAIN

__all__ = ["DeclareOpset", "Dialect"]

_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a parser or a runtime reads.

    Attributes:
        parser: its name, for messages.
        opset: the newest it knows, of the standard operators.
        ir_version: of files of that opset.
        has_int64: constants of 64 bits stay what they are; else they become 32 bits.
        has_shape_parts: it takes notice of ``start`` and ``end`` of Shape.
        domains: of the other operators, with their opset.
    """

    parser: str
    opset: int
    ir_version: int
    has_int64: bool
    has_shape_parts: bool
    domains: Mapping[str, int] = field(default_factory=lambda: {DOMAIN: PLUGIN_OPSET})


class DeclareOpset(ir.passes.InPlacePass):
    """One opset of the standard operators, the dialect's other domains, and nothing else.

    1. The graph's imports and the version of its file format are those of the dialect.

    Ensures: every operator has such inputs and attributes in that opset or is of those domains; no input is left out;
    Shape gives all of it and constants of 64 bits fit into 32, where the parser would not notice; no function is left.
    """

    def __init__(self, dialect: Dialect) -> None:
        super().__init__()
        self.dialect = dialect

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        used = {node.domain for node in model.graph.all_nodes()}
        others = {domain: version for domain, version in self.dialect.domains.items() if domain in used}
        model.graph.opset_imports.clear()
        model.graph.opset_imports.update({"": self.dialect.opset, **others})
        model.ir_version = self.dialect.ir_version
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """Check every node and constant."""
        problems = [f"function {function.name}" for function in model.functions.values()]
        for node in model.graph.all_nodes():
            problem = _problem(node, self.dialect)
            if problem:
                problems.append(f"{node.op_type} '{node.name}' {problem}")
        for value in () if self.dialect.has_int64 else model.graph.initializers.values():
            if value.const_value is not None and value.dtype == ir.DataType.INT64 and not _fits(value.const_value):
                problems.append(f"constant '{value.name}' does not fit into 32 bits")
        if problems:
            raise ir.passes.PostconditionError(f"not for {self.dialect.parser}: {'; '.join(problems[:5])}")


def _problem(node: ir.Node, dialect: Dialect) -> str:
    """Why a node is not one of the dialect; empty where it is."""
    if None in node.inputs:
        return "leaves an input out"
    if node.domain in dialect.domains:
        return ""
    if node.op_type == "Shape" and node.attributes and not dialect.has_shape_parts:
        return "gives a part of the shape"
    if node.domain != "" or not onnx.defs.has(node.op_type, node.domain):
        return f"is of domain '{node.domain}'"
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=dialect.opset)
    except onnx.defs.SchemaError:
        return "came later"
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        return f"has {len(node.inputs)} inputs"
    unknown = sorted(set(node.attributes) - set(schema.attributes))
    return f"has the attributes {unknown}" if unknown else ""


def _fits(constant: ir.TensorProtocol) -> bool:
    values = constant.numpy()
    return values.size == 0 or bool(values.min() >= _INT32.min and values.max() <= _INT32.max)
