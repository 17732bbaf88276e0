"""The table of cases of QuantizedLinear: what tests, GPU runs and benchmarks read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array, Case, Refused
from deepstitch.plugins.common.numerics import quantize_weights

__all__ = ["CASES", "REFUSED", "normal", "scaled", "some_zero", "stored"]

Rows = Callable[[np.random.Generator, tuple[int, ...]], Array]

# Sums in float32 against sums in float64; the quantization of x is equal to the last bit.
NMSE = 1e-11


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Standard normal float32."""
    return rng.standard_normal(shape, dtype=np.float32)


def scaled(factor: float) -> Rows:
    """Normal, times a constant."""
    return lambda rng, shape: (normal(rng, shape) * np.float32(factor)).astype(np.float32)


def some_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Every other 32 columns are zero in even rows; the last row is all zeros."""
    x = normal(rng, shape)
    column_is_zero = np.arange(shape[-1]) // 32 % 2 == 0
    x[::2][..., column_is_zero] = 0
    x[-1] = 0
    return x


def one_spike(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """One number a block of 32 is a thousand times larger: the others round to nothing."""
    x = normal(rng, shape)
    x[..., 5::32] *= 1000
    return x


def many_magnitudes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Columns from 1e-12 to 1e12."""
    return (normal(rng, shape) * np.logspace(-12, 12, shape[-1], dtype=np.float32)).astype(np.float32)


def halves(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Multiples of 1/2 whose largest in 32 is 127: the step is 1, and every second number lies between two."""
    x = rng.integers(-253, 254, shape).astype(np.float32) / 2
    x[..., ::32] = 127
    return x


def extremes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Everything is 1 or -1, hence 127 or -127."""
    return rng.choice(np.array([-1, 1], np.float32), shape)


def stored(name: str, matrix: Array, weight_format: str, block: int = 0, scale: str = "float32") -> dict[str, Array]:
    """The inputs that hold a matrix, or a stack of them: ``name`` and, for integer formats, its scales."""
    if weight_format in ("float32", "float16"):
        return {name: matrix.astype(weight_format)}
    words, scales = quantize_weights(matrix, {"int4": 4, "int8": 8}[weight_format], block)
    return {name: words, "scales" if name == "weight" else f"{name}_scales": scales.astype(scale)}


def _case(
    name: str,
    weight_format: str,
    block: int = 0,
    *,
    tokens: tuple[int, ...] | int = 3,
    k: int = 256,
    n: int = 40,
    scale: str = "float32",
    x: Rows = normal,
    weight: Rows = normal,
    bias: bool = False,
    residual: bool = False,
    lowest: bool = False,
    tags: tuple[str, ...] = (),
) -> Case:
    leading = (tokens,) if isinstance(tokens, int) else tokens

    def inputs(rng: np.random.Generator) -> dict[str, Array]:
        made = {"x": x(rng, (*leading, k)), **stored("weight", weight(rng, (n, k)), weight_format, block, scale)}
        if lowest:
            made["weight"][:] = {"int8": -0x7F7F7F80, "int4": 0}[weight_format]
        if bias:
            made["bias"] = normal(rng, (n,))
        if residual:
            made["residual"] = normal(rng, (*leading, n))
        return made

    attributes: dict[str, Any] = {"weight_format": weight_format, "out_features": n}
    attributes |= {"block_size": block} if block else {}
    attributes |= {"has_bias": 1} if bias else {}
    attributes |= {"has_residual": 1} if residual else {}
    return Case(name=name, attributes=attributes, inputs=inputs, nmse=NMSE, tags=tags)


def _formats() -> list[Case]:
    """Every format, block and type of scale."""
    integer = [
        _case(f"{weight_format}_{block}_{scale}", weight_format, block, scale=scale, tags=("format",))
        for weight_format in ("int4", "int8")
        for block in (32, 64, 128)
        for scale in ("float32", "float16")
    ]
    return [_case(kind, kind, tags=("format",)) for kind in ("float32", "float16")] + integer


def _tokens() -> list[Case]:
    """Both regimes and the edges between them, N ragged."""
    each = [("int4", 32, 129), ("int8", 64, 70), ("float16", 0, 65), ("float32", 0, 67)]
    return [
        _case(f"{kind}_{tokens}_tokens", kind, block, tokens=tokens, k=192, n=n, tags=("tokens",))
        for kind, block, n in each
        for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 65)
    ]


