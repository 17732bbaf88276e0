"""CachedAttention over a cache of fewer bits: the definitions in standard ONNX, and ONNX Runtime's kernel for them.

Rounding, the same in both. A value ``x`` of a channel with scale ``s`` is stored as ``q = round(x * (1 / s))``, ties to
even, limited to -128…127 (int8) or -8…7 (int4); it is read as ``q * s``. int4 is stored as ``q + 8``, channel ``2j`` in
the low and channel ``2j + 1`` in the high half of byte ``j``. fp16 is a cast.

``x / s`` is another number now and then, so the definitions say Reciprocal: a Div of one by the scale would be fused
with the Mul into that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx

from deepstitch.errors import BundleError, UnsupportedError
from deepstitch.export.functions import cached_attention, parse_functions
from deepstitch.manifest import Graph

__all__ = ["KV_CACHES", "ORT_CPU_TEXTS", "CacheKind", "kind_of_graph"]

_WIDTH_STEP = 8  # what ONNX Runtime's kernel asks of a head


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKind:
    """How keys and values are stored.

    Attributes:
        name: as on the command line.
        dtype: of the graph's cache tensors, a numpy dtype name.
        per_byte: values per element of those tensors.
        largest: largest stored magnitude on both sides of zero; None where there are no scales.
        operator: what CachedAttention becomes.
    """

    name: str
    dtype: str
    per_byte: int = 1
    largest: int | None = None

    @property
    def operator(self) -> str:
        """Name of the operator in the ``deepstitch`` domain."""
        return "CachedAttention" if self.name == "fp32" else f"CachedAttention{self.name.capitalize()}"

    def width(self, head_dim: int) -> int:
        """Last axis of a cache tensor."""
        return head_dim // self.per_byte

    def check(self, head_dim: int) -> None:
        """Refuse heads that the cache cannot hold.

        Raises:
            UnsupportedError: their width is not a multiple of 8.
        """
        if self.name != "fp32" and head_dim % _WIDTH_STEP:
            raise UnsupportedError(
                f"--kv-cache {self.name}: heads of this model are {head_dim} wide, the cache takes multiples of "
                f"{_WIDTH_STEP}; leave the flag out"
            )

    def definition(self) -> onnx.FunctionProto:
        """The operator's body in standard ONNX."""
        return parse_functions((_definition(self),))[self.operator]


KV_CACHES: Mapping[str, CacheKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            CacheKind(name="fp32", dtype="float32"),
            CacheKind(name="fp16", dtype="float16"),
            CacheKind(name="int8", dtype="int8", largest=127),
            CacheKind(name="int4", dtype="uint8", per_byte=2, largest=7),
        )
    }
)


def kind_of_graph(decoder: Graph) -> CacheKind:
    """The kind of cache that a bundle's decoder declares.

    Raises:
        BundleError: not one of :data:`KV_CACHES`.
    """
    found = sorted({spec.dtype for spec in decoder.inputs if spec.name.startswith("past_key_values.")})
    kinds = {kind.dtype: kind for kind in KV_CACHES.values()}
    if len(found) != 1 or found[0] not in kinds:
        raise BundleError(
            f"manifest.json: past_key_values.* of {decoder.file}: dtype {' and '.join(found) or 'missing'}, must be "
            f"one of {', '.join(kinds)} for all; export the checkpoint again with this version of deepstitch"
        )
    return kinds[found[0]]


# PART_heads [B, Hkv, S, D] -> PART_stored, as it lies in the cache
_STORE: Mapping[str, str] = MappingProxyType(
    {
        "fp16": """
    PART_stored = Cast <to = 10> (PART_heads)
""",
        "int8": """
    PART_inverse = Reciprocal (PART_scale)
    PART_steps = Mul (PART_heads, PART_inverse)
    PART_stored = QuantizeLinear (PART_steps, scale_one, zero_point)
""",
        "int4": """
    PART_inverse = Reciprocal (PART_scale)
    PART_steps = Mul (PART_heads, PART_inverse)
    PART_limited = Clip (PART_steps, lowest, highest)
    PART_nibbles = QuantizeLinear (PART_limited, scale_one, zero_point)
    PART_even = Slice (PART_nibbles, from_even, behind_all, channel_axis, every_second)
    PART_odd = Slice (PART_nibbles, from_odd, behind_all, channel_axis, every_second)
    PART_high = BitShift <direction = "LEFT"> (PART_odd, four)
    PART_stored = BitwiseOr (PART_even, PART_high)
""",
    }
)

