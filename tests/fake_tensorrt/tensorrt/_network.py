"""Networks and the ONNX parser, which reads the file and asks for the plugins' creators."""

from __future__ import annotations

from pathlib import Path

import onnx

from ._api import MAJOR, Object, fails, make, native
from ._base import ILogger, Severity, say
from ._enums import DataType, ErrorCode, LayerType, NetworkDefinitionCreationFlag, OnnxParserFlag, data_type
from ._graph import PLUGINS, Graph
from ._plan import Tensor
from ._plugins import find

_LAYERS = {"Cast": "CAST", "MatMul": "MATRIX_MULTIPLY", "Softmax": "SOFTMAX", "Gather": "GATHER", "Shape": "SHAPE"}


@native
class ITensor(Object):
    @property
    def name(self) -> str:
        return self._state.name

    @name.setter
    def name(self, value: str) -> None:
        self._state.name = value

    @property
    def dtype(self) -> DataType:
        return self._state.dtype

    @dtype.setter
    def dtype(self, value: DataType) -> None:
        self._state.dtype = value

    @property
    def shape(self) -> tuple[int, ...]:
        return self._state.shape

    @property
    def is_shape_tensor(self) -> bool:
        return fails(f"shape-tensor:{self._state.name}")

    @property
    def is_execution_tensor(self) -> bool:
        return True


@native
class ILayer(Object):
    @property
    def name(self) -> str:
        return self._state.name

    @property
    def type(self) -> LayerType:
        return self._state.type

    @property
    def num_inputs(self) -> int:
        return len(self._state.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._state.outputs)

    def get_input(self, index: int) -> ITensor | None:
        return self._state.inputs[index] if index < len(self._state.inputs) else None

    def get_output(self, index: int) -> ITensor | None:
        return self._state.outputs[index] if index < len(self._state.outputs) else None

    @property
    def precision(self) -> DataType:
        return self._state.precision or DataType.FLOAT

    @precision.setter
    def precision(self, value: DataType) -> None:
        self._state.precision = value

    @property
    def precision_is_set(self) -> bool:
        return self._state.precision is not None

    def set_output_type(self, index: int, dtype: DataType) -> None:
        self._state.outputs[index]._state.dtype = dtype


@native
class INetworkDefinition(Object):
    @property
    def name(self) -> str:
        return self._state.name

    @name.setter
    def name(self, value: str) -> None:
        self._state.name = value

    @property
    def flags(self) -> int:
        return self._state.flags

    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool:
        return bool(self._state.flags >> int(flag) & 1)

    @property
    def num_inputs(self) -> int:
        return len(self._state.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._state.outputs)

    @property
    def num_layers(self) -> int:
        return len(self._state.layers)

    def get_input(self, index: int) -> ITensor | None:
        return self._state.inputs[index] if index < len(self._state.inputs) else None

    def get_output(self, index: int) -> ITensor | None:
        return self._state.outputs[index] if index < len(self._state.outputs) else None

    def get_layer(self, index: int) -> ILayer | None:
        return self._state.layers[index] if index < len(self._state.layers) else None

    def __len__(self) -> int:
        return len(self._state.layers)

    def __getitem__(self, arg0: int) -> ILayer:
        return self._state.layers[arg0]


def new_network(flags: int) -> INetworkDefinition:
    """An empty one."""
    return make(INetworkDefinition, name="Unnamed Network 0", flags=flags, inputs=[], outputs=[], layers=[], graph=None)


def is_strongly_typed(network: INetworkDefinition) -> bool:
    """From TensorRT 11 on every network is."""
    flag = NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    return MAJOR >= 11 or (flag is not None and bool(network._state.flags >> int(flag) & 1))


@native
class ParserError(Object):
    def code(self) -> ErrorCode:
        return self._state.code

    def desc(self) -> str:
        return self._state.desc

    def file(self) -> str:
        return "onnxOpImporters.cpp"

    def func(self) -> str:
        return "importFallbackPluginImporter"

    def line(self) -> int:
        return 5404

    def node(self) -> int:
        return self._state.node

    def node_name(self) -> str:
        return self._state.name

    def node_operator(self) -> str:
        return self._state.operator