def _shapes() -> list[Case]:
    cases = [
        _case(f"{kind}_{tokens}x{k}_n{n}", kind, block, tokens=tokens, k=k, n=n, tags=("shape",))
        for kind, block, tokens, k, n in (
            ("int4", 32, 1, 32, 1),
            ("int4", 32, 1, 2080, 7),
            ("int4", 128, 17, 384, 33),
            ("int4", 64, 65, 64, 31),
            ("int8", 32, 1, 96, 1),
            ("int8", 128, 1, 2048, 5),
            ("int8", 32, 34, 160, 130),
            ("float16", 0, 1, 1056, 3),
            ("float32", 0, 16, 32, 1),
            ("float16", 0, 130, 32, 66),
            # rows longer than the activations that fit in shared memory at a time
            ("int4", 32, 1, 16416, 3),
            ("int4", 32, 8, 2176, 9),
            ("int8", 32, 1, 16448, 2),
            ("int8", 64, 7, 2112, 9),
            ("float16", 0, 1, 4160, 2),
            ("float16", 0, 7, 1056, 5),
            ("float32", 0, 1, 4128, 3),
            ("float32", 0, 8, 544, 10),
            # as long as the rows of the 2B model
            ("int4", 32, 1, 2048, 512),
            ("int4", 32, 8, 6144, 128),
            ("int4", 32, 70, 2048, 70),
            ("int8", 128, 40, 6144, 70),
        )
    ]
    cases += [
        _case("int4_batch_of_sequences", "int4", 32, tokens=(2, 3), k=64, n=24, tags=("shape",)),
        _case("int8_four_axes", "int8", 32, tokens=(2, 1, 3), k=64, n=24, bias=True, residual=True, tags=("shape",)),
    ]
    for kind, block in (("int4", 32), ("int8", 32), ("float16", 0), ("float32", 0)):
        cases.append(_case(f"{kind}_no_tokens", kind, block, tokens=0, k=64, n=8, tags=("empty",)))
    cases.append(_case("int4_no_sequences", "int4", 32, tokens=(0, 5), k=64, n=8, residual=True, tags=("empty",)))
    return cases


def _fused() -> list[Case]:
    return [
        _case(
            f"{kind}_{tokens}_tokens_{what}",
            kind,
            block,
            tokens=tokens,
            k=128,
            n=37,
            bias="bias" in what,
            residual="residual" in what,
            tags=("fused",),
        )
        for kind, block in (("int4", 32), ("int8", 128), ("float16", 0), ("float32", 0))
        for tokens, what in ((1, "bias"), (12, "residual"), (2, "bias_residual"), (40, "bias_residual"))
    ]


def _numbers() -> list[Case]:
    """What is hard about the numbers."""
    subnormal_half = scaled(2e-7)  # scales of about 1e-7, below the least normal half
    cases = [
        _case(f"{kind}_{name}", kind, block, tokens=tokens, x=x, tags=("numbers",))
        for kind, block, tokens in (("int4", 32, 2), ("int8", 64, 11))
        for name, x in (
            ("zero_blocks", some_zero),
            ("huge", scaled(1e30)),
            ("small", scaled(1e-30)),
            ("spikes", one_spike),
            ("many_magnitudes", many_magnitudes),
            ("halves", halves),
        )
    ]
    cases += [
        _case("int8_extremes", "int8", 128, tokens=2, x=extremes, weight=extremes, tags=("numbers",)),
        _case("int4_extremes", "int4", 128, tokens=20, x=extremes, weight=extremes, tags=("numbers",)),
        _case("int8_lowest", "int8", 128, tokens=3, x=extremes, lowest=True, tags=("numbers",)),
        _case("int4_lowest", "int4", 64, tokens=20, x=extremes, lowest=True, tags=("numbers",)),
        # steps of a few times the least float32: magnitudes over 127 steps are clipped
        _case("int8_subnormal_steps", "int8", 32, x=scaled(1e-42), weight=scaled(1e20), tags=("numbers",)),
        _case("int4_zero_weights", "int4", 32, tokens=1, weight=some_zero, tags=("numbers",)),
        _case("int4_subnormal_scales", "int4", 32, weight=subnormal_half, scale="float16", tags=("numbers",)),
        _case("float16_subnormal", "float16", weight=subnormal_half, tags=("numbers",)),
        _case("float32_many_magnitudes", "float32", x=many_magnitudes, tags=("numbers",)),
        _case("float16_huge", "float16", x=scaled(1e30), tags=("numbers",)),
    ]
    return cases


CASES: tuple[Case, ...] = (*_formats(), *_tokens(), *_shapes(), *_fused(), *_numbers())


