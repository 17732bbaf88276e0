"""How far a bundle may be from its reference, per dtype of the stored weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deepstitch.errors import InputError, UnsupportedError, did_you_mean
from deepstitch.export.compare.stages import LOGIT_STAGES

__all__ = ["Limit", "Tolerance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Largest error allowed in one stage.

    Attributes:
        relative: ``value`` is a fraction of the reference's largest magnitude in that stage.
    """

    value: float
    relative: bool

    def absolute(self, absmax: float) -> float:
        """The limit in the unit of the values, for a reference whose largest magnitude is ``absmax``."""
        return self.value * absmax if self.relative else self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """All limits.

    Attributes:
        logits: error of prefill and decode logits, absolute, or relative where ``logits_relative``.
        stages: error of every other stage, relative to the stage's largest magnitude.
        outliers: fraction of logit rows that may be over the limit. Not 0 where weights are rounded: a token
            that two experts want almost equally may then go to the other one, which has no small bound.
        agreement: fraction of logit rows whose most likely token must be the reference's. Rows whose two best
            reference logits are closer than the limit have no clear winner; they are counted by themselves.
    """

    logits: float
    logits_relative: bool
    stages: float
    outliers: float
    agreement: float

    @classmethod
    def for_weights(cls, *weights: str) -> Tolerance:
        """The default for stored weights, the loosest of several: ``fp32``, ``fp16``, ``checkpoint`` (exact).

        Raises:
            UnsupportedError: no tolerance was settled for such weights.
        """
        for each in weights:
            if each not in _DEFAULTS:
                raise UnsupportedError(
                    f"weights '{each}' have no tolerance yet; state --tolerance logits=… and stages=…"
                )
        return max((_DEFAULTS[each] for each in weights), key=lambda tolerance: tolerance.stages)

    def replace(self, settings: Iterable[str]) -> Tolerance:
        """Change entries as the command line spells them, ``NAME=VALUE``.

        Raises:
            InputError: an unknown name, or not a number of that range.
        """
        values: dict[str, Any] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in _SETTABLE:
                hint = did_you_mean(name, _SETTABLE)
                raise InputError(
                    f"--tolerance {setting}: '{name}' is none of {', '.join(_SETTABLE)}{hint}; use NAME=VALUE"
                )
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not (value >= 0 and (name not in _FRACTIONS or value <= 1)):
                allowed = "a number from 0 to 1" if name in _FRACTIONS else "a number of 0 or more"
                example = f"{name}={getattr(_EXACT, name)}"
                raise InputError(f"--tolerance {setting}: must be {allowed}, for example {example}")
            values[name] = value
        return dataclasses.replace(self, **values)

    def limit(self, stage: str) -> Limit:
        """The limit of one stage."""
        if stage in LOGIT_STAGES:
            return Limit(value=self.logits, relative=self.logits_relative)
        return Limit(value=self.stages, relative=True)


_SETTABLE = ("logits", "stages", "outliers", "agreement")
_FRACTIONS = ("outliers", "agreement")
_EXACT = Tolerance(logits=1e-4, logits_relative=False, stages=1e-4, outliers=0.0, agreement=1.0)
_DEFAULTS = {
    "fp32": _EXACT,
    "checkpoint": _EXACT,
    "fp16": Tolerance(logits=5e-3, logits_relative=True, stages=5e-3, outliers=0.05, agreement=0.98),
}
