"""How far logits are from a reference's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["divergence"]


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(reference: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> dict[str, float]:
    """Compare ``(n, vocab)`` logits.

    Returns:
        ``kl``: mean KL divergence from the reference in nats; ``kl_max``; ``top1``: share of positions where both
        choose the same token; ``max_abs``: largest difference of a logit.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != logits.shape:
        raise ValueError(f"logits {logits.shape}, reference {reference.shape}")
    ours, theirs = _log_softmax(logits), _log_softmax(reference)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    return {
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": float((reference.argmax(axis=-1) == logits.argmax(axis=-1)).mean()),
        "max_abs": float(np.abs(reference - logits).max()),
    }
