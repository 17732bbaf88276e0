"""Sizes and workspace of plugin nodes, against the operators' library built for the CPU."""

from __future__ import annotations

import pytest
from onnx import helper

from deepstitch.export.tensorrt.plugin_nodes import PluginNode, Typed
from deepstitch.export.tensorrt.workspace import WORKSPACES, workspace_bytes
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import OPS, load


def test_every_operator_has_a_workspace() -> None:
    assert set(WORKSPACES) == set(OPS.values())


@pytest.mark.parametrize("folder", OPS)
def test_sizes_and_workspace_are_those_of_the_library(folder: str, host_library: PluginLibrary) -> None:
    """Every case of the operator's table."""
    for case in load(folder).cases:
        inputs = case.make()
        attributes = {name: value for name, value in case.attributes.items() if value != []}
        node = PluginNode.of(helper.make_node(OPS[folder], list(inputs), ["y"], **attributes))
        given = [Typed(inputs[spec.name].dtype.name, inputs[spec.name].shape) for spec in node.inputs]
        with host_library.create(OPS[folder], case.attributes) as instance, instance.prepare(inputs) as call:
            made = [Typed(array.dtype.name, array.shape) for array in call.outputs().values()]
            assert node.infer(given) == made, case.name
            assert workspace_bytes(node, given) == call.workspace_bytes, case.name
