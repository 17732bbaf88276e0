"""What DeepStackAdd takes and gives, and the ONNX function that defines it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepstitch.plugins.common.schema import Attribute, OpSchema, TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["SCHEMA"]

_STORED = ("float32", "float16")

# Row 0 is never read, and neither is a row that is not there: both add nothing.
_BODY = """
DeepStackAdd <layer> (hidden_states, deepstack_embeds, deepstack_index) => (output)
{
    last_axis = Constant <value_ints = [-1]> ()
    column_axis = Constant <value_ints = [1]> ()
    nothing = Constant <value_float = 0.0> ()
    first = Constant <value_int = 0> ()
    index = Cast <to = 7> (deepstack_index)
    rows_1d = Shape <start = 0, end = 1> (deepstack_embeds)
    rows = Squeeze (rows_1d)
    after_first = Greater (index, first)
    before_end = Less (index, rows)
    visual = And (after_first, before_end)
    row = Where (visual, index, first)
    layer_index = Constant <value_int: int = @layer> ()
    width = Shape <start = -1> (hidden_states)
    begin = Mul (width, layer_index)
    end = Add (begin, width)
    tap = Slice (deepstack_embeds, begin, end, column_axis)
    picked_stored = Gather <axis = 0> (tap, row)
    picked = Cast <to = 1> (picked_stored)
    visual_apart = Unsqueeze (visual, last_axis)
    added = Where (visual_apart, picked, nothing)
    hidden = Cast <to = 1> (hidden_states)
    sum = Add (hidden, added)
    output = CastLike (sum, hidden_states)
}
"""


def _inputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    del attributes
    return (
        TensorSpec(name="hidden_states", dtypes=_STORED, shape="[..., H]"),
        TensorSpec(name="deepstack_embeds", dtypes=_STORED, shape="[rows, taps*H]"),
        TensorSpec(name="deepstack_index", dtypes=("int32",), shape="[...]"),
    )


def _outputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    del attributes
    return (TensorSpec(name="output", dtypes=_STORED, shape="[..., H]"),)


def _function(attributes: Mapping[str, Any]) -> onnx.FunctionProto:
    from deepstitch.plugins.common.linear_function import parse_function

    del attributes
    return parse_function(_BODY)


SCHEMA = OpSchema(
    name="DeepStackAdd",
    attributes=(Attribute(name="layer", kind="int", required=True, doc="the tap of this decoder layer, from 0"),),
    inputs=_inputs,
    outputs=_outputs,
    function=_function,
)
