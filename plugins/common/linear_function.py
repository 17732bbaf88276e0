"""A product with a stored matrix, in ONNX's textual syntax: what operators put into the body that defines them.

Everything is standard ONNX (opset 21) and says the definition of ``plugins/quantized_linear/README.md`` step by step.
The block-wise integer sums are a float product: a sum of 128 products of magnitude 127 * 128 is below 2**24, hence
exact, and float products mean the same on every machine, which 8-bit ones with saturating instructions do not.
"""

from __future__ import annotations

import onnx
import onnx.parser

from deepstitch.plugins.common.schema import DOMAIN

__all__ = ["OPSET", "linear_nodes", "parse_function"]

OPSET = 21

_FLOAT = """
    P_values = Cast <to = 1> (WEIGHT)
    P_columns = Transpose <perm = [1, 0]> (P_values)
    OUT = MatMul (X, P_columns)
"""

# [N, K / count] words to [blocks, BLOCK, N] numbers, lowest bits first
_WEIGHTS = """
    P_last_axis = Constant <value_ints = [-1]> ()
    P_bits = Cast <to = 12> (WEIGHT)
    P_bits_apart = Unsqueeze (P_bits, P_last_axis)
    P_shifts = Constant <value = uint32[COUNT] {SHIFTS}> ()
    P_mask = Constant <value = uint32 {MASK}> ()
    P_shifted = BitShift <direction = "RIGHT"> (P_bits_apart, P_shifts)
    P_fields = BitwiseAnd (P_shifted, P_mask)
    P_scales_shape = Shape (SCALES)
    P_block = Constant <value_ints = [BLOCK]> ()
    P_weight_shape = Concat <axis = 0> (P_scales_shape, P_block)
    P_weight = Reshape (P_fields, P_weight_shape)
    P_weight_by_block = Transpose <perm = [1, 2, 0]> (P_weight)
    NUMBERS
"""

_INT4 = """
    P_nibbles = Cast <to = 1> (P_weight_by_block)
    P_middle = Constant <value = float {8.0}> ()
    P_numbers = Sub (P_nibbles, P_middle)
"""

# a byte over 127 becomes the negative number of the same bits
_INT8 = """
    P_bytes = Cast <to = 3> (P_weight_by_block)
    P_numbers = Cast <to = 1> (P_bytes)
"""

# Two things are as they are because of ONNX Runtime 1.31 where there are no rows: axes to reduce are counted from the
# front (of -1 it takes no notice), and no Transpose stands before MatMul (it fuses the two and divides by the rows).
_BLOCKWISE = """
    P_rows = Shape <start = 0, end = 1> (X)
    P_blocks = Shape <start = -1> (SCALES)
    P_x_shape = Concat <axis = 0> (P_rows, P_blocks, P_block)
    P_x_blocks = Reshape <allowzero = 1> (X, P_x_shape)
    P_x = Transpose <perm = [1, 0, 2]> (P_x_blocks)
    P_magnitude = Abs (P_x)
    P_within_block = Constant <value_ints = [2]> ()
    P_largest = ReduceMax <keepdims = 1> (P_magnitude, P_within_block)
    P_top = Constant <value = float {127.0}> ()
    P_step = Div (P_largest, P_top)
    P_zero = Constant <value = float {0.0}> ()
    P_silent = Equal (P_step, P_zero)
    P_quotient = Div (P_x, P_step)
    P_rounded = Round (P_quotient)
    P_bottom = Constant <value = float {-127.0}> ()
    P_bounded = Clip (P_rounded, P_bottom, P_top)
    P_quantized = Where (P_silent, P_zero, P_bounded)
    P_sums = MatMul (P_quantized, P_numbers)
    P_scales = Cast <to = 1> (SCALES)
    P_scales_by_block = Transpose <perm = [1, 0]> (P_scales)
    P_row_axis = Constant <value_ints = [1]> ()
    P_scales_apart = Unsqueeze (P_scales_by_block, P_row_axis)
    P_units = Mul (P_scales_apart, P_step)
    P_parts = Mul (P_sums, P_units)
    P_block_axis = Constant <value_ints = [0]> ()
    OUT = ReduceSum <keepdims = 0> (P_parts, P_block_axis)
"""


def linear_nodes(
    name: str, *, x: str, weight: str, scales: str, output: str, weight_format: str, block_size: int
) -> str:
    """Nodes that make ``output [n, N]`` from ``x [n, K]`` float32 and one stored matrix.

    Args:
        name: put before the names of all values between.
        x: value ``[n, K]`` float32.
        weight: value ``[N, ...]`` in ``weight_format``.
        scales: value ``[N, K / block_size]``; not looked at for float formats.
        output: name of the result.
        weight_format: float32, float16, int8 or int4.
        block_size: numbers that share a scale; 0 for float formats.
    """
    if weight_format in ("float32", "float16"):
        text = _FLOAT
    else:
        bits = {"int8": 8, "int4": 4}[weight_format]
        text = _WEIGHTS.replace("NUMBERS", _INT8 if bits == 8 else _INT4) + _BLOCKWISE
        shifts = ", ".join(str(shift) for shift in range(0, 32, bits))
        for placeholder, value in {"COUNT": 32 // bits, "SHIFTS": shifts, "MASK": 2**bits - 1}.items():
            text = text.replace(placeholder, str(value))
    named = {"BLOCK": block_size, "WEIGHT": weight, "SCALES": scales, "OUT": output, "(X,": f"({x},", "(X)": f"({x})"}
    for placeholder, value in named.items():
        text = text.replace(placeholder, str(value))
    return text.replace("P_", f"{name}_")


def parse_function(text: str) -> onnx.FunctionProto:
    """One operator's body from its text, in the domain of the plugins."""
    return onnx.parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>{text}')
