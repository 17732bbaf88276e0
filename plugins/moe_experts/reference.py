"""MoEExperts in numpy, expert by expert; float64, except where the definition rounds to float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.plugins.common.case import Array
from deepstitch.plugins.moe_experts.schema import ACTIVATIONS, activation_of
from deepstitch.plugins.quantized_linear.reference import product

__all__ = ["activate", "reference", "select_experts"]

Doubles = npt.NDArray[np.float64]


def select_experts(logits: Array, top_k: int, normalize: bool) -> tuple[Doubles, npt.NDArray[np.int64]]:
    """Weights and numbers of each token's experts.

    Args:
        logits: ``[n, E]``; the lower number wins between equal ones.
        top_k: experts of a token.
        normalize: let the weights of a token sum to one.

    Returns:
        ``[n, top_k]`` each.
    """
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k].astype(np.int64)
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    return (weights / weights.sum(axis=-1, keepdims=True) if normalize else weights), chosen


def activate(projected: Doubles, kind: int, intermediate: int) -> Doubles:
    """Between the two projections: ``[n, I]`` from the gate rows, then the up rows, of ``projected [n, G*I]``."""
    gate, up = projected[:, :intermediate], projected[:, intermediate:]
    name = ACTIVATIONS[kind]
    if name == "ReLU2":
        return np.maximum(gate, 0) ** 2
    if name == "GeGLU":
        return gate * (1 + np.vectorize(math.erf, otypes=[np.float64])(gate / math.sqrt(2))) / 2 * up
    with np.errstate(over="ignore"):  # 1 / (1 + inf) is the 0 that is meant
        silu = gate / (1 + np.exp(-gate))
    return silu * up if name == "SwiGLU" else silu


def reference(attributes: Mapping[str, Any], inputs: dict[str, Array]) -> dict[str, Array]:
    """``y`` of MoEExperts.

    Args:
        attributes: resolved, see ``schema.py``.
        inputs: by name, see ``schema.py``.

    Returns:
        ``y [..., H]`` float32.
    """
    x = inputs["x"]
    y = np.zeros((math.prod(x.shape[:-1]), x.shape[-1]))
    if x.size == 0:
        return {"y": y.reshape(x.shape).astype(np.float32)}
    tokens = x.reshape(y.shape)
    logits = inputs["router_logits"].reshape(len(tokens), -1)
    weights, chosen = select_experts(logits, attributes["top_k"], bool(attributes["norm_topk_prob"]))
    kinds = activation_of(attributes)

    def linear(rows: Array, matrix: str, expert: int) -> Array:
        scales = inputs.get(f"{matrix}_scales")
        here = None if scales is None else scales[expert]
        return product(rows, inputs[matrix][expert], here, attributes).astype(np.float32)

    for expert in np.unique(chosen):
        token, rank = np.nonzero(chosen == expert)
        projected = linear(tokens[token], "gate_up", expert).astype(np.float64)
        activated = activate(projected, kinds[expert], attributes["intermediate_size"]).astype(np.float32)
        y[token] += weights[token, rank, None] * linear(activated, "down", expert)
    return {"y": y.reshape(x.shape).astype(np.float32)}
