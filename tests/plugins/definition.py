"""Cases of all operators, and their definition (the ONNX function) run by ONNX Runtime."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from deepstitch.plugins.common.case import Case, nmse
from deepstitch.plugins.common.schema import DOMAIN
from deepstitch.plugins.registry import OPS, PluginOp, load

KINDS = {"int": "INT", "float": "FLOAT", "string": "STRING", "ints": "INTS"}


def cases() -> list[Any]:
    """Parameters ``op, case`` of every case."""
    return [pytest.param(op, case, id=f"{op.folder}-{case.name}") for op in map(load, OPS) for case in op.cases]


@cache
def expected(folder: str, name: str) -> dict[str, Any]:
    """What numpy gives for a case."""
    op = load(folder)
    case = next(each for each in op.cases if each.name == name)
    return op.reference(op.schema.resolve(case.attributes), case.make())


def check(found: dict[str, Any], op: PluginOp, case: Case) -> None:
    """Outputs equal the numpy reference within the tolerance of the case."""
    wanted = expected(op.folder, case.name)
    assert list(found) == list(wanted)
    for name, reference in wanted.items():
        value = found[name]
        assert value.shape == reference.shape and value.dtype == reference.dtype, name
        assert nmse(value, reference) <= case.nmse, name
        if case.max_abs is not None and value.size:
            assert np.abs(value.astype(np.float64) - reference).max() <= case.max_abs, name


def run_definition(op: PluginOp, attributes: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """One node, defined by the function of the schema."""
    resolved = op.schema.resolve(attributes)
    function = op.schema.function(resolved)
    names = [each.name for each in op.schema.outputs(resolved)]
    node = helper.make_node(op.schema.name, list(inputs), names, domain=DOMAIN)
    for each in op.schema.attributes:
        if resolved[each.name] is not None:
            kind = getattr(onnx.AttributeProto, KINDS[each.kind])
            node.attribute.append(helper.make_attribute(each.name, resolved[each.name], attr_type=kind))
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    outputs = [helper.make_tensor_value_info(name, _output_type(op, resolved, types, name), None) for name in names]
    graph = helper.make_graph([node], "definition", given, outputs)
    opsets = {each.domain: each.version for each in function.opset_import} | {DOMAIN: 1}
    model = helper.make_model(graph, functions=[function], ir_version=10)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in opsets.items())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, inputs), strict=True))


def _output_type(op: PluginOp, resolved: dict[str, Any], inputs: dict[str, int], name: str) -> int:
    """The only dtype the schema allows, or else that of the first input."""
    spec = next(each for each in op.schema.outputs(resolved) if each.name == name)
    if len(spec.dtypes) == 1:
        return helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtypes[0]))
    return next(iter(inputs.values()))
