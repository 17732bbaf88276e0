"""Would the parser take this graph? Operators, plugin nodes, tensors, and sizes at every corner of every profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx

from deepstitch.errors import list_names
from deepstitch.export.contract import Contract
from deepstitch.export.tensorrt.operators import BUILT_IN_DOMAINS, Node, ParserTable
from deepstitch.export.tensorrt.plugin_nodes import PluginNode, Typed, address_problems
from deepstitch.export.tensorrt.profiles import CORNERS, Profile, sizes_of
from deepstitch.export.tensorrt.shapes import Propagation, Tensor, Tensors, dtype_name
from deepstitch.plugins.common.schema import DOMAIN, PluginError

__all__ = ["GraphCheck", "Problem", "check_graph"]

_MAX_ELEMENTS = 2**31 - 1  # of one tensor, NvInfer.h of 8.6 and 10.0
_MAX_RANK = 8

_Said = tuple[str, str, str]  # operator, message, node


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something the parser or the builder would refuse or get wrong.

    Attributes:
        operator: op type, or what else is meant.
        message: what is wrong.
        node: the first one.
        count: how many.
    """

    operator: str
    message: str
    node: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCheck:
    """What was found out about one graph.

    Attributes:
        operators: how often each operator of the standard domain occurs.
        plugins: likewise for ours.
        corners: the sizes it was followed at, as ``decode/max``.
        problems: empty where all is well.
        followed: the sizes of all tensors are known.
        propagation: follows the graph at other sizes.
    """

    name: str
    nodes: int
    operators: Mapping[str, int]
    plugins: Mapping[str, int]
    corners: tuple[str, ...]
    problems: tuple[Problem, ...]
    followed: bool
    propagation: Propagation


def check_graph(
    name: str, model: onnx.ModelProto, contract: Contract, profiles: Iterable[Profile], table: ParserTable
) -> GraphCheck:
    """Hold one graph against a parser and follow its sizes.

    Args:
        name: of the graph.
        model: without its weights.
        contract: inputs and outputs as in the manifest.
        profiles: of all graphs; those of others are passed over.
        table: of the parser.
    """
    propagation = Propagation(model)
    said = [*_model_problems(model, propagation, table), *_contract_problems(model, contract)]
    corners, tensors, failed = [], Tensors({}, ()), False
    if not any(operator == "graph" for operator, _, _ in said):
        for profile in profiles:
            for corner in CORNERS if profile.graph == name else ():
                corners.append(f"{profile.name}/{corner}")
                tensors = propagation.run(sizes_of(contract[0], profile.corners[corner]))
                expected = sizes_of(contract[1], profile.corners[corner])
                said += _size_problems(model, tensors, expected, corners[-1])
                failed = failed or bool(tensors.failures)
    for node in model.graph.node:
        said += ((node.op_type, message, node.name) for message in _node_problems(node, tensors, propagation, table))
    counted = Counter(f"{node.op_type}" for node in model.graph.node if node.domain in BUILT_IN_DOMAINS)
    plugins = Counter(node.op_type for node in model.graph.node if node.domain not in BUILT_IN_DOMAINS)
    return GraphCheck(
        name=name,
        nodes=len(model.graph.node),
        operators=dict(sorted(counted.items())),
        plugins=dict(sorted(plugins.items())),
        corners=tuple(corners),
        problems=_together(said),
        followed=bool(corners) and not failed,
        propagation=propagation,
    )


