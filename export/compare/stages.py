"""What is compared: the arrays that appear on the way from pixels to logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["DECODE", "EMBEDDINGS", "LOGIT_STAGES", "PREFILL", "VISION", "Stages", "gather", "vision_stages"]

VISION = "vision"
EMBEDDINGS = "embeddings"
PREFILL = "logits"
DECODE = "decode"
LOGIT_STAGES = (PREFILL, DECODE)

Floats = npt.NDArray[np.float32]
Stages = dict[str, Floats]
"""Stage name to ``(n, width)``: ``vision`` and ``deepstack.0`` … over visual tokens, ``embeddings`` (with the
visual rows merged in) and ``logits`` over prompt tokens, ``decode`` over the tokens fed afterwards; rows of a
batch one after the other."""


def vision_stages(image_embeds: Floats, deepstack_embeds: Floats) -> Stages:
    """Split the outputs of a vision encoder: ``(T, H)`` and ``(T, taps*H)``."""
    width = image_embeds.shape[-1]
    taps = deepstack_embeds.shape[-1] // width
    slices = np.split(deepstack_embeds, taps, axis=1) if taps else []
    return {
        VISION: image_embeds,
        **{f"deepstack.{tap}": np.ascontiguousarray(part) for tap, part in enumerate(slices)},
    }


def gather(embeddings: Sequence[Floats], prefill: Sequence[Floats], decode: Sequence[Floats]) -> Stages:
    """Join the language stages of all rows; ``decode`` may be empty."""
    stages = {EMBEDDINGS: np.concatenate(embeddings), PREFILL: np.concatenate(prefill)}
    joined = np.concatenate(decode) if decode else np.zeros((0, 0), np.float32)
    return stages | ({DECODE: joined} if len(joined) else {})
