"""What QuantizedLinear takes and gives, and the ONNX function that defines it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepstitch.plugins.common.schema import Attribute, OpSchema, TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["BLOCKS", "FORMATS", "INTEGER_FORMATS", "SCHEMA", "matrix_inputs"]

FORMATS = ("float32", "float16", "int8", "int4")
INTEGER_FORMATS = ("int8", "int4")
BLOCKS = (0, 32, 64, 128)  # 0 is that of float formats

_BODY = """
QuantizedLinear <weight_format, block_size, has_bias, has_residual, out_features> (INPUTS) => (y)
{
    tokens = Flatten <axis = -1> (x)
    LINEAR
    BIAS
    leading = Shape <start = 0, end = -1> (x)
    width = Constant <value_ints = [WIDTH]> ()
    shape = Concat <axis = 0> (leading, width)
    shaped = Reshape <allowzero = 1> (biased, shape)
    RESIDUAL
}
"""


def matrix_inputs(name: str, attributes: Mapping[str, Any], rows: str, columns: str) -> tuple[TensorSpec, ...]:
    """Inputs that hold one stored matrix (or a stack of them) ``[rows, columns]``: numbers and, if integer, scales.

    Args:
        name: of the first input; the second is ``<name>_scales``, or ``scales`` where the first is ``weight``.
        attributes: ``weight_format`` of them is looked at.
        rows: leading axes as text, such as ``E, G*I``.
        columns: last axis as text.
    """
    stored = attributes["weight_format"]
    if stored not in INTEGER_FORMATS:
        return (TensorSpec(name=name, dtypes=(stored,), shape=f"[{rows}, {columns}]"),)
    scales = "scales" if name == "weight" else f"{name}_scales"
    return (
        TensorSpec(name=name, dtypes=("int32",), shape=f"[{rows}, {columns}/{8 if stored == 'int4' else 4}]"),
        TensorSpec(name=scales, dtypes=("float32", "float16"), shape=f"[{rows}, {columns}/block_size]"),
    )


def _inputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    optional = {
        "bias": TensorSpec(name="bias", dtypes=("float32",), shape="[N]"),
        "residual": TensorSpec(name="residual", dtypes=("float32",), shape="[..., N]"),
    }
    return (
        TensorSpec(name="x", dtypes=("float32",), shape="[..., K]"),
        *matrix_inputs("weight", attributes, "N", "K"),
        *(spec for name, spec in optional.items() if attributes[f"has_{name}"]),
    )


def _outputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    del attributes
    return (TensorSpec(name="y", dtypes=("float32",), shape="[..., N]"),)


def _function(attributes: Mapping[str, Any]) -> onnx.FunctionProto:
    from deepstitch.plugins.common.linear_function import linear_nodes, parse_function

    parts = {
        "INPUTS": ", ".join(spec.name for spec in _inputs(attributes)),
        "LINEAR": linear_nodes(
            "linear",
            x="tokens",
            weight="weight",
            scales="scales",
            output="product",
            weight_format=attributes["weight_format"],
            block_size=attributes["block_size"],
        ),
        "BIAS": f"biased = {'Add (product, bias)' if attributes['has_bias'] else 'Identity (product)'}",
        "WIDTH": str(attributes["out_features"]),
        "RESIDUAL": f"y = {'Add (shaped, residual)' if attributes['has_residual'] else 'Identity (shaped)'}",
    }
    text = _BODY
    for placeholder, value in parts.items():
        text = text.replace(placeholder, value)
    return parse_function(text)


SCHEMA = OpSchema(
    name="QuantizedLinear",
    attributes=(
        Attribute(name="weight_format", kind="string", required=True, choices=FORMATS, doc="of weight"),
        Attribute(name="block_size", kind="int", default=0, choices=BLOCKS, doc="integer formats: weights to a scale"),
        Attribute(name="has_bias", kind="int", default=0, choices=(0, 1), doc="there is an input bias"),
        Attribute(name="has_residual", kind="int", default=0, choices=(0, 1), doc="there is an input residual"),
        Attribute(name="out_features", kind="int", required=True, doc="N"),
    ),
    inputs=_inputs,
    outputs=_outputs,
    function=_function,
)