# present_PART, as it lies in the cache -> PART_read [B, Hkv, C, D]
_READ: Mapping[str, str] = MappingProxyType(
    {
        "fp16": """
    PART_read = Cast <to = 1> (present_PART)
""",
        "int8": """
    PART_integers = Cast <to = 1> (present_PART)
    PART_read = Mul (PART_integers, PART_scale)
""",
        "int4": """
    PART_low_bits = BitwiseAnd (present_PART, fifteen)
    PART_high_bits = BitShift <direction = "RIGHT"> (present_PART, four)
    PART_low_column = Unsqueeze (PART_low_bits, channel_axis)
    PART_high_column = Unsqueeze (PART_high_bits, channel_axis)
    PART_pairs = Concat <axis = -1> (PART_low_column, PART_high_column)
    PART_unpacked = Reshape (PART_pairs, unpacked_shape)
    PART_offset = Cast <to = 1> (PART_unpacked)
    PART_integers = Sub (PART_offset, eight)
    PART_read = Mul (PART_integers, PART_scale)
""",
    }
)

_CONSTANTS: Mapping[str, str] = MappingProxyType(
    {
        "fp16": "",
        "int8": """
    scale_one = Constant <value_float = 1.0> ()
    zero_point = Constant <value = int8 {0}> ()
""",
        "int4": """
    scale_one = Constant <value_float = 1.0> ()
    zero_point = Constant <value = uint8 {8}> ()
    lowest = Constant <value_float = -8.0> ()
    highest = Constant <value_float = 7.0> ()
    from_even = Constant <value_ints = [0]> ()
    from_odd = Constant <value_ints = [1]> ()
    behind_all = Constant <value_ints = [9223372036854775807]> ()
    channel_axis = Constant <value_ints = [-1]> ()
    every_second = Constant <value_ints = [2]> ()
    four = Constant <value = uint8 {4}> ()
""",
    }
)

_READ_CONSTANTS = """
    fifteen = Constant <value = uint8 {15}> ()
    eight = Constant <value_float = 8.0> ()
    unpacked_shape = Constant <value_ints = [0, 0, 0, -1]> ()
"""


def _of_both(text: str) -> str:
    """A fragment for keys and for values."""
    return text.replace("PART", "key") + text.replace("PART", "value")


def _definition(kind: CacheKind) -> str:
    return cached_attention(
        kind.operator,
        scales=_scales(kind),
        constants=_CONSTANTS[kind.name] + (_READ_CONSTANTS if kind.per_byte == 2 else ""),
        store=_of_both(_STORE[kind.name]),
        read=_of_both(_READ[kind.name]),
    )


def _scales(kind: CacheKind) -> str:
    return ", key_scale, value_scale" if kind.largest else ""


# The kernel rounds and writes the cache itself, in place where past and present are bound to the same memory. The
# inputs left out between the lengths and the scales are rotary tables, positions, a bias and a sink.
_ORT_CPU = """
NAME <num_heads, kv_num_heads, scale>
    (query, key, value, past_key, past_value, past_lengths, query_lengths SCALES) => (output, present_key,
    present_value)
{
    one = Constant <value = int32[1] {1}> ()
    total_lengths = Add (past_lengths, query_lengths)
    last_positions = Sub (total_lengths, one)
    longest = ReduceMax <keepdims = 1> (total_lengths)
    output, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale QUANTIZED>
        (query, key, value, past_key, past_value, last_positions, longest KERNEL_SCALES)
}
"""
_QUANTIZED = ', k_quant_type = "PER_CHANNEL", v_quant_type = "PER_CHANNEL", kv_cache_bit_width = BITS'
_KERNEL_SCALES = ", , , , , , key_scale, value_scale"


def _ort_cpu(kind: CacheKind) -> str:
    text = _ORT_CPU.replace("NAME", kind.operator)
    text = text.replace("KERNEL_SCALES", _KERNEL_SCALES if kind.largest else "")
    text = text.replace("QUANTIZED", _QUANTIZED.replace("BITS", str(8 // kind.per_byte)) if kind.largest else "")
    return text.replace("SCALES", _scales(kind))


# For :class:`deepstitch.export.passes.inline_functions.InlineFunctions`; fp32 has a pass of its own.
ORT_CPU_TEXTS = tuple(_ort_cpu(kind) for kind in KV_CACHES.values() if kind.name != "fp32")
