"""Small graphs with nodes that TensorRT 8.6 takes, and ones that it does not."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import onnx
import pytest

from deepstitch.export.tensorrt.check import GraphCheck, check_graph
from deepstitch.export.tensorrt.operators import ParserTable
from deepstitch.export.tensorrt.profiles import Profile
from deepstitch.manifest import TensorSpec
from deepstitch.plugins.build.host import build_host_library
from deepstitch.plugins.library import PluginLibrary

HEADER = '<ir_version: 8, opset_import: ["" : 17, "deepstitch.plugins" : 1]>'
ADDRESS = 'plugin_version = "1", plugin_namespace = "deepstitch.plugins"'
DTYPES = {"float": "float32", "int32": "int32", "int64": "int64", "float16": "float16", "bool": "bool"}


def model(graph: str, header: str = HEADER) -> onnx.ModelProto:
    """From ONNX's own text form; nodes get the name of their first output, what has no value is a weight elsewhere."""
    made = onnx.parser.parse_model(f"{header}\n{graph}")
    for value in made.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        weight = onnx.TensorProto(name=value.name, data_type=value.type.tensor_type.elem_type, dims=shape)
        weight.data_location = onnx.TensorProto.EXTERNAL
        made.graph.initializer.append(weight)
    for node in made.graph.node:
        node.name = node.name or node.output[0]
    return made


def contract_of(made: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What the graph itself declares; axes without a size keep their names."""
    sides = []
    for values in (made.graph.input, made.graph.output):
        specs = []
        for value in values:
            tensor = value.type.tensor_type
            shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
            dtype = DTYPES[onnx.TensorProto.DataType.Name(tensor.elem_type).lower()]
            specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
        sides.append(tuple(specs))
    return sides[0], sides[1]


def profile(**axes: int) -> Profile:
    """Of a graph ``decoder``, at one size."""
    return Profile(name="only", graph="decoder", corners=dict.fromkeys(("min", "opt", "max"), axes))


@pytest.fixture
def check() -> Callable[..., GraphCheck]:
    """``check(graph, header=…, S=…)``: the graph in text form, with sizes of its named axes."""

    def checked(graph: str, header: str = HEADER, **axes: int) -> GraphCheck:
        made = model(graph, header)
        return check_graph("decoder", made, contract_of(made), [profile(**axes)], ParserTable.load())

    return checked


@pytest.fixture(scope="session")
def host_library() -> PluginLibrary:
    """Every operator, on the CPU through the host shim."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return PluginLibrary.open(build_host_library())
