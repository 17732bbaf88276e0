"""One table of cases per operator, read by the CPU tests, the GPU tests and the benchmarks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Case", "Refused", "nmse"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call of an operator.

    Attributes:
        name: unique in its table.
        attributes: as a node would give them; defaults may be left out.
        inputs: makes the tensors, by input name, in the order of the schema.
        nmse: largest allowed sum of squared differences over the reference's sum of squares, per output.
        max_abs: largest allowed absolute difference; None: not looked at.
        tags: for selecting cases, for example "decode" or "long".
    """

    name: str
    attributes: Mapping[str, Any]
    inputs: Callable[[np.random.Generator], dict[str, Array]]
    nmse: float
    max_abs: float | None = None
    tags: tuple[str, ...] = ()

    def make(self, seed: int = 0) -> dict[str, Array]:
        """The inputs: the same for the same name and seed, on every machine."""
        return self.inputs(np.random.default_rng([seed, zlib.crc32(self.name.encode())]))


class Refused(NamedTuple):
    """One call that must be refused before anything is launched.

    Attributes:
        name: unique in its table.
        attributes: of the call.
        inputs: of the call; may be empty where the attributes alone are refused.
        text: part of the message.
    """

    name: str
    attributes: Mapping[str, Any]
    inputs: dict[str, Array]
    text: str


def nmse(value: Array, reference: Array) -> float:
    """Sum of squared differences over the reference's sum of squares; infinite where a value is not finite."""
    difference = value.astype(np.float64) - reference.astype(np.float64)
    error = float(np.sum(difference * difference))
    if not np.isfinite(error):
        return float("inf")
    power = float(np.sum(reference.astype(np.float64) ** 2))
    return error / power if power > 0 else (0.0 if error == 0 else float("inf"))
