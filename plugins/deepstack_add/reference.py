"""DeepStackAdd in numpy, token by token as the README says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array

__all__ = ["reference"]


def reference(attributes: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Add to each token the slice of its row; index 0 and an index that is no row add nothing.

    Args:
        attributes: ``layer``.
        inputs: ``hidden_states [..., H]``, ``deepstack_embeds [rows, taps*H]``, ``deepstack_index [...]``.

    Returns:
        ``output``, with the shape and dtype of the hidden states.
    """
    hidden, embeds = inputs["hidden_states"], inputs["deepstack_embeds"]
    width = hidden.shape[-1]
    begin = attributes["layer"] * width
    output = hidden.astype(np.float32)  # a copy
    for token, row in np.ndenumerate(inputs["deepstack_index"]):
        if 0 < row < embeds.shape[0]:
            output[token] += embeds[row, begin : begin + width].astype(np.float32)
    return {"output": output.astype(hidden.dtype)}
