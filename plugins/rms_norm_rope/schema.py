"""What RMSNormRope takes and gives, and the ONNX functions that define its two modes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepstitch.plugins.common.schema import Attribute, OpSchema, TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["SCHEMA"]

_STORED = ("float32", "float16")
_ATTRIBUTES = (
    Attribute(name="mode", kind="string", required=True, choices=("norm", "norm_rope"), doc="what is done"),
    Attribute(name="epsilon", kind="float", default=1e-6, doc="added to the mean of squares"),
    Attribute(name="num_heads", kind="int", default=0, doc="norm_rope only"),
    Attribute(name="mrope_section", kind="ints", default=[], doc="norm_rope only: pairs turned by time, height, width"),
    Attribute(name="has_residual", kind="int", default=0, choices=(0, 1), doc="norm only: x + residual is normed"),
)
_HEADER = f"RMSNormRope <{', '.join(each.name for each in _ATTRIBUTES)}>"

_NORMED = """
    last_axis = Constant <value_ints = [-1]> ()
    smallest = Constant <value_float = EPSILON> ()
    squares = Mul (values, values)
    mean = ReduceMean <keepdims = 1> (squares, last_axis)
    above_zero = Add (mean, smallest)
    root = Sqrt (above_zero)
    unit = Div (values, root)
    normed = Mul (unit, weight)
"""

_NORM = """
    values = Cast <to = 1> (x)
    NORMED
    y = CastLike (normed, x)
"""

# The sum is normed as it is stored.
_NORM_OF_SUM = """
    x_float = Cast <to = 1> (x)
    residual_float = Cast <to = 1> (residual)
    exact_sum = Add (x_float, residual_float)
    sum = CastLike (exact_sum, x)
    values = Cast <to = 1> (sum)
    NORMED
    y = CastLike (normed, x)
"""

# Pair j is element j of the head with element j + head_dim / 2.
_NORM_ROPE = """
    x_float = Cast <to = 1> (x)
    leading = Shape <start = 0, end = 2> (x)
    heads_scalar = Constant <value_int: int = @num_heads> ()
    rest = Constant <value_ints = [-1]> ()
    heads = Reshape (heads_scalar, rest)
    head_dim = Shape (weight)
    by_head = Concat <axis = 0> (leading, heads, head_dim)
    values = Reshape <allowzero = 1> (x_float, by_head)
    NORMED
    ANGLES
    head_axis = Constant <value_ints = [2]> ()
    angles_apart = Unsqueeze (angles, head_axis)
    cos = Cos (angles_apart)
    sin = Sin (angles_apart)
    low, high = Split <axis = -1, num_outputs = 2> (normed)
    low_cos = Mul (low, cos)
    high_sin = Mul (high, sin)
    turned_low = Sub (low_cos, high_sin)
    high_cos = Mul (high, cos)
    low_sin = Mul (low, sin)
    turned_high = Add (high_cos, low_sin)
    turned = Concat <axis = -1> (turned_low, turned_high)
    x_shape = Shape (x)
    merged = Reshape <allowzero = 1> (turned, x_shape)
    y = CastLike (merged, x)
"""


def _inputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    if attributes["mode"] == "norm_rope":
        return (
            TensorSpec(name="x", dtypes=_STORED, shape="[B, S, num_heads*D]"),
            TensorSpec(name="weight", dtypes=("float32",), shape="[D]"),
            TensorSpec(name="position_ids", dtypes=("int32",), shape="[3, B, S]"),
            TensorSpec(name="inv_freq", dtypes=("float32",), shape="[D/2]"),
        )
    residual = (TensorSpec(name="residual", dtypes=_STORED, shape="[..., H]"),)
    return (
        TensorSpec(name="x", dtypes=_STORED, shape="[..., H]"),
        *(residual if attributes["has_residual"] else ()),
        TensorSpec(name="weight", dtypes=("float32",), shape="[H]"),
    )


def _outputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    if attributes["mode"] == "norm_rope":
        return (TensorSpec(name="y", dtypes=_STORED, shape="[B, S, num_heads*D]"),)
    y = TensorSpec(name="y", dtypes=_STORED, shape="[..., H]")
    return (y, TensorSpec(name="sum", dtypes=_STORED, shape="[..., H]")) if attributes["has_residual"] else (y,)


def _function(attributes: Mapping[str, Any]) -> onnx.FunctionProto:
    from deepstitch.plugins.common.linear_function import parse_function
    from deepstitch.plugins.common.mrope_function import MROPE_ANGLES

    of_sum = _NORM_OF_SUM if attributes["has_residual"] else _NORM
    nodes = _NORM_ROPE if attributes["mode"] == "norm_rope" else of_sum
    normed = _NORMED.replace("EPSILON", f"{attributes['epsilon']:.9e}")
    inputs, outputs = (", ".join(spec.name for spec in make(attributes)) for make in (_inputs, _outputs))
    body = nodes.replace("NORMED", normed).replace("ANGLES", MROPE_ANGLES)
    return parse_function(f"{_HEADER} ({inputs}) => ({outputs})\n{{{body}}}")


SCHEMA = OpSchema(name="RMSNormRope", attributes=_ATTRIBUTES, inputs=_inputs, outputs=_outputs, function=_function)