def _together(said: Iterable[_Said]) -> tuple[Problem, ...]:
    """The same of many nodes is said once."""
    first: dict[tuple[str, str], str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for operator, message, node in said:
        first.setdefault((operator, message), node)
        counts[operator, message] += 1
    return tuple(
        Problem(operator=operator, message=message, node=first[operator, message], count=count)
        for (operator, message), count in counts.items()
    )


def _model_problems(model: onnx.ModelProto, propagation: Propagation, table: ParserTable) -> Iterator[_Said]:
    if propagation.opset > table.max_opset:
        yield "model", f"opset {propagation.opset}; {table.parser} knows up to {table.max_opset}", model.graph.name
    if model.functions:
        names = list_names(each.name for each in model.functions)
        yield "model", f"local functions ({names}); the parser does not look into them", model.graph.name
    for tensor in model.graph.initializer:
        dtype = dtype_name(tensor.data_type)
        if dtype not in table.stored:
            reason = table.not_stored.get(dtype, "is no type of this TensorRT")
            yield "initializer", f"{dtype} {reason}", tensor.name


def _contract_problems(model: onnx.ModelProto, contract: Contract) -> Iterator[_Said]:
    initializers = {each.name for each in model.graph.initializer}
    sides = (
        ("inputs", [each for each in model.graph.input if each.name not in initializers], contract[0]),
        ("outputs", list(model.graph.output), contract[1]),
    )
    for side, found, expected in sides:
        have = {each.name: dtype_name(each.type.tensor_type.elem_type) for each in found}
        want = {spec.name: spec.dtype for spec in expected}
        if have != want:
            differ = list_names({name for name in have.keys() | want.keys() if have.get(name) != want.get(name)})
            yield "graph", f"{side} are not those of the manifest: {differ}", model.graph.name


def _size_problems(
    model: onnx.ModelProto, tensors: Tensors, expected: Mapping[str, Typed], corner: str
) -> Iterator[_Said]:
    for failure in tensors.failures:
        node = model.graph.node[failure.node]
        yield node.op_type, failure.reason, f"{node.name} at {corner}"
    for name, typed in expected.items():
        found = tensors.by_name.get(name)
        if found is not None and (found.dtype, found.shape) != (typed.dtype, typed.shape):
            message = f"is {found.dtype} {list(found.shape)}, the manifest promises {typed.dtype} {list(typed.shape)}"
            yield "graph output", message, f"{name} at {corner}"
    for name, tensor in tensors.by_name.items():
        if tensor.elements > _MAX_ELEMENTS:
            yield "tensor", f"has {tensor.elements:,} elements; TensorRT holds 2^31 - 1", f"{name} at {corner}"
        if len(tensor.shape) > _MAX_RANK:
            yield "tensor", f"has {len(tensor.shape)} axes; TensorRT holds {_MAX_RANK}", name


def _node_problems(
    node: onnx.NodeProto, tensors: Tensors, propagation: Propagation, table: ParserTable
) -> Iterator[str]:
    if "" in node.input:
        yield f"input {list(node.input).index('')} is left out; give it a value or another operator"
    if node.domain == DOMAIN:
        yield from _plugin_problems(node, table)
    elif node.domain not in BUILT_IN_DOMAINS:
        yield f"its domain {node.domain} is neither ONNX nor {DOMAIN}"
    else:
        yield from table.problems(_with_tensors(node, tensors.by_name, propagation))
        yield from _schema_problems(node, propagation.opset, tensors.by_name)


def _plugin_problems(node: onnx.NodeProto, table: ParserTable) -> Iterator[str]:
    if node.op_type in table.operators:
        yield f"{table.parser} has an operator of this name, which it takes instead of the plugin"
    try:
        PluginNode.of(node)
        yield from address_problems(node)
    except PluginError as error:
        yield str(error)


def _schema_problems(node: onnx.NodeProto, opset: int, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return  # the table has said so
    unknown = [each.name for each in node.attribute if each.name not in schema.attributes]
    if unknown:
        yield f"opset {opset} has no attribute {list_names(unknown)}"
    if len(node.input) > schema.max_input:
        yield f"{len(node.input)} inputs; opset {opset} has {schema.max_input}"
    else:
        yield from _mixed_types(node, schema, tensors)


def _mixed_types(node: onnx.NodeProto, schema: onnx.defs.OpSchema, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Inputs of several types where ONNX wants one: nothing is converted on the way."""
    found: dict[str, str] = {}
    for place, name in enumerate(node.input):
        formal = schema.inputs[min(place, len(schema.inputs) - 1)]
        letter = formal.type_str if formal.is_homogeneous and "(" not in formal.type_str else ""
        if letter and name in tensors:
            first = found.setdefault(letter, tensors[name].dtype)
            if tensors[name].dtype != first:
                yield f"input {place} is {tensors[name].dtype} where the others are {first}; cast it"


def _with_tensors(node: onnx.NodeProto, tensors: Mapping[str, Tensor], propagation: Propagation) -> Node:
    return Node(
        proto=node,
        dtypes=lambda name: tensors[name].dtype if name in tensors else None,
        constants=lambda name: tensors[name].data if name in tensors else None,
        is_constant=propagation.weights.__contains__,
    )
