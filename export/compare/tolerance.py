"""How far a bundle may be from its reference, by what its weights are stored as and how they are multiplied."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deepstitch.errors import InputError, did_you_mean
from deepstitch.export.compare.stages import LOGIT_STAGES
from deepstitch.export.kv_functions import kind_of_graph
from deepstitch.manifest import Manifest
from deepstitch.runtime.bundle import DECODER

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
    def for_bundles(cls, *manifests: Manifest) -> Tolerance:
        """The default for bundles that are compared with each other or with PyTorch: the loosest of what they hold."""
        return cls.for_kinds(*(kind for manifest in manifests for kind in _kinds(manifest)))

    @classmethod
    def for_kinds(cls, *kinds: str) -> Tolerance:
        """The loosest of ``fp32``, ``checkpoint`` (both exact), ``fp16`` and ``integer arithmetic``."""
        return max((_DEFAULTS[kind] for kind in kinds), key=lambda tolerance: tolerance.stages)

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
_HALF = Tolerance(logits=5e-3, logits_relative=True, stages=5e-3, outliers=0.05, agreement=0.98)
# Inputs of a layer rounded to 8 bits per block are wrong by up to 0.4 % each. Where that sends a token to another
# expert, its row is another row, and so are those that attend to it.
_INTEGER_ARITHMETIC = Tolerance(logits=5e-2, logits_relative=True, stages=3e-2, outliers=0.4, agreement=0.85)
_DEFAULTS = {
    "fp32": _EXACT,
    "checkpoint": _EXACT,
    "fp16": _HALF,
    "integer arithmetic": _INTEGER_ARITHMETIC,
    "rounded cache": _HALF,  # the reference rounds keys and values too, but not every one to the same side
}


def _kinds(manifest: Manifest) -> set[str]:
    """What decides how far a bundle may be from the model with its stored weights."""
    stored = {manifest.weights, manifest.vision_weights or manifest.weights}
    if kind_of_graph(manifest.graphs[DECODER]).name != "fp32":
        stored.add("rounded cache")
    integers = stored - _DEFAULTS.keys()
    if not integers:
        return stored
    # dequantized and multiplied in float32, stored integers are as exact as stored floats
    arithmetic = "fp32" if manifest.target in ("portable", "ort-cuda") else "integer arithmetic"
    return (stored & _DEFAULTS.keys()) | {arithmetic}
