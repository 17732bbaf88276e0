"""Every node has a CUDA kernel: held against a table, because here is no card that would tell."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from deepstitch.errors import list_names

__all__ = ["CudaKernels", "RequireCudaKernels", "element_types"]

Types = dict[str, ir.DataType]  # by name of a value


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaKernels:
    """What ONNX Runtime's CUDA provider computes, at the opset of the graphs.

    Attributes:
        releases: of onnxruntime-gpu that were asked.
        source: how.
        opset: of the standard operators.
        kernels: by domain and operator: numpy names of the types its data may have, in every one of the releases.
    """

    releases: tuple[str, ...]
    source: str
    opset: int
    kernels: Mapping[tuple[str, str], frozenset[str]]

    @classmethod
    @functools.cache
    def load(cls) -> CudaKernels:
        """Read the table."""
        raw = json.loads(importlib.resources.files("deepstitch.export.lower").joinpath("cuda_kernels.json").read_text())
        return cls(
            releases=tuple(raw["releases"]),
            source=raw["source"],
            opset=raw["opset"],
            kernels={
                (domain, operator): frozenset(types)
                for domain, operators in raw["kernels"].items()
                for operator, types in operators.items()
            },
        )


class RequireCudaKernels(ir.passes.InPlacePass):
    """Changes nothing.

    Ensures: the operator of every node, those of branches and loops too, has a CUDA kernel for the type of its data, in
    every release of the table. Nodes that read constants alone are passed over: ONNX Runtime computes them when it
    loads the graph.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Leave ``model`` as it is."""
        return ir.passes.PassResult(model, False)

    def ensures(self, model: ir.Model) -> None:
        """Check every node."""
        table = CudaKernels.load()
        problems = sorted(set(_problems(model.graph, element_types(model.graph), set(), table)))
        if model.graph.opset_imports[""] != table.opset:
            problems.append(f"opset {model.graph.opset_imports['']}, the table is of {table.opset}")
        if problems:
            raise ir.passes.PostconditionError(
                f"no CUDA kernel in onnxruntime-gpu {', '.join(table.releases)}: {list_names(problems)}"
            )


def _problems(graph: ir.Graph, types: Types, constant: set[str], table: CudaKernels) -> Iterator[str]:
    constant |= set(graph.initializers)
    for node in graph:
        if all(value is None or value.name in constant for value in node.inputs) and not _subgraphs(node):
            constant |= {output.name or "" for output in node.outputs}
            continue
        for subgraph in _subgraphs(node):
            yield from _problems(subgraph, types, set(constant), table)
        known = table.kernels.get((node.domain, node.op_type))
        name = f"{node.domain}.{node.op_type}".lstrip(".")
        if known is None:
            yield name
            continue
        data = next((value for value in node.inputs if value is not None and value.name), None)
        found = types.get(data.name or "") if data is not None else None
        if found is not None and _name(found) not in known:
            yield f"{name} of {_name(found)}"


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    return [each.as_graph() for each in node.attributes.values() if each.type == ir.AttributeType.GRAPH]


def _name(dtype: ir.DataType) -> str:
    return dtype.numpy().name


def element_types(graph: ir.Graph) -> Types:
    """Types of the values of a graph and of its branches and loops, as far as the operators say."""
    types: Types = {}
    _collect(graph, types)
    return types


def _collect(graph: ir.Graph, types: Types) -> None:
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype is not None:
            types[value.name or ""] = value.dtype
    for node in graph:
        for subgraph in _subgraphs(node):
            _collect(subgraph, types)
        for output, dtype in zip(node.outputs, _output_types(node, types), strict=True):
            if dtype is not None:
                types[output.name or ""] = dtype


def _output_types(node: ir.Node, types: Types) -> list[ir.DataType | None]:
    """By the operator's schema: a type of its own, or that of an input."""
    if node.op_type in ("Cast", "Constant", "ConstantOfShape"):
        return [_declared_type(node)]
    subgraphs = _subgraphs(node)
    if subgraphs:
        results = list(subgraphs[0].outputs)[-len(node.outputs) :]
        return [types.get(value.name or "") for value in results]
    read = [types.get(value.name or "") if value is not None else None for value in node.inputs]
    if node.domain:
        return [read[0]] * len(node.outputs)  # true of all that the lowering emits
    schema = onnx.defs.get_schema(node.op_type)
    constraints = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    named = {formal.type_str: read[place] for place, formal in enumerate(schema.inputs[: len(read)]) if read[place]}
    formals = [schema.outputs[min(place, len(schema.outputs) - 1)] for place in range(len(node.outputs))]
    return [named.get(each.type_str) or _only_type(constraints.get(each.type_str, [each.type_str])) for each in formals]


def _declared_type(node: ir.Node) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to"))
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor().dtype
        return ir.DataType.INT64 if name.startswith("value_int") else ir.DataType.FLOAT
    return ir.DataType.FLOAT


def _only_type(names: Sequence[str]) -> ir.DataType | None:
    if len(names) != 1 or not names[0].startswith("tensor("):
        return None
    name = names[0].removeprefix("tensor(").removesuffix(")")
    return ir.DataType[{"float": "FLOAT", "bool": "BOOL"}.get(name, name.upper())]
