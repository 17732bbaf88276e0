"""The table of cases of RMSNormRope: what tests, GPU runs and benchmarks read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array, Case, Refused

__all__ = ["CASES", "REFUSED", "norm_inputs", "rope_inputs", "section_of"]

Positions = Callable[[np.random.Generator, int, int], Array]

# float32 arithmetic against float64. Where results are rounded to fp16, one element in some dozens may fall on the
# other side of the middle between two numbers: then it is wrong by 2^-11 of itself.
NMSE = {"float32": 1e-13, "float16": 5e-8}


def counting(rng: np.random.Generator, batch: int, length: int) -> Array:
    """Text: three equal rows 0, 1, 2, ..."""
    del rng
    return np.broadcast_to(np.arange(length, dtype=np.int32), (3, batch, length)).copy()


def picture(rng: np.random.Generator, batch: int, length: int) -> Array:
    """A token of text, then a picture 4 patches wide, whose patches share the time position."""
    del rng
    patch = np.maximum(np.arange(length) - 1, 0)
    one = np.stack([np.minimum(np.arange(length), 1), 1 + patch // 4, 1 + patch % 4])
    one[:, 0] = 0
    return np.repeat(one[:, None], batch, axis=1).astype(np.int32)


def from_position(first: int) -> Positions:
    """Text that starts at a position, a little apart in the three rows."""
    return lambda rng, batch, length: (
        first + np.arange(length) + np.array([0, 3, 7])[:, None, None] + np.zeros((3, batch, length))
    ).astype(np.int32)


def anywhere(rng: np.random.Generator, batch: int, length: int) -> Array:
    """Every position up to 2^18, each row on its own."""
    return rng.integers(0, 1 << 18, (3, batch, length)).astype(np.int32)


def extremes(rng: np.random.Generator, batch: int, length: int) -> Array:
    """Negative positions and the ends of int32."""
    return rng.choice(np.array([-1, -1000, 2**24 + 1, 2**31 - 1, -(2**31)], np.int64), (3, batch, length)).astype(
        np.int32
    )


def section_of(head_dim: int) -> list[int]:
    """Pairs turned by time, height and width, in the proportions of the published models (24, 20, 20 of 64)."""
    side = head_dim // 2 * 5 // 16
    return [head_dim // 2 - 2 * side, side, side]


def norm_inputs(
    leading: tuple[int, ...], width: int, *, residual: bool = False, dtype: str = "float32", scale: float = 1.0
) -> Callable[[np.random.Generator], dict[str, Array]]:
    """Tensors of mode "norm": x (and residual) ``[*leading, width]``, weight ``[width]``."""

    def make(rng: np.random.Generator) -> dict[str, Array]:
        def rows() -> Array:
            return (rng.standard_normal((*leading, width), dtype=np.float32) * np.float32(scale)).astype(dtype)

        weight = 1 + 0.3 * rng.standard_normal(width, dtype=np.float32)
        return {"x": rows(), **({"residual": rows()} if residual else {}), "weight": weight}

    return make


def rope_inputs(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    *,
    positions: Positions = counting,
    dtype: str = "float32",
    theta: float = 5e6,
) -> Callable[[np.random.Generator], dict[str, Array]]:
    """Tensors of mode "norm_rope", with the frequencies ``theta ** (-2 j / head_dim)``."""

    def make(rng: np.random.Generator) -> dict[str, Array]:
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        return {
            "x": rng.standard_normal((batch, length, heads * head_dim), dtype=np.float32).astype(dtype),
            "weight": 1 + 0.3 * rng.standard_normal(head_dim, dtype=np.float32),
            "position_ids": positions(rng, batch, length),
            "inv_freq": (theta**-exponents).astype(np.float32),
        }

    return make


def _norm(name: str, leading: tuple[int, ...], width: int, *, epsilon: float = 1e-6, **options: Any) -> Case:
    tags = ("norm", *options.pop("tags", ()))
    attributes = {"mode": "norm", "epsilon": epsilon, "has_residual": int(options.get("residual", False))}
    nmse = NMSE[options.get("dtype", "float32")]
    return Case(name=name, attributes=attributes, inputs=norm_inputs(leading, width, **options), nmse=nmse, tags=tags)


def _rope(name: str, batch: int, length: int, heads: int, head_dim: int, **options: Any) -> Case:
    tags = ("rope", *options.pop("tags", ()))
    attributes = {
        "mode": "norm_rope",
        "epsilon": options.pop("epsilon", 1e-6),
        "num_heads": heads,
        "mrope_section": options.pop("section", section_of(head_dim)),
    }
    nmse = NMSE[options.get("dtype", "float32")]
    inputs = rope_inputs(batch, length, heads, head_dim, **options)
    return Case(name=name, attributes=attributes, inputs=inputs, nmse=nmse, tags=tags)


def _norm_cases() -> list[Case]:
    ragged = (1, 2, 3, 7, 31, 100, 255, 1023, 1028)
    return [
        _norm("norm-one-token", (1, 1), 64, tags=("decode",)),
        _norm("norm-no-token", (1, 0), 64, tags=("empty",)),
        _norm("norm-no-token-residual", (0, 3), 64, residual=True, tags=("empty",)),
        _norm("norm-one-axis", (), 48),
        _norm("norm-four-axes", (2, 1, 3, 2), 24),
        *(_norm(f"norm-width-{width}", (2, 2), width, tags=("ragged",)) for width in ragged),
        _norm("norm-width-1024", (1, 2), 1024),  # one access of every thread
        _norm("norm-width-2048", (1, 3), 2048),
        _norm("norm-width-10240", (1, 1), 10240),  # the last that stays in shared memory
        _norm("norm-width-10244", (1, 2), 10244, tags=("long-row",)),  # the first that is read twice
        _norm("norm-width-10241", (1, 1), 10241, tags=("long-row", "ragged")),
        _norm("norm-residual", (2, 3), 64, residual=True),
        _norm("norm-residual-ragged", (2, 3), 67, residual=True, tags=("ragged",)),
        _norm("norm-residual-2048", (1, 2), 2048, residual=True),
        _norm("norm-residual-10244", (1, 2), 10244, residual=True, tags=("long-row",)),
        _norm("norm-zeros", (2, 2), 64, scale=0.0),
        _norm("norm-large", (2, 2), 64, scale=1e17),
        _norm("norm-small", (2, 2), 64, scale=1e-12),
        _norm("norm-about-epsilon", (2, 2), 64, scale=1e-3),
        _norm("norm-epsilon-0", (2, 2), 64, epsilon=0.0),
        _norm("norm-epsilon-large", (2, 2), 64, epsilon=0.5),
        _norm("norm-half", (2, 3), 64, dtype="float16"),
        _norm("norm-half-2048", (1, 2), 2048, dtype="float16"),
        _norm("norm-half-ragged", (2, 3), 68, dtype="float16", tags=("ragged",)),  # a multiple of 4, not of 8
        _norm("norm-half-residual", (2, 3), 128, residual=True, dtype="float16"),
        _norm("norm-half-residual-ragged", (2, 3), 37, residual=True, dtype="float16", tags=("ragged",)),
        _norm("norm-half-large", (2, 2), 64, dtype="float16", scale=1e4),
        _norm("norm-half-12288", (1, 1), 12288, dtype="float16", residual=True, tags=("long-row",)),
    ]


def _rope_cases() -> list[Case]:
    head_dims = (64, 72, 80, 96, 128, 144, 256)
    ragged = (2, 4, 6, 10, 50, 66, 254)  # halves that are no whole number of accesses
    return [
        _rope("rope-decode", 1, 1, 4, 128, positions=from_position(1000), tags=("decode",)),
        _rope("rope-decode-long", 1, 1, 4, 128, positions=from_position(262000), tags=("decode", "long")),
        _rope("rope-decode-batch", 4, 1, 3, 64, positions=anywhere, tags=("decode",)),
        _rope("rope-no-token", 1, 0, 4, 64, tags=("empty",)),
        _rope("rope-no-batch", 0, 5, 4, 64, tags=("empty",)),
        *(_rope(f"rope-head-{head_dim}", 1, 3, 2, head_dim, positions=picture) for head_dim in head_dims),
        *(_rope(f"rope-head-{d}", 1, 3, 2, d, positions=picture, tags=("ragged",)) for d in ragged),
        *(_rope(f"rope-heads-{heads}", 1, 2, heads, 64, positions=picture) for heads in (1, 7, 8, 9, 17, 32)),
        _rope("rope-picture-batch", 3, 9, 4, 64, positions=picture),
        _rope("rope-prefill", 1, 37, 4, 128, tags=("prefill",)),
        _rope("rope-32k", 1, 4, 2, 128, positions=from_position(32768), tags=("long",)),
        _rope("rope-256k-anywhere", 2, 5, 2, 128, positions=anywhere, tags=("long",)),
        _rope("rope-extreme-positions", 2, 8, 2, 64, positions=extremes, tags=("long",)),
        _rope("rope-theta-10000", 1, 5, 2, 64, positions=anywhere, theta=1e4),
        _rope("rope-text-only", 1, 5, 2, 64, section=[32, 0, 0], positions=anywhere),
        _rope("rope-section-without-time", 1, 5, 2, 64, section=[0, 16, 16], positions=anywhere),
        _rope("rope-section-height-only", 1, 5, 2, 64, section=[0, 32, 0], positions=anywhere),
        _rope("rope-section-uneven", 1, 5, 2, 64, section=[20, 3, 9], positions=anywhere),
        _rope("rope-epsilon-large", 1, 5, 2, 64, epsilon=0.25),
        _rope("rope-half", 1, 5, 4, 128, dtype="float16", positions=picture),
        _rope("rope-half-256", 1, 3, 2, 256, dtype="float16", positions=picture),
        _rope("rope-half-72", 1, 3, 17, 72, dtype="float16", tags=("ragged",)),  # pairs a multiple of 4, not of 8
        _rope("rope-half-96-long", 1, 3, 3, 96, dtype="float16", positions=anywhere, tags=("long",)),
        _rope("rope-half-decode", 1, 1, 32, 128, dtype="float16", positions=from_position(77), tags=("decode",)),
    ]


CASES = (*_norm_cases(), *_rope_cases())


def _refused(name: str, text: str, attributes: dict[str, Any], tensors: dict[str, Array]) -> Refused:
    return Refused(name, attributes, tensors, text)


def _refused_norms() -> list[Refused]:
    norm = {"mode": "norm"}
    with_residual = norm | {"has_residual": 1}
    tensors = norm_inputs((2, 3), 16, residual=True)(np.random.default_rng(0))
    plain = {name: tensors[name] for name in ("x", "weight")}
    zeros = np.zeros((2, 3, 16), np.float16)
    return [
        _refused("unknown-mode", 'mode is "nrom"', {"mode": "nrom"}, {}),
        _refused("negative-epsilon", "must not be negative", norm | {"epsilon": -1e-6}, {}),
        _refused("residual-2", "has_residual is 2", norm | {"has_residual": 2}, {}),
        _refused("norm-with-heads", "num_heads is 4", norm | {"num_heads": 4}, {}),
        _refused("norm-with-section", "turns nothing", norm | {"mrope_section": [2, 3, 3]}, {}),
        _refused("weight-too-short", "so it is [16]", norm, plain | {"weight": np.ones(15, np.float32)}),
        _refused("weight-of-rank-2", "so it is [16]", norm, plain | {"weight": np.ones((1, 16), np.float32)}),
        _refused("half-weight", "weight is float16", norm, plain | {"weight": np.ones(16, np.float16)}),
        _refused("scalar", "is a scalar", norm, plain | {"x": np.zeros((), np.float32)}),
        _refused("width-0", "its last axis is 1 to", norm, plain | {"x": np.zeros((2, 0), np.float32)}),
        _refused("no-residual", "these attributes need 3", with_residual, plain),
        _refused("residual-of-other-type", "must be the same", with_residual, tensors | {"residual": zeros}),
        _refused(
            "residual-of-other-shape", "must be the same", with_residual, tensors | {"residual": tensors["x"][:1]}
        ),
    ]


def _refused_ropes() -> list[Refused]:
    rope = {"mode": "norm_rope", "num_heads": 2, "mrope_section": [4, 2, 2]}
    good = rope_inputs(2, 3, 2, 16)(np.random.default_rng(0))
    ids = good["position_ids"]
    wide = rope_inputs(1, 1, 1, 258)(np.random.default_rng(0))
    return [
        _refused("rope-with-residual", "has no residual", rope | {"has_residual": 1}, {}),
        _refused("rope-without-heads", "num_heads is 0", rope | {"num_heads": 0}, {}),
        _refused("rope-without-section", "mrope_section has 0 entries", rope | {"mrope_section": []}, {}),
        _refused("negative-section", "has the entry -2", rope | {"mrope_section": [12, -2, -2]}, {}),
        _refused("section-of-other-sum", "mrope_section sums to 9", rope | {"mrope_section": [5, 2, 2]}, good),
        _refused("columns-no-multiple", "not a multiple of num_heads", rope | {"num_heads": 3}, good),
        _refused("odd-head", "head_dim is 15", rope, good | {"x": np.zeros((2, 3, 30), np.float32)}),
        _refused("head-too-wide", "head_dim is 258", rope | {"num_heads": 1, "mrope_section": [65, 32, 32]}, wide),
        _refused("x-of-rank-2", "[B, S, num_heads * head_dim]", rope, good | {"x": good["x"][0]}),
        _refused("two-position-rows", "so it is [3, 2, 3]", rope, good | {"position_ids": ids[:2]}),
        _refused("positions-of-other-length", "so it is [3, 2, 3]", rope, good | {"position_ids": ids[:, :, :2]}),
        _refused("float-positions", "position_ids is float32", rope, good | {"position_ids": ids.astype(np.float32)}),
        _refused("short-frequencies", "half the head_dim", rope, good | {"inv_freq": good["inv_freq"][:7]}),
    ]


REFUSED = (*_refused_norms(), *_refused_ropes())
