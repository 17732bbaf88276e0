"""Sizes of every tensor of a graph for given sizes of its inputs.

With all sizes given as numbers, what a graph computes from shapes is numbers too. So nodes whose inputs are known small
tensors are evaluated, and for all others ONNX's own inference is asked node by node; plugin nodes go by the schemas.
What was worked out for a node is remembered, so that layers which are alike cost one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from deepstitch.export.tensorrt.operators import BUILT_IN_DOMAINS
from deepstitch.export.tensorrt.plugin_nodes import PluginNode, ShapeProblem, Typed
from deepstitch.plugins.common.schema import DOMAIN, PluginError

__all__ = ["Failure", "Propagation", "Tensor", "Tensors", "dtype_name"]

_SMALL = 4096  # elements; larger values are not followed


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of one tensor.

    Attributes:
        dtype: numpy name.
        shape: sizes.
        data: the values, where they are few and known without running the graph.
        constant: it does not depend on any input of the graph, not even on their sizes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any] | None = None
    constant: bool = False

    @property
    def elements(self) -> int:
        """How many values."""
        count: int = math.prod(self.shape)
        return count


@dataclass(frozen=True, slots=True)
class Failure:
    """A node whose outputs are not known, and why."""

    node: int
    reason: str


@dataclass(frozen=True, slots=True)
class Tensors:
    """All tensors of a graph at one set of input sizes, and the nodes that could not be followed."""

    by_name: Mapping[str, Tensor]
    failures: tuple[Failure, ...]


def dtype_name(elem_type: int) -> str:
    """Numpy name of an ONNX element type; the ONNX name in lower case where numpy has none."""
    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(elem_type)).name)
    except (KeyError, TypeError, ValueError):
        return str(onnx.TensorProto.DataType.Name(elem_type).lower())


class Propagation:
    """Works out the sizes of all tensors of one graph, as often as wanted."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self._opsets = list(model.opset_import)
        self.opset = max((each.version for each in self._opsets if each.domain in BUILT_IN_DOMAINS), default=0)
        self._ir_version = model.ir_version
        self.initializers = {each.name: _initializer(each) for each in self.graph.initializer}
        # what the parser takes for weights
        self.weights = self.initializers.keys() | {n.output[0] for n in self.graph.node if n.op_type == "Constant"}
        self._canonical = [_canonical(node) for node in self.graph.node]
        self._keys = [node.SerializeToString(deterministic=True) for node in self._canonical]
        self._known: dict[tuple[Any, ...], list[Tensor] | str] = {}

    def run(self, inputs: Mapping[str, Typed]) -> Tensors:
        """Follow the graph.

        Args:
            inputs: by name; every input of the graph that is no initializer.
        """
        tensors = {name: Tensor(typed.dtype, typed.shape) for name, typed in inputs.items()} | self.initializers
        failures, lost = [], set[str]()
        for index, node in enumerate(self.graph.node):
            missing = [name for name in node.input if name and name not in tensors]
            if missing:
                if not lost.intersection(missing):  # else that of another node is to blame
                    failures.append(Failure(index, f"nothing gives its input {missing[0]}"))
                lost.update(node.output)
                continue
            found = self._outputs(index, [tensors[name] for name in node.input if name])
            if isinstance(found, str):
                failures.append(Failure(index, found))
                lost.update(node.output)
                continue
            tensors.update((name, tensor) for name, tensor in zip(node.output, found, strict=True) if name)
        return Tensors(tensors, tuple(failures))

    def _outputs(self, index: int, given: list[Tensor]) -> list[Tensor] | str:
        key = (self._keys[index], *(_key(tensor) for tensor in given))
        if key not in self._known:
            try:
                self._known[key] = self._infer(self._canonical[index], given)
            except (ShapeProblem, PluginError) as error:
                self._known[key] = str(error)
            except Exception as error:  # onnx raises what its C++ raises, of no common type
                self._known[key] = " ".join(str(error).split())
        return self._known[key]

    def _infer(self, node: onnx.NodeProto, given: list[Tensor]) -> list[Tensor]:
        if node.domain not in BUILT_IN_DOMAINS:
            if node.domain != DOMAIN:
                raise ShapeProblem(f"nothing is known of the domain {node.domain}")
            typed = PluginNode.of(node).infer([Typed(each.dtype, each.shape) for each in given])
            return [Tensor(each.dtype, each.shape) for each in typed]
        if any(each.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for each in node.attribute):
            raise ShapeProblem("it has a body of its own, which is not followed; lower it to plain nodes")
        named = dict(zip([name for name in node.input if name], given, strict=True))
        typed = self._infer_standard(node, named)
        constant = bool(all(each.constant for each in given))
        values = self._evaluate(node, named, typed)
        return [Tensor(each.dtype, each.shape, value, constant) for each, value in zip(typed, values, strict=True)]

    def _infer_standard(self, node: onnx.NodeProto, given: Mapping[str, Tensor]) -> list[Typed]:
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        types = {
            name: helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(np.dtype(each.dtype)), each.shape)
            for name, each in given.items()
        }
        data = {name: numpy_helper.from_array(each.data, name) for name, each in given.items() if each.data is not None}
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=self._opsets, ir_version=self._ir_version
        )
        return [_typed(place, found.get(name)) for place, name in enumerate(node.output) if name]

    def _evaluate(
        self, node: onnx.NodeProto, given: Mapping[str, Tensor], typed: list[Typed]
    ) -> list[np.ndarray[Any, Any] | None]:
        """Values of the outputs where they are few and known."""
        unknown: list[np.ndarray[Any, Any] | None] = [None] * len(typed)
        if any(math.prod(each.shape) > _SMALL for each in typed):
            return unknown
        if node.op_type in ("Shape", "Size"):
            return [_from_shape(node, next(iter(given.values())).shape)]
        if any(each.data is None for each in given.values()):
            return unknown
        outputs = [helper.make_tensor_value_info(name, 0, None) for name in node.output if name]
        inputs = [helper.make_tensor_value_info(name, 0, None) for name in given]
        graph = helper.make_graph([node], "one", inputs, outputs)
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version)
        feeds = {name: each.data for name, each in given.items()}
        return [np.asarray(each) for each in ReferenceEvaluator(model).run(None, feeds)]


