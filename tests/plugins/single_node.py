"""One operator, defined by a function, as a model that ONNX Runtime optimizes and runs the way it does by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from deepstitch.plugins.common.schema import OpSchema

IR_VERSION = 11


def one_node(
    function: onnx.FunctionProto,
    attributes: Mapping[str, Any],
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """A model whose sizes are all unknown, outputs float32 of the first input's rank."""
    rank = next(iter(inputs.values())).ndim
    taken = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in inputs.items()
    ]
    given = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * rank) for name in outputs]
    node = helper.make_node(function.name, list(inputs), list(outputs), domain=function.domain, **attributes)
    opsets = [*function.opset_import, helper.make_opsetid(function.domain, 1)]
    graph = helper.make_graph([node], "one", taken, given)
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=IR_VERSION)


def plugin_node(schema: OpSchema, attributes: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A model of one plugin operator."""
    resolved = schema.resolve(attributes)
    outputs = [spec.name for spec in schema.outputs(resolved)]
    return one_node(schema.function(resolved), attributes, inputs, outputs)


def run(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs, by name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))
