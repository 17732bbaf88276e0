"""QuantizedLinear in numpy: exact integer sums, everything else in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.plugins.common.case import Array
from deepstitch.plugins.common.numerics import quantize_activations, unpack_weights

__all__ = ["product", "reference"]


def product(x: Array, weight: Array, scales: Array | None, attributes: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Rows times a stored matrix.

    Args:
        x: ``[n, K]`` float32.
        weight: ``[N, K]`` float, or the words of ``[N, K]`` integers.
        scales: ``[N, K / block_size]``; None for float formats.
        attributes: ``weight_format`` and ``block_size`` are looked at.

    Returns:
        ``[n, N]``.
    """
    if scales is None:
        return x.astype(np.float64) @ weight.astype(np.float64).T
    block = attributes["block_size"]
    rows, steps = quantize_activations(x, block)
    columns = unpack_weights(weight, attributes["weight_format"])
    result = np.zeros((len(rows), len(columns)))
    for index in range(scales.shape[-1]):
        here = slice(index * block, (index + 1) * block)
        # a sum of at most 128 products of two bytes: float64 holds it without error
        sums = rows[:, here].astype(np.float64) @ columns[:, here].astype(np.float64).T
        result += sums * steps[:, index, None].astype(np.float64) * scales[:, index].astype(np.float64)
    return result


def reference(attributes: Mapping[str, Any], inputs: dict[str, Array]) -> dict[str, Array]:
    """``y`` of QuantizedLinear.

    Args:
        attributes: resolved, see ``schema.py``.
        inputs: by name, see ``schema.py``.

    Returns:
        ``y [..., N]`` float32.
    """
    x = inputs["x"]
    shape = (*x.shape[:-1], attributes["out_features"])
    if x.size == 0:
        return {"y": np.zeros(shape, np.float32)}
    y = product(x.reshape(-1, x.shape[-1]), inputs["weight"], inputs.get("scales"), attributes).reshape(shape)
    if attributes["has_bias"]:
        y = y + inputs["bias"]
    if attributes["has_residual"]:
        y = y + inputs["residual"]
    return {"y": y.astype(np.float32)}