def _canonical(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node under names of its own places, so that nodes which do the same are equal."""
    twin = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    twin.input.extend(f"i{place}" if name else "" for place, name in enumerate(node.input))
    twin.output.extend(f"o{place}" if name else "" for place, name in enumerate(node.output))
    twin.attribute.extend(sorted(node.attribute, key=lambda each: each.name))
    return twin


def _key(tensor: Tensor) -> tuple[Any, ...]:
    data = None if tensor.data is None else tensor.data.tobytes()
    return tensor.dtype, tensor.shape, data, tensor.constant


def _initializer(tensor: onnx.TensorProto) -> Tensor:
    shape = tuple(tensor.dims)
    stored_here = tensor.data_location != onnx.TensorProto.EXTERNAL
    data = numpy_helper.to_array(tensor) if stored_here and math.prod(shape) <= _SMALL else None
    return Tensor(dtype_name(tensor.data_type), shape, data, constant=True)


def _from_shape(node: onnx.NodeProto, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    limits = {each.name: each.i for each in node.attribute}
    axes = shape[limits.get("start", 0) : limits.get("end", len(shape))]
    return np.array(axes if node.op_type == "Shape" else math.prod(shape), np.int64)


def _typed(place: int, found: onnx.TypeProto | None) -> Typed:
    if found is None or not found.HasField("tensor_type") or not found.tensor_type.HasField("shape"):
        raise ShapeProblem(f"the shape of output {place} cannot be told before the graph runs")
    dims = found.tensor_type.shape.dim
    if not all(dim.HasField("dim_value") for dim in dims):
        raise ShapeProblem(f"the shape of output {place} depends on values, not on shapes alone")
    return Typed(dtype_name(found.tensor_type.elem_type), tuple(dim.dim_value for dim in dims))
