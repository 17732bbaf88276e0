"""How far a bundle may be from its reference, per dtype of the stored weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from deepstitch.errors import InputError, UnsupportedError, did_you_mean
from deepstitch.export.compare.stages import LOGIT_STAGES

__all__ = ["Limit", "Tolerance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Largest error allowed in one stage.

    Attributes:
        relative: ``value`` is a fraction of the reference's largest magnitude in that stage, not an absolute error.
    """

    value: float
    relative: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """All limits.

    Attributes:
        logits: absolute error of prefill and decode logits; relative where ``logits_relative``.
        stages: error of every other stage, relative to the stage's largest magnitude.
        agreement: fraction of positions whose most likely token must be the reference's.
        tie_gap: a position whose two best reference logits are closer than this has no clear winner: a disagreement there is
            counted and reported, but does not fail the comparison.
    """

    logits: float
    logits_relative: bool
    stages: float
    agreement: float
    tie_gap: float

    @classmethod
    def for_weights(cls, *weights: str) -> Tolerance:
        """The default for stored weights: ``fp32``, ``fp16``, or ``checkpoint`` (by reference, so exact); the loosest.

        Raises:
            UnsupportedError: no tolerance was settled for such weights.
        """
        for each in weights:
            if each not in _DEFAULTS:
                raise UnsupportedError(f"weights '{each}' have no tolerance yet; state --tolerance logits=… and stages=…")
        return max((_DEFAULTS[each] for each in weights), key=lambda tolerance: tolerance.stages)

    def replace(self, settings: Iterable[str]) -> Tolerance:
        """Change entries as the command line spells them, ``NAME=VALUE``.

        Raises:
            InputError: an unknown name, or not a number of that range.
        """
        values: dict[str, float] = {}
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in _SETTABLE:
                hint = did_you_mean(name, _SETTABLE)
                raise InputError(f"--tolerance {setting}: '{name}' is none of {', '.join(_SETTABLE)}{hint}; use NAME=VALUE")
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not (value >= 0 and (name != "agreement" or value <= 1)):
                allowed = "a number from 0 to 1" if name == "agreement" else "a number of 0 or more"
                raise InputError(f"--tolerance {setting}: must be {allowed}, for example {name}={_DEFAULTS['fp32'].entry(name)}")
            values[name] = value
        return dataclasses.replace(self, **values)

    def entry(self, name: str) -> float:
        """The value of a settable entry."""
        return float(getattr(self, name))

    def limit(self, stage: str) -> Limit:
        """The limit of one stage."""
        if stage in LOGIT_STAGES:
            return Limit(value=self.logits, relative=self.logits_relative)
        return Limit(value=self.stages, relative=True)


_SETTABLE = ("logits", "stages", "agreement")
_EXACT = Tolerance(logits=1e-4, logits_relative=False, stages=1e-4, agreement=1.0, tie_gap=1e-4)
_DEFAULTS = {
    "fp32": _EXACT,
    "checkpoint": _EXACT,
    "fp16": Tolerance(logits=2e-2, logits_relative=True, stages=5e-3, agreement=0.98, tie_gap=0.0),
}
