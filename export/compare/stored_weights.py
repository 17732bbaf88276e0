"""Are a bundle's integers the checkpoint's weights? Each parameter by itself, before anything runs."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np

from deepstitch.blockwise import WeightFormat
from deepstitch.export.compare.metrics import StageResult
from deepstitch.export.compare.stages import Floats
from deepstitch.export.compare.tolerance import Limit
from deepstitch.export.quantize.as_stored import stored_parameters
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.bundle import Bundle

__all__ = ["compare_stored_weights"]

_CASE, _STAGE = "stored weights", "weights"
# Rounding to nearest misses normally distributed weights by 9 % at 4 bits and by 0.5 % at 8; GPTQ strays further where
# inputs are correlated. Rows in a wrong order miss by 141 %.
_LIMITS = MappingProxyType({4: 0.5, 8: 0.1})


def compare_stored_weights(bundle: Bundle, checkpoint: Path, expert_layout: str | None) -> list[StageResult]:
    """One result per bit width: the parameter whose values moved furthest; none for a bundle without integers.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    quantization = bundle.manifest.quantization
    if quantization is None:
        return []
    sources = Checkpoint.open(checkpoint).sources(expert_layout=expert_layout)
    worst: dict[int, StageResult] = {}
    for name, values in stored_parameters(bundle):
        bits = WeightFormat.parse(quantization.formats[name]).bits
        found = _compare(name, values, sources[name].read_float32().reshape(values.shape), _LIMITS[bits])
        if bits not in worst or found.max_rel > worst[bits].max_rel:
            worst[bits] = found
    return [worst[bits] for bits in sorted(worst)]


def _compare(name: str, actual: Floats, expected: Floats, limit: float) -> StageResult:
    """``max_rel`` is ``|actual - expected| / |expected|``, of all values together."""
    power, mine = float(np.vdot(expected, expected)), float(np.vdot(actual, actual))
    missed = actual - expected
    relative = float(np.sqrt(np.vdot(missed, missed) / max(power, 1e-30)))
    passed = bool(relative <= limit)
    return StageResult(
        case=_CASE,
        stage=_STAGE,
        rows=len(actual),
        max_abs=float(np.abs(missed).max(initial=0)),
        max_rel=relative,
        absmax=float(np.abs(expected).max(initial=0)),
        cosine=float(np.vdot(actual, expected)) / max((power * mine) ** 0.5, 1e-30),
        limit=Limit(value=limit, relative=True),
        passed=passed,
        note="" if passed else f"'{name}' is not what the checkpoint holds: it moved by {relative:.0%}",
    )
