"""Which parameter is stored in which format."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from deepstitch.blockwise import WeightFormat
from deepstitch.errors import UnsupportedError
from deepstitch.models.checkpoint import WeightSource

__all__ = ["BLOCKS", "INTEGER_BITS", "Group", "Recipe", "block_for", "decoder_groups", "is_expert", "matrix_shape"]

INTEGER_BITS: Mapping[str, int] = MappingProxyType({"int8": 8, "int4": 4})
BLOCKS = (32, 64, 128)
_SMALLEST_BLOCK = 16  # MatMulNBits; QMoE too
_VISION = "model.visual."
_EXPERTS = re.compile(r"\.mlp\.experts\.(gate_up|down)_proj$")
_LINEAR = re.compile(
    r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$|lm_head\.weight$|embed_tokens\.weight$"
)
_VISION_LINEAR = re.compile(
    r"^model\.visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.linear_fc[12])"
    r"|merger\.linear_fc[12]|deepstack_merger_list\.\d+\.linear_fc[12])\.weight$"
)
# What one kernel reads must share one format.
_GROUP_OF = (
    (re.compile(r"(layers\.\d+)\.self_attn\.[qkv]_proj\.weight$"), "attention.qkv"),
    (re.compile(r"(layers\.\d+)\.self_attn\.o_proj\.weight$"), "attention.out"),
    (re.compile(r"(layers\.\d+)\.mlp\.(?:gate|up)_proj\.weight$"), "mlp.gate_up"),
    (re.compile(r"(layers\.\d+)\.mlp\.down_proj\.weight$"), "mlp.down"),
    (re.compile(r"(layers\.\d+)\.mlp\.experts\.(?:gate_up|down)_proj$"), "experts"),
)


def is_expert(name: str) -> bool:
    """Whether a parameter is a stack of experts ``[E, K, N]``, the transposes of linear weights."""
    return _EXPERTS.search(name) is not None


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter's shape as matrices ``[..., N, K]`` with inputs along the last axis."""
    return (shape[0], shape[2], shape[1]) if is_expert(name) else shape


def block_for(name: str, shape: tuple[int, ...], wanted: int) -> int:
    """The block of one parameter: ``wanted``, or the largest smaller one that divides its input width.

    Raises:
        UnsupportedError: none does.
    """
    width = matrix_shape(name, shape)[-1]
    block = wanted
    while block >= _SMALLEST_BLOCK and width % block:
        block //= 2
    if block < _SMALLEST_BLOCK:
        raise UnsupportedError(
            f"'{name}' has {width} inputs, which no block of {_SMALLEST_BLOCK} or more divides; export this model with "
            f"{'--vision-weights' if name.startswith(_VISION) else '--weights'} fp16"
        )
    return block


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that share one format because one kernel reads them, or one looks them up.

    Attributes:
        name: e.g. ``layers.3.experts``.
        parameters: their names.
    """

    name: str
    parameters: tuple[str, ...]


def decoder_groups(names: Iterable[str]) -> tuple[Group, ...]:
    """Group the quantizable parameters of the language side."""
    members: dict[str, list[str]] = {}
    for name in names:
        if _EXPERTS.search(name) or (_LINEAR.search(name) and not name.startswith(_VISION)):
            members.setdefault(_group_name(name), []).append(name)
    return tuple(Group(name=name, parameters=tuple(parameters)) for name, parameters in members.items())


def _group_name(name: str) -> str:
    for pattern, kind in _GROUP_OF:
        found = pattern.search(name)
        if found:
            return f"{found[1]}.{kind}"
    return "lm_head" if name == "lm_head.weight" else "embedding"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The format of every quantized parameter; those without an entry stay floating-point."""

    formats: Mapping[str, WeightFormat]

    @classmethod
    def uniform(
        cls,
        sources: Mapping[str, WeightSource],
        *,
        bits: int | None,
        vision_bits: int | None,
        block: int,
        symmetric: bool,
    ) -> Recipe:
        """One bit width for the decoder, one for the vision encoder.

        Args:
            sources: every parameter.
            bits: of the decoder, None to leave it.
            vision_bits: of the vision encoder, None to leave it.
            block: wanted block size.
            symmetric: no zero points.

        Raises:
            UnsupportedError: no block size fits a parameter.
        """
        chosen = dict.fromkeys((group.name for group in decoder_groups(sources)), bits)
        return cls.by_group(sources, chosen, vision_bits=vision_bits, block=block, symmetric=symmetric)

    @classmethod
    def by_group(
        cls,
        sources: Mapping[str, WeightSource],
        bits: Mapping[str, int | None],
        *,
        vision_bits: int | None,
        block: int,
        symmetric: bool,
    ) -> Recipe:
        """A bit width for every group of the decoder; otherwise like :meth:`uniform`."""
        formats: dict[str, WeightFormat] = {}
        chosen = [(group, bits[group.name]) for group in decoder_groups(sources)]
        if vision_bits is not None:
            names = [name for name in sources if _VISION_LINEAR.search(name)]
            chosen += [(Group(name=name, parameters=(name,)), vision_bits) for name in names]
        for group, width in chosen:
            if width is not None:
                fitting = min(block_for(name, sources[name].shape, block) for name in group.parameters)
                stored = WeightFormat(bits=width, block=fitting, symmetric=symmetric)
                formats |= dict.fromkeys(group.parameters, stored)
        return cls(formats)

    def nbytes(self, sources: Mapping[str, WeightSource]) -> int:
        """Bytes of the quantized parameters."""
        return sum(stored.nbytes(matrix_shape(name, sources[name].shape)) for name, stored in self.formats.items())

    def bits_per_weight(self, sources: Mapping[str, WeightSource]) -> float:
        """Average over the quantized parameters, scales included."""
        weights = sum(math.prod(sources[name].shape) for name in self.formats)
        return 8 * self.nbytes(sources) / weights if weights else 0.0
