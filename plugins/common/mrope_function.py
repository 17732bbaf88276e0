"""The angles of Qwen3-VL's interleaved multimodal rotary embedding, in ONNX's textual syntax.

What the functions of ``MRotaryCosSin`` (canonical graph) and ``RMSNormRope`` (plugin) have in common.
"""

from __future__ import annotations

__all__ = ["MROPE_ANGLES"]

# From position_ids [3, B, S] int, inv_freq [D/2] and the attribute mrope_section to angles [B, S, D/2] float32. Pair j
# of the head takes the height position if j % 3 == 1 and j < 3 * section[1], the width position if j % 3 == 2 and
# j < 3 * section[2], else the temporal one.
MROPE_ANGLES = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    three = Constant <value_int = 3> ()
    section = Constant <value_ints: ints = @mrope_section> ()
    limits = Mul (section, three)
    height_limit = Gather (limits, one)
    width_limit = Gather (limits, two)
    num_pairs = Size (inv_freq)
    pair = Range (zero, num_pairs, one)
    phase = Mod (pair, three)
    phase_is_height = Equal (phase, one)
    below_height = Less (pair, height_limit)
    takes_height = And (phase_is_height, below_height)
    phase_is_width = Equal (phase, two)
    below_width = Less (pair, width_limit)
    takes_width = And (phase_is_width, below_width)
    height_or_time = Where (takes_height, one, zero)
    axis = Where (takes_width, two, height_or_time)
    by_pair = Gather <axis = 0> (position_ids, axis)
    positions = Transpose <perm = [1, 2, 0]> (by_pair)
    positions_float = Cast <to = 1> (positions)
    angles = Mul (positions_float, inv_freq)
"""
