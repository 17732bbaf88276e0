"""KVCacheAppend in numpy, token by token as the README says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array

__all__ = ["reference"]


def reference(attributes: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Copy the cache and write the valid new tokens behind what it holds.

    Args:
        attributes: ``kv_format``.
        inputs: ``past_key``, ``past_value`` ``[B, kv heads, C, D]``, with kv_format int8 their scales
            ``[B, kv heads, C]``; ``key``, ``value`` ``[B, S, kv heads*D]``; ``past_lengths`` and
            ``query_lengths`` ``[B]``.

    Returns:
        ``present_key``, ``present_value`` and for int8 their scales, with the shapes and dtypes of the past ones.
    """
    present = {name.replace("past", "present"): past.copy() for name, past in inputs.items() if _is_cache(name)}
    batch, heads, capacity, width = inputs["past_key"].shape
    tokens = inputs["key"].shape[1]
    for row in range(batch):
        first, count = int(inputs["past_lengths"][row]), min(int(inputs["query_lengths"][row]), tokens)
        for token in range(count):
            if not 0 <= first + token < capacity:
                continue
            for part in ("key", "value"):
                vectors = inputs[part][row, token].reshape(heads, width)
                if attributes["kv_format"] == "int8":
                    vectors, scales = _quantized(vectors)
                    present[f"present_{part}_scales"][row, :, first + token] = scales
                present[f"present_{part}"][row, :, first + token] = vectors
    return present


def _is_cache(name: str) -> bool:
    return name.startswith(("past_key", "past_value"))


def _quantized(vectors: Array) -> tuple[Array, Array]:
    """int8 and one scale for each head: ``[heads, D]`` to ``[heads, D]`` and ``[heads]``."""
    scales = np.abs(vectors).max(axis=-1) / np.float32(127)
    steps = vectors / np.where(scales == 0, np.float32(1), scales)[:, None]
    return np.where(scales[:, None] == 0, 0, np.clip(np.rint(steps), -127, 127)).astype(np.int8), scales
