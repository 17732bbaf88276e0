"""Nodes of the plugin operators, as TensorRT's parser takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from deepstitch.plugins.common.schema import DOMAIN, OpSchema

__all__ = ["PLUGIN_OPSET", "parser_attributes", "plugin_node"]

PLUGIN_OPSET = 1  # of the domain the operators are in


def plugin_node(
    schema: OpSchema, attributes: Mapping[str, Any], inputs: Sequence[ir.Value | None], *, like: ir.Node
) -> ir.Node:
    """One operator.

    Args:
        schema: of the operator.
        attributes: those without a default at least; the node carries all of them.
        inputs: the list for these attributes, none left out.
        like: the node it comes from, for its place in the model.

    Raises:
        PluginError: the operator has no such attribute or value.
    """
    resolved = schema.resolve(attributes)
    assert None not in inputs and len(inputs) == len(schema.inputs(resolved)), "TensorRT 8.6 has no optional inputs"
    outputs = len(schema.outputs(resolved))
    node = ir.node(schema.name, inputs, parser_attributes(schema, resolved), domain=DOMAIN, num_outputs=outputs)
    node.metadata_props.update(like.metadata_props)
    return node


def parser_attributes(schema: OpSchema, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """All attributes of a node: the operator's own, and the two by which the parser finds the plugin.

    An empty list has no type in ONNX and is what the plugin takes where there is none.
    """
    own = {name: value for name, value in resolved.items() if value is not None and value != []}
    return {**own, "plugin_version": schema.version, "plugin_namespace": DOMAIN}
