"""RMSNormRope in numpy: float64, except where the definition rounds to float32 (the angles) or to the stored type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.plugins.common.case import Array

__all__ = ["angles", "pair_axes", "reference"]

Doubles = npt.NDArray[np.float64]


def pair_axes(section: tuple[int, ...] | list[int], pairs: int) -> npt.NDArray[np.int64]:
    """``[pairs]``: 0, 1 or 2 where time, height or width turns the pair."""
    axes = np.zeros(pairs, np.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def angles(section: tuple[int, ...] | list[int], position_ids: Array, inv_freq: Array) -> npt.NDArray[np.float32]:
    """``[B, S, pairs]``: position times frequency, rounded to float32, as the models were trained with."""
    axes = pair_axes(section, inv_freq.size)
    positions = np.moveaxis(position_ids[axes], 0, -1)
    return positions.astype(np.float32) * inv_freq.astype(np.float32)


def _normed(x: Array, weight: Array, epsilon: float) -> Doubles:
    values = x.astype(np.float64)
    mean = np.mean(values * values, axis=-1, keepdims=True)
    return values / np.sqrt(mean + np.float32(epsilon)) * weight.astype(np.float64)


def reference(attributes: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """``y``, and ``sum`` if there is a residual.

    Args:
        attributes: resolved, see ``schema.py``.
        inputs: by name, see ``schema.py``.

    Returns:
        Outputs by name, with the dtype of ``x``.
    """
    x, weight = inputs["x"], inputs["weight"]
    if attributes["mode"] == "norm":
        outputs = {}
        if attributes["has_residual"]:
            exact = x.astype(np.float32) + inputs["residual"].astype(np.float32)
            outputs["sum"] = x = exact.astype(x.dtype)
        return {"y": _normed(x, weight, attributes["epsilon"]).astype(x.dtype), **outputs}

    heads = x.reshape(*x.shape[:2], attributes["num_heads"], weight.size)
    low, high = np.split(_normed(heads, weight, attributes["epsilon"]), 2, axis=-1)
    turns = angles(attributes["mrope_section"], inputs["position_ids"], inputs["inv_freq"])
    exact_turns = turns.astype(np.float64)[:, :, None, :]
    cos, sin = np.cos(exact_turns), np.sin(exact_turns)
    turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return {"y": turned.reshape(x.shape).astype(x.dtype)}