@native
class OnnxParser(Object):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        explicit = NetworkDefinitionCreationFlag.__members__.get("EXPLICIT_BATCH")
        self._state.network, self._state.logger, self._state.errors = network, logger, []
        self._state.usable = MAJOR >= 10 or bool(network._state.flags >> int(explicit) & 1)

    def set_flag(self, flag: OnnxParserFlag) -> None: ...

    def clear_errors(self) -> None:
        self._state.errors.clear()

    @property
    def num_errors(self) -> int:
        return len(self._state.errors)

    def get_error(self, index: int) -> ParserError:
        return self._state.errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        return self._parse(bytes(model), path or "model.onnx")

    def parse_from_file(self, model: str) -> bool:
        path = Path(model)
        if not path.is_file():
            say(self._state.logger, Severity.ERROR, f"Could not open file {model}")
            return self._refuse(f"Failed to parse ONNX model from file: {model}", "MODEL_DESERIALIZE_FAILED")
        return self._parse(path.read_bytes(), model)

    def _parse(self, data: bytes, path: str) -> bool:
        if not self._state.usable:
            return self._refuse("This version of the ONNX parser only supports networks with an explicit batch")
        try:
            graph = Graph(data, path)
        except Exception:  # protobuf's own
            return self._refuse(f"Failed to parse ONNX model from file: {path}", "MODEL_DESERIALIZE_FAILED")
        missing = {each.value for tensor in graph.model.graph.initializer for each in tensor.external_data
                   if each.key == "location" and not (Path(path).parent / each.value).is_file()}  # fmt: skip
        if missing:
            return self._refuse(f"Failed to open file: {sorted(missing)[0]}", "MODEL_DESERIALIZE_FAILED")
        for place, node in enumerate(graph.model.graph.node):
            if problem := _problem(node):
                return self._refuse(problem, "UNSUPPORTED_NODE", place, node)
        if fails("parse"):
            node = graph.model.graph.node[0]
            return self._refuse("Assertion failed: this is how it was asked for", "INVALID_NODE", 0, node)
        _fill(self._state.network, graph)
        return True

    def _refuse(
        self, text: str, code: str = "INVALID_GRAPH", place: int = -1, node: onnx.NodeProto | None = None
    ) -> bool:
        name, operator = (node.name, node.op_type) if node is not None else ("", "")
        error = make(ParserError, code=ErrorCode[code], desc=text, node=place, name=name, operator=operator)
        self._state.errors.append(error)
        say(self._state.logger, Severity.ERROR, f"ModelImporter.cpp: ERROR: {text}")
        return False


def _problem(node: onnx.NodeProto) -> str | None:
    if node.domain != PLUGINS:
        return None
    given = {each.name: each.s.decode() for each in node.attribute if each.name.startswith("plugin_")}
    if find(node.op_type, given.get("plugin_version", "1"), given.get("plugin_namespace", "")) is None:
        return (
            'Assertion failed: creator && "Plugin not found, are the plugin name, version, and namespace correct?" '
            f"({node.op_type})"
        )
    return None


def _fill(network: INetworkDefinition, graph: Graph) -> None:
    state = network._state
    state.graph, state.name = graph, graph.model.graph.name
    state.inputs = [_tensor(each) for each in graph.tensors if each.is_input]
    state.outputs = [_tensor(each) for each in graph.tensors if not each.is_input]
    plugin = LayerType["PLUGIN_V2" if MAJOR < 10 else "PLUGIN_V3"]
    for node in graph.model.graph.node:
        kind = plugin if node.domain == PLUGINS else LayerType[_LAYERS.get(node.op_type, "ELEMENTWISE")]
        outputs = [_inner(graph, name) for name in node.output]
        inputs = [_inner(graph, name) for name in node.input]
        state.layers.append(make(ILayer, name=node.name, type=kind, inputs=inputs, outputs=outputs, precision=None))


def _inner(graph: Graph, name: str) -> ITensor:
    """Between layers; of a type that inference does not find it is what a weakly typed network begins with."""
    return make(ITensor, name=name, dtype=data_type(graph.types.get(name, "float32")), shape=())


def _tensor(tensor: Tensor) -> ITensor:
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in tensor.shape)
    return make(ITensor, name=tensor.name, dtype=data_type(tensor.dtype), shape=shape)
