"""What one engine keeps in device memory, read off the sizes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from deepstitch.export.tensorrt.operators import BUILT_IN_DOMAINS
from deepstitch.export.tensorrt.plugin_nodes import PluginNode, Typed
from deepstitch.export.tensorrt.shapes import Propagation, Tensor, Tensors
from deepstitch.export.tensorrt.workspace import workspace_bytes
from deepstitch.plugins.common.schema import PluginError

__all__ = ["Footprint", "Matrices", "footprint", "is_cache", "writes_cache_in_place"]

# As TensorRT holds them: bytes of weights become int32. 8.6 makes int32 of int64 too; there is never much of it.
_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "int32": 4,
    "int8": 1,
    "bool": 1,
    "int64": 8,
    "float64": 4,
    "uint8": 4,
}
_VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")  # the output lies where the input lies
_STORED = ("weight", "scales", "gate_up", "down")  # inputs that hold matrices, and with _scales theirs
_PER_WORD = {"int8": 4, "int4": 8}  # numbers in an int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """The weights of an engine that another ``--weights`` would store in another way.

    Attributes:
        values: how many numbers.
        nbytes: that they take, scales included.
    """

    values: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """One engine at one set of input sizes.

    Attributes:
        weights: constants that are left when what depends on constants alone is computed in advance.
        matrices: the part of them that quantization makes smaller.
        activations: the largest set of tensors between nodes that are needed at the same time, if no nodes are fused.
        workspace: the most that one plugin asks for.
        edges: inputs and outputs, the KV cache left out.
    """

    weights: int
    matrices: Matrices
    activations: int
    workspace: int
    edges: int


def footprint(propagation: Propagation, tensors: Tensors) -> Footprint:
    """Add up a graph.

    Args:
        propagation: of the graph.
        tensors: at some sizes of its inputs.
    """
    graph, known = propagation.graph, tensors.by_name
    edges = {each.name for each in (*graph.input, *graph.output)} - propagation.initializers.keys()
    plugins = list(_plugins(graph, known))
    return Footprint(
        weights=sum(_nbytes(known[name]) for name in _kept_constants(graph, known)),
        matrices=_matrices(graph, known, plugins),
        activations=_activations(graph, known, edges),
        workspace=max((workspace_bytes(node, given) for node, given, _ in plugins), default=0),
        edges=sum(_nbytes(known[name]) for name in edges if name in known and not is_cache(name)),
    )


def is_cache(name: str) -> bool:
    """Whether a graph input or output holds keys or values."""
    return name.startswith(("past_key_values.", "present.")) and name.endswith((".key", ".value"))


def writes_cache_in_place(graph: onnx.GraphProto) -> bool:
    """Whether a plugin writes every new cache: it may get the same memory for the old and the new one."""
    makers = {name: node for node in graph.node for name in node.output}
    return all(
        node is not None and node.domain not in BUILT_IN_DOMAINS
        for node in (_maker(each.name, makers) for each in graph.output if is_cache(each.name))
    )


def _maker(name: str, makers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    node = makers.get(name)
    while node is not None and node.op_type in _VIEWS:
        node = makers.get(node.input[0])
    return node


def _nbytes(tensor: Tensor) -> int:
    return tensor.elements * _BYTES.get(tensor.dtype, 4)


def _plugins(
    graph: onnx.GraphProto, known: Mapping[str, Tensor]
) -> Iterator[tuple[PluginNode, list[Typed], onnx.NodeProto]]:
    for node in graph.node:
        if node.domain in BUILT_IN_DOMAINS or not all(name in known for name in node.input):
            continue
        try:
            plugin = PluginNode.of(node)
        except PluginError:
            continue  # the check has said so
        if len(plugin.inputs) == len(node.input):
            yield plugin, [Typed(known[name].dtype, known[name].shape) for name in node.input], node


def _kept_constants(graph: onnx.GraphProto, known: Mapping[str, Tensor]) -> set[str]:
    """Constants that a node reads which cannot be computed in advance."""
    kept, halves = set(), _fused_halves(graph, known)
    for node in graph.node:
        if not all(name in known and known[name].constant for name in node.output if name):
            kept |= {halves.get(name, name) for name in node.input if name in known and known[name].constant}
    return kept


def _fused_halves(graph: onnx.GraphProto, known: Mapping[str, Tensor]) -> dict[str, str]:
    """Matrices of fp16, by what is cast from them for a product of two such: a kernel reads them as they are."""
    halves = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] in known and known[node.input[0]].dtype == "float16"
    }
    products = (
        node for node in graph.node if node.op_type in ("MatMul", "Gemm") and set(node.input[:2]) <= halves.keys()
    )
    return {node.input[1]: halves[node.input[1]] for node in products}


def _matrices(
    graph: onnx.GraphProto, known: Mapping[str, Tensor], plugins: list[tuple[PluginNode, list[Typed], onnx.NodeProto]]
) -> Matrices:
    counted: dict[str, tuple[int, int]] = {}
    halves = _fused_halves(graph, known)
    for plugin, _, node in plugins:
        numbers = _PER_WORD.get(plugin.attributes.get("weight_format", ""), 1)
        for spec, name in zip(plugin.inputs, node.input, strict=True):
            if "weight_format" in plugin.attributes and spec.name.removesuffix("_scales") in _STORED:
                values = 0 if spec.name.endswith("scales") else numbers * known[name].elements
                counted[name] = (values, _nbytes(known[name]))
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.domain in BUILT_IN_DOMAINS:
            name = halves.get(node.input[1], node.input[1])
            if name in known and known[name].constant:
                counted[name] = (known[name].elements, _nbytes(known[name]))
    return Matrices(
        values=sum(values for values, _ in counted.values()), nbytes=sum(nbytes for _, nbytes in counted.values())
    )


def _activations(graph: onnx.GraphProto, known: Mapping[str, Tensor], edges: set[str]) -> int:
    root: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _VIEWS and node.domain in BUILT_IN_DOMAINS:
            root[node.output[0]] = root.get(node.input[0], node.input[0])
    elsewhere = edges | {root.get(name, name) for name in edges}
    last = {root.get(name, name): place for place, node in enumerate(graph.node) for name in node.input}
    ends: dict[int, list[str]] = {}
    for name, place in last.items():
        ends.setdefault(place, []).append(name)
    alive: dict[str, int] = {}
    most = 0
    for place, node in enumerate(graph.node):
        for name in node.output:
            tensor = known.get(name)
            if tensor is None or name in root or name in elsewhere or tensor.constant or tensor.data is not None:
                continue
            alive[name] = _nbytes(tensor)
        most = max(most, sum(alive.values()))
        for name in ends.get(place, ()):
            alive.pop(name, None)
        for name in node.output:
            if name not in last:
                alive.pop(name, None)
    return most