def _refused(
    name: str, text: str, attributes: dict[str, Any] | None = None, *, k: int = 64, without: str = "", **replaced: Array
) -> Refused:
    """A good int4 call of [2, k] and 8 outputs, one thing of which is wrong."""
    rng = np.random.default_rng(0)
    given = {"weight_format": "int4", "block_size": 32, "out_features": 8} | (attributes or {})
    tensors = {"x": normal(rng, (2, k)), **stored("weight", normal(rng, (8, 64)), "int4", 32)} | replaced
    tensors.pop(without, None)
    return Refused(name, {key: value for key, value in given.items() if value is not None}, tensors, text)


def _refused_attributes() -> list[Refused]:
    floats: dict[str, Any] = {"weight_format": "float32"}
    return [
        _refused("unknown_attribute", "has no attribute blocksize", {"blocksize": 32}),
        _refused("no_format", "needs the attribute", {"weight_format": None}),
        _refused("no_outputs", "needs the attribute", {"out_features": None}),
        _refused("outputs_zero", "out_features is 0", {"out_features": 0}),
        _refused("outputs_negative", "out_features is -8", {"out_features": -8}),
        _refused("unknown_format", "weight_format is 'int5'", {"weight_format": "int5"}),
        _refused("format_is_a_number", "weight_format is of kind int", {"weight_format": 4}),
        _refused("block_of_48", "block_size is 48", {"block_size": 48}),
        _refused("block_of_256", "block_size is 256", {"block_size": 256}),
        _refused("no_block", "block_size is 0", {"block_size": None}),
        _refused("block_with_floats", "have no blocks", floats),
        _refused("bias_neither_0_nor_1", "has_bias is 2", {"has_bias": 2}),
        _refused("residual_neither_0_nor_1", "has_residual is -1", {"has_residual": -1}),
    ]


def _refused_inputs() -> list[Refused]:
    zeros = np.zeros
    words, scales = zeros((8, 8), np.int32), zeros((8, 2), np.float32)
    bias, residual = {"has_bias": 1}, {"has_residual": 1}
    floats: dict[str, Any] = {"weight_format": "float16", "block_size": 0}
    half = zeros((8, 64), np.float16)
    return [
        _refused("k_of_48", "must be a positive multiple of 32", k=48),
        _refused("k_of_zero", "must be a positive multiple of 32", k=0),
        _refused("block_does_not_divide", "which block_size 64 does not divide", {"block_size": 64}, k=96),
        _refused("x_is_half", "x is float16", x=zeros((2, 64), np.float16)),
        _refused("x_is_a_scalar", "x has rank 0", x=zeros((), np.float32)),
        _refused("k_of_other_length", "weight has shape [8, 8]", k=96),
        _refused("packed_as_int8", "weight has shape [8, 16]", weight=zeros((8, 16), np.int32)),
        _refused("packed_as_int4", "weight has shape [8, 8]", {"weight_format": "int8"}),
        _refused("not_packed", "weight has shape [8, 64]", weight=zeros((8, 64), np.int32)),
        _refused("words_of_floats", "weight is float32", weight=words.astype(np.float32)),
        _refused("words_of_bytes", "weight is int8", weight=zeros((8, 32), np.int8)),
        _refused("transposed", "weight has shape [64, 1]", weight=zeros((64, 1), np.int32)),
        _refused("other_outputs", "it must be [9, 8]", {"out_features": 9}),
        _refused("stack", "weight has shape [1, 8, 8]", weight=words[None]),
        _refused("no_scales", "scales", without="scales"),
        _refused("too_few_scales", "scales has shape [8, 1]", scales=scales[:, :1]),
        _refused("too_many_scales", "scales has shape [8, 3]", scales=zeros((8, 3), np.float32)),
        _refused("integer_scales", "scales is int32", scales=scales.astype(np.int32)),
        _refused("scales_with_floats", "scales", floats, weight=half),
        _refused(
            "half_as_float", "weight is float16", {**floats, "weight_format": "float32"}, weight=half, without="scales"
        ),
        _refused("bias_missing", "bias", bias),
        _refused("bias_not_asked_for", "bias", bias=zeros(8, np.float32)),
        _refused("bias_too_long", "bias has shape [9]", bias, bias=zeros(9, np.float32)),
        _refused("bias_with_rows", "bias has shape [1, 8]", bias, bias=zeros((1, 8), np.float32)),
        _refused("residual_of_one_row", "residual has shape [1, 8]", residual, residual=zeros((1, 8), np.float32)),
        _refused("residual_like_x", "residual has shape [2, 64]", residual, residual=zeros((2, 64), np.float32)),
    ]


REFUSED: tuple[Refused, ...] = (*_refused_attributes(), *_refused_inputs())
