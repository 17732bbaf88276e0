"""The distance between two arrays of one stage, and the verdict on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepstitch.export.compare.stages import LOGIT_STAGES, Floats
from deepstitch.export.compare.tolerance import Limit, Tolerance

__all__ = ["StageResult", "compare_stage"]

Doubles = npt.NDArray[np.float64]
_BLOCK = 64  # rows at a time: logits of a real vocabulary are wide


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One stage of one case.

    Attributes:
        rows: rows compared: tokens, or visual tokens.
        max_abs: largest absolute error; infinite where shapes differ or a value is not finite.
        max_rel: ``max_abs`` divided by ``absmax``.
        absmax: largest magnitude of the reference.
        cosine: of the two arrays as vectors.
        argmax_agreement: fraction of rows with the reference's most likely token; logits only.
        rows_over: rows with an error over the limit.
        disagreements: rows with another most likely token, near ties left out; logits only.
        near_tie_disagreements: rows with another most likely token where the reference has no clear winner.
        note: what else went wrong.
    """

    case: str
    stage: str
    rows: int
    max_abs: float
    max_rel: float
    absmax: float
    cosine: float
    limit: Limit
    passed: bool
    rows_over: int = 0
    argmax_agreement: float | None = None
    disagreements: int = 0
    near_tie_disagreements: int = 0
    note: str = ""

    @property
    def error(self) -> float:
        """The error in the unit of the limit."""
        return self.max_rel if self.limit.relative else self.max_abs


def compare_stage(case: str, stage: str, actual: Floats | None, expected: Floats, tolerance: Tolerance) -> StageResult:
    """Measure one stage.

    Args:
        case: name of the case.
        stage: name of the stage.
        actual: ``(n, width)`` of the bundle; None where it produced none.
        expected: ``(n, width)`` of the reference.
        tolerance: the limits.
    """
    limit = tolerance.limit(stage)
    if actual is None or actual.shape != expected.shape:
        found = "nothing" if actual is None else list(actual.shape)
        return _failed(case, stage, expected, limit, f"shape {found} instead of {list(expected.shape)}")
    absmax = float(np.abs(expected).max(initial=0))
    sums = _Sums(limit.absolute(absmax))
    for start in range(0, len(expected), _BLOCK):
        block = slice(start, start + _BLOCK)
        sums.add(actual[block].astype(np.float64), expected[block].astype(np.float64))
    if not math.isfinite(sums.max_abs):
        return _failed(case, stage, expected, limit, "values that are not finite")
    logits = stage in LOGIT_STAGES
    rows = len(expected)
    within = sums.rows_over <= (math.ceil(tolerance.outliers * rows) if logits else 0)
    agrees = not logits or sums.disagreements <= math.ceil((1 - tolerance.agreement) * rows)
    return StageResult(
        case=case,
        stage=stage,
        rows=rows,
        max_abs=sums.max_abs,
        max_rel=sums.max_abs / absmax if absmax else (math.inf if sums.max_abs else 0.0),
        absmax=absmax,
        cosine=sums.cosine,
        limit=limit,
        passed=within and agrees,
        rows_over=sums.rows_over,
        argmax_agreement=1 - (sums.disagreements + sums.tied) / rows if logits else None,
        disagreements=sums.disagreements if logits else 0,
        near_tie_disagreements=sums.tied if logits else 0,
    )


def _failed(case: str, stage: str, expected: Floats, limit: Limit, note: str) -> StageResult:
    logits = stage in LOGIT_STAGES
    return StageResult(
        case=case,
        stage=stage,
        rows=len(expected),
        max_abs=math.inf,
        max_rel=math.inf,
        absmax=float(np.abs(expected).max(initial=0)),
        cosine=0.0,
        limit=limit,
        passed=False,
        rows_over=len(expected),
        argmax_agreement=0.0 if logits else None,
        disagreements=len(expected) if logits else 0,
        note=note,
    )


class _Sums:
    """What has to be known of all rows, gathered block by block."""

    def __init__(self, limit: float) -> None:
        self.max_abs = 0.0
        self.rows_over = self.disagreements = self.tied = 0
        self._limit = limit
        self._dot = self._actual = self._expected = 0.0

    def add(self, actual: Doubles, expected: Doubles) -> None:
        errors = np.abs(actual - expected).max(axis=-1)
        self.max_abs = float(np.maximum(self.max_abs, errors.max()))  # unlike max(), it keeps a NaN
        self.rows_over += int((errors > self._limit).sum())
        self._dot += float(np.vdot(actual, expected))
        self._actual += float(np.vdot(actual, actual))
        self._expected += float(np.vdot(expected, expected))
        differs = actual.argmax(-1) != expected.argmax(-1)
        best = np.partition(expected, -2, axis=-1)[:, -2:]
        close = best[:, -1] - best[:, 0] < self._limit
        self.tied += int((differs & close).sum())
        self.disagreements += int((differs & ~close).sum())

    @property
    def cosine(self) -> float:
        """1 where both are all zeros."""
        if self._actual == 0 and self._expected == 0:
            return 1.0
        return self._dot / math.sqrt(self._actual * self._expected) if self._actual and self._expected else 0.0
