"""What KVCacheAppend takes and gives, and the ONNX functions that define it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepstitch.plugins.common.schema import Attribute, OpSchema, TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["KV_FORMATS", "SCHEMA"]

KV_FORMATS = ("float32", "float16", "int8")
_FLOAT, _INT = ("float32",), ("int32",)
_CACHE, _SCALES = "[B, kv_heads, C, D]", "[B, kv_heads, C]"

# For each slot of the cache, which token goes there: 0 is none, and is the row of zeros in front of the new tokens.
_PLACES = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    second_axis = Constant <value_ints = [1]> ()
    last_axis = Constant <value_ints = [-1]> ()
    around_slots = Constant <value_ints = [1, 3]> ()
    capacity_1d = Shape <start = 2, end = 3> (past_key)
    capacity = Squeeze (capacity_1d)
    slots = Range (zero, capacity, one)
    begin = Cast <to = 7> (past_lengths)
    begin_column = Unsqueeze (begin, second_axis)
    token = Sub (slots, begin_column)
    tokens = Shape <start = 1, end = 2> (key)
    valid = Cast <to = 7> (query_lengths)
    valid_column = Unsqueeze (valid, second_axis)
    end = Min (valid_column, tokens)
    not_past = GreaterOrEqual (token, zero)
    not_behind = Less (token, end)
    is_new = And (not_past, not_behind)
    token_from_one = Add (token, one)
    place = Where (is_new, token_from_one, zero)
    place_3d = Unsqueeze (place, last_axis)
    is_new_4d = Unsqueeze (is_new, around_slots)
    rows_and_tokens = Shape <start = 0, end = 2> (key)
    heads = Shape <start = 1, end = 2> (past_key)
    width = Shape <start = 3, end = 4> (past_key)
    by_head = Concat <axis = 0> (rows_and_tokens, heads, width)
    one_before = Constant <value_ints = [0, 1, 0, 0, 0, 0, 0, 0]> ()
"""

# PART [B, S, kv_heads*D] to what is stored, as floats: VALUES [B, S, kv_heads, D], for int8 STEPS [B, S, kv_heads, 1]
_VALUES = """
    VALUES = Reshape <allowzero = 1> (PART, by_head)
"""
_QUANTIZED = """
    PART_by_head = Reshape <allowzero = 1> (PART, by_head)
    PART_size = Abs (PART_by_head)
    PART_largest = ReduceMax <keepdims = 1> (PART_size, channel_axis)
    STEPS = Div (PART_largest, levels)
    PART_silent = Equal (STEPS, nothing)
    PART_divisor = Where (PART_silent, unit, STEPS)
    PART_counted = Div (PART_by_head, PART_divisor)
    PART_rounded = Round (PART_counted)
    PART_clipped = Clip (PART_rounded, lowest, levels)
    VALUES = Where (PART_silent, nothing, PART_clipped)
"""
_QUANTIZED_CONSTANTS = """
    channel_axis = Constant <value_ints = [3]> ()
    levels = Constant <value_float = 127.0> ()
    lowest = Constant <value_float = -127.0> ()
    nothing = Constant <value_float = 0.0> ()
    unit = Constant <value_float = 1.0> ()
"""

# Floats by token to their slots, over the floats that are there.
_PUT = """
    NEW_padded = Pad (NEW, one_before)
    NEW_by_slot = GatherND <batch_dims = 1> (NEW_padded, place_3d)
    NEW_by_head = Transpose <perm = [0, 2, 1, 3]> (NEW_by_slot)
    PRESENT = Where (is_new_4d, NEW_by_head, PAST)
"""

# Through float32, which holds the smaller types exactly: Where of those is not in every runtime.
_PUT_AS_TYPE = f"""
    past_PART_float = Cast <to = 1> (past_PART)
    {_PUT.replace("PAST", "past_PART_float").replace("PRESENT", "present_PART_float").replace("NEW", "VALUES")}
    present_PART = Cast <to = TYPE> (present_PART_float)
"""
_PUT_SCALES = f"""
    past_PART_steps = Unsqueeze (past_PART_scales, last_axis)
    {_PUT.replace("PAST", "past_PART_steps").replace("PRESENT", "present_PART_steps").replace("NEW", "STEPS")}
    present_PART_scales = Squeeze (present_PART_steps, last_axis)
"""
_BODIES: Mapping[str, str] = {
    "float32": _VALUES + _PUT.replace("PAST", "past_PART").replace("PRESENT", "present_PART").replace("NEW", "VALUES"),
    "float16": _VALUES + _PUT_AS_TYPE.replace("TYPE", "10"),
    "int8": _QUANTIZED + _PUT_AS_TYPE.replace("TYPE", "3") + _PUT_SCALES,
}


def _cache(attributes: Mapping[str, Any], when: str) -> tuple[TensorSpec, ...]:
    """The tensors of the cache before (``past``) or after (``present``)."""
    kv_format = attributes["kv_format"]
    specs = [TensorSpec(name=f"{when}_{part}", dtypes=(kv_format,), shape=_CACHE) for part in ("key", "value")]
    if kv_format == "int8":
        specs += [TensorSpec(name=f"{spec.name}_scales", dtypes=_FLOAT, shape=_SCALES) for spec in specs]
    return tuple(specs)


def _inputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    return (
        *_cache(attributes, "past"),
        TensorSpec(name="key", dtypes=_FLOAT, shape="[B, S, kv_heads*D]"),
        TensorSpec(name="value", dtypes=_FLOAT, shape="[B, S, kv_heads*D]"),
        TensorSpec(name="past_lengths", dtypes=_INT, shape="[B]"),
        TensorSpec(name="query_lengths", dtypes=_INT, shape="[B]"),
    )


def _outputs(attributes: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    return _cache(attributes, "present")


def _function(attributes: Mapping[str, Any]) -> onnx.FunctionProto:
    from deepstitch.plugins.common.linear_function import parse_function

    body = _BODIES[attributes["kv_format"]].replace("VALUES", "PART_values").replace("STEPS", "PART_steps")
    constants = _QUANTIZED_CONSTANTS if attributes["kv_format"] == "int8" else ""
    inputs, outputs = (", ".join(spec.name for spec in make(attributes)) for make in (_inputs, _outputs))
    nodes = _PLACES + constants + body.replace("PART", "key") + body.replace("PART", "value")
    return parse_function(f"KVCacheAppend <kv_format> ({inputs}) => ({outputs})\n{{{nodes}}}")


SCHEMA = OpSchema(
    name="KVCacheAppend",
    attributes=(
        Attribute(
            name="kv_format", kind="string", default="float32", choices=KV_FORMATS, doc="how keys and values are stored"
        ),
    ),
    inputs=_inputs,
    outputs=_outputs,
    function=_function,
)
