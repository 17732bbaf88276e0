"""TensorRT's graphs in ONNX Runtime: every plugin computed by the function that defines it.

This shows that the lowering is right, on any machine. What the kernels compute is compared with the same functions by
the tests of the plugins.
"""

from __future__ import annotations

import json
from typing import Any

import onnx
import onnxruntime

from deepstitch.errors import BundleError, did_you_mean
from deepstitch.plugins.common.schema import DOMAIN, OpSchema, PluginError
from deepstitch.plugins.registry import OPS, load
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import Engine, open_engine
from deepstitch.runtime.engine.ort import ORT_TARGETS, OrtEngine, OrtGraph

__all__ = ["DefinitionEngine", "comparison_engine", "definition_session", "with_definitions"]

_OPSET = 21  # that of the definitions; ONNX Runtime inlines functions of the graph's own opset only
_IR_VERSION = 10
_REASON_LENGTH = 200
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def comparison_engine(bundle: Bundle) -> Engine:
    """What a comparison runs a bundle in: ONNX Runtime, with definitions where the graphs have plugins.

    Raises:
        BundleError: the graphs cannot be loaded.
    """
    return open_engine("ort", bundle) if bundle.manifest.target in ORT_TARGETS else DefinitionEngine(bundle)


class DefinitionEngine(OrtEngine):
    """The graphs of a bundle whose target is not ONNX Runtime."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Load the graphs.

        Args:
            bundle: an opened bundle.
            threads: threads inside one operator; None takes one per physical core.
        """
        self.bundle = bundle
        self._graphs = {
            name: OrtGraph(definition_session(bundle, name, _options(threads))) for name in bundle.manifest.graphs
        }


def _options(threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions
    options.intra_op_num_threads = threads or 0
    return options


def definition_session(bundle: Bundle, name: str, options: onnxruntime.SessionOptions) -> Any:
    """One graph of a bundle, with definitions of its plugins, weights mapped from the bundle's files.

    Args:
        bundle: an opened bundle.
        name: of the graph.
        options: of this session alone; the folder of the weights is added.

    Raises:
        BundleError: the graph is damaged, or has a plugin that is unknown here.
    """
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.folder.resolve()))
    path = bundle.graph_path(name)
    try:
        model = with_definitions(onnx.load(path, load_external_data=False))
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime and protobuf raise bare subclasses of Exception
        reason = " ".join(str(error).split())[-_REASON_LENGTH:]
        raise BundleError(
            f"{path}: graph '{name}' cannot be run with the definitions of its plugins: {reason}; export the "
            "checkpoint again"
        ) from None


def with_definitions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every plugin node the function that defines it for its attributes.

    The standard nodes stay what they are: those of opset 17 that the graphs hold mean the same in the definitions'.
    """
    schemas = {schema.name: schema for schema in (load(folder).schema for folder in OPS)}
    functions: dict[str, onnx.FunctionProto] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            if node.op_type not in schemas:
                raise PluginError(f"there is no plugin {node.op_type}{did_you_mean(node.op_type, schemas)}")
            _define(node, schemas[node.op_type], functions)
        else:
            _check_unchanged(node)
    model.functions.extend(functions.values())
    model.ir_version = _IR_VERSION
    for opset in model.opset_import:
        opset.version = _OPSET if opset.domain == "" else opset.version
    return model


def _define(node: onnx.NodeProto, schema: OpSchema, functions: dict[str, onnx.FunctionProto]) -> None:
    """Name a node after its function, one for each set of attributes, and make that if it is new."""
    attributes = {each.name: _value(each) for each in node.attribute}
    for name in ("plugin_version", "plugin_namespace"):
        attributes.pop(name, None)
    key = json.dumps([schema.name, attributes], sort_keys=True)
    if key not in functions:
        functions[key] = schema.function(schema.resolve(attributes))
        functions[key].name = f"{schema.name}{len(functions)}"
    node.op_type = functions[key].name
    kept = [each for each in node.attribute if each.name in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)


def _value(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else list(value) if isinstance(value, list | tuple) else value


def _check_unchanged(node: onnx.NodeProto) -> None:
    schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=_OPSET)
    assert {each.name for each in node.attribute} <= set(schema.attributes), f"{node.op_type} is another one there"
