"""The table of cases of DeepStackAdd: what tests, GPU runs and benchmarks read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array, Case, Refused

__all__ = ["CASES", "REFUSED", "Index", "inputs"]

Index = Callable[[np.random.Generator, tuple[int, ...], int], Array]


def text(rng: np.random.Generator, shape: tuple[int, ...], rows: int) -> Array:
    """Text tokens only."""
    del rng, rows
    return np.zeros(shape, np.int32)


def mixed(rng: np.random.Generator, shape: tuple[int, ...], rows: int) -> Array:
    """About half of the tokens are text."""
    return np.where(rng.random(shape) < 0.5, 0, rng.integers(0, rows, shape)).astype(np.int32)


def picture(rng: np.random.Generator, shape: tuple[int, ...], rows: int) -> Array:
    """Rows 1, 2, ... in order, between text: what a prompt with one picture looks like."""
    del rng
    index = np.zeros(int(np.prod(shape)), np.int32)
    count = min(rows - 1, max(index.size - 2, 0))
    index[1 : 1 + count] = np.arange(1, 1 + count)
    return index.reshape(shape)


def one_row(rng: np.random.Generator, shape: tuple[int, ...], rows: int) -> Array:
    """Every token takes the last row."""
    del rng
    return np.full(shape, rows - 1, np.int32)


def outside(rng: np.random.Generator, shape: tuple[int, ...], rows: int) -> Array:
    """Indices that are no row: negative, one too large, the extremes of int32. They add nothing."""
    choices = np.array([-1, rows, rows + 1, 2**31 - 1, -(2**31), 1 % rows, 0], np.int64)
    return rng.choice(choices, shape).astype(np.int32)


def inputs(
    tokens: tuple[int, ...],
    width: int,
    rows: int,
    taps: int,
    *,
    index: Index = mixed,
    hidden: str = "float32",
    embeds: str = "float32",
    first_row: float = 0.0,
) -> Callable[[np.random.Generator], dict[str, Array]]:
    """The three tensors of one call.

    Args:
        tokens: leading axes of the hidden states.
        width: H.
        rows: of the table, with the row of zeros.
        taps: slices of H columns in a row.
        index: which row each token takes.
        hidden: dtype of the hidden states.
        embeds: dtype of the table.
        first_row: what row 0 holds; a NaN shows that it is not read.
    """

    def make(rng: np.random.Generator) -> dict[str, Array]:
        table = rng.standard_normal((rows, taps * width), dtype=np.float32)
        table[0] = first_row
        return {
            "hidden_states": rng.standard_normal((*tokens, width), dtype=np.float32).astype(hidden),
            "deepstack_embeds": table.astype(embeds),
            "deepstack_index": index(rng, tokens, rows),
        }

    return make


def _case(name: str, tokens: tuple[int, ...], width: int, rows: int, taps: int, layer: int = 0, **options: Any) -> Case:
    """One float32 sum per element, rounded once: nothing but the same bits is right."""
    tags = tuple(options.pop("tags", ()))
    made = inputs(tokens, width, rows, taps, **options)
    return Case(name=name, attributes={"layer": layer}, inputs=made, nmse=0.0, max_abs=0.0, tags=tags)


def _cases() -> tuple[Case, ...]:
    cases = [
        _case("one-token-text", (1, 1), 64, 1, 3, index=text, tags=("decode",)),
        _case("one-token-visual", (1, 1), 64, 5, 3, 1, index=one_row, tags=("decode",)),
        _case("one-column", (3, 2), 1, 4, 3, 2),
        _case("three-columns", (2, 5), 3, 4, 3, 1),
        _case("no-tokens", (1, 0), 64, 3, 3, index=text, tags=("empty",)),
        _case("no-batch", (0, 4), 8, 3, 3, index=text, tags=("empty",)),
        _case("only-zeros", (2, 3), 32, 1, 3),
        _case("one-tap", (2, 3), 32, 4, 1),
        _case("eight-taps-last", (2, 3), 32, 4, 8, 7),
        _case("all-visual", (1, 9), 48, 10, 3, index=one_row),
        _case("picture", (1, 40), 64, 33, 3, index=picture),
        _case("picture-batch", (3, 17), 64, 33, 3, 2, index=picture),
        _case("outside", (4, 16), 64, 6, 3, 1, index=outside),
        _case("outside-scalar", (4, 16), 7, 6, 3, 1, index=outside),
        _case("outside-one-row", (2, 9), 8, 1, 2, 1, index=outside),
        _case("row-0-is-poison", (2, 12), 64, 9, 3, first_row=float("nan")),
        _case("row-0-is-poison-outside", (2, 12), 36, 9, 3, 2, index=outside, first_row=float("nan")),
        _case("flat-tokens", (11,), 64, 7, 3, 1),
        _case("three-leading-axes", (2, 3, 2), 24, 7, 3, 1),
        _case("no-leading-axis", (), 40, 7, 3, 1, index=one_row),
        _case("many-rows", (2, 20), 16, 500, 3, 2),
        _case("width-508", (1, 3), 508, 4, 3, 1, tags=("ragged",)),  # one access short of a block
        _case("width-512", (1, 3), 512, 4, 3, 1),
        _case("width-516", (1, 3), 516, 4, 3, 1, tags=("ragged",)),  # one access more
        _case("width-129", (1, 3), 129, 4, 3, 1, tags=("ragged",)),  # one column more than a scalar block
        _case("width-2048", (1, 4), 2048, 3, 3, 2),
    ]
    formats = [(hidden, embeds) for hidden in ("float32", "float16") for embeds in ("float32", "float16")]
    for hidden, embeds in formats[1:]:
        stored: dict[str, Any] = {"hidden": hidden, "embeds": embeds}
        name = f"{hidden.replace('float', 'f')}-{embeds.replace('float', 'f')}"
        cases += [
            _case(f"{name}", (2, 7), 64, 6, 3, 1, **stored),
            _case(f"{name}-scalar", (2, 7), 36, 6, 3, 2, **stored, tags=("ragged",)),
            _case(f"{name}-odd", (2, 7), 13, 6, 3, 2, **stored, tags=("ragged",)),
            _case(f"{name}-outside", (3, 9), 24, 5, 3, **stored, index=outside, first_row=float("nan")),
            _case(f"{name}-two-blocks", (1, 2), 1032, 3, 3, 1, **stored),
        ]
    return tuple(cases)


CASES = _cases()


def _refused(name: str, text: str, layer: int = 0, **replaced: Array) -> Refused:
    good = inputs((2, 3), 8, 4, 3)(np.random.default_rng(0))
    return Refused(name, {"layer": layer}, good | replaced, text)


REFUSED = (
    _refused("negative-layer", "layer is -1", -1),
    _refused("layer-beyond-the-taps", "layer is 3, but deepstack_embeds has 3 taps", 3),
    _refused("columns-no-multiple", "not a multiple of H", deepstack_embeds=np.zeros((4, 20), np.float32)),
    _refused("table-too-narrow", "not a multiple of H", deepstack_embeds=np.zeros((4, 4), np.float32)),
    _refused("table-without-rows", "has no row", deepstack_embeds=np.zeros((0, 24), np.float32)),
    _refused("table-of-rank-3", "[rows, taps * H]", deepstack_embeds=np.zeros((1, 4, 24), np.float32)),
    _refused("index-of-other-shape", "one index per token", deepstack_index=np.zeros((3, 2), np.int32)),
    _refused("index-with-columns", "one index per token", deepstack_index=np.zeros((2, 3, 8), np.int32)),
    _refused("index-of-floats", "deepstack_index is float32", deepstack_index=np.zeros((2, 3), np.float32)),
    _refused("integer-table", "deepstack_embeds is int32", deepstack_embeds=np.zeros((4, 24), np.int32)),
    _refused("scalar", "is a scalar", hidden_states=np.zeros((), np.float32)),
)
