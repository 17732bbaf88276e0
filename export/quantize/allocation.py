"""Bit widths under a byte budget: a multiple-choice knapsack, solved exactly.

Every group takes one of its formats; the sum of damages is least among all choices whose bytes fit. The mixed-integer
program goes to HiGHS (Huangfu & Hall 2018) through ``scipy.optimize.milp``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deepstitch.errors import InputError
from deepstitch.export.quantize.sensitivity import Sensitivity

__all__ = ["Allocation", "allocate", "frontier", "parse_budget"]

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB|bits?)", re.IGNORECASE)
Sizes = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A choice of bits.

    Attributes:
        bits: by group.
        nbytes: of all groups together.
        damage: sum of their damages.
    """

    bits: dict[str, int]
    nbytes: int
    damage: float


def parse_budget(text: str, sizes: Sizes, weights: int) -> int:
    """Bytes of ``"9GB"``, ``"700MB"`` or ``"5.5bits"`` (average per weight, scales included).

    Args:
        text: as on the command line.
        sizes: bytes of every group by bits.
        weights: number of weights of all groups.

    Raises:
        InputError: not a size, less than the smallest choice takes, or more than the largest.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise InputError(f"--budget {text}: use a size such as 9GB, 700MB or 5.5bits")
    number, unit = float(found[1]), found[2].upper()
    budget = int(number * weights / 8) if unit.startswith("BIT") else int(number * _UNITS[unit])
    least, most = (sum(pick(by_bits.values()) for by_bits in sizes.values()) for pick in (min, max))
    smallest, largest = (
        _as_budget(size, weights, round_to) for size, round_to in ((least, math.ceil), (most, math.floor))
    )
    if budget < least:
        raise InputError(
            f"--budget {text}: the smallest choice takes {smallest}, the largest {largest}; give a size between them, "
            "or a larger --block"
        )
    if budget > most:
        raise InputError(
            f"--budget {text}: everything at the most bits takes less; give at most {largest}, or export with "
            "--weights int8"
        )
    return budget


def _as_budget(nbytes: int, weights: int, round_to: Callable[[float], int]) -> str:
    """A size in words that can be given as a budget: rounded to the side that is possible."""
    megabytes, bits = round_to(nbytes / 1e4) / 100, round_to(800 * nbytes / weights) / 100
    return f"{megabytes:.2f}MB ({bits:.2f}bits per weight)"


def allocate(damages: Sensitivity, sizes: Sizes, budget: int) -> Allocation:
    """Choose the bits of every group.

    Args:
        damages: of every group by bits.
        sizes: bytes of every group by bits.
        budget: bytes; at least the smallest choice.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(group, bits) for group, by_bits in sizes.items() for bits in by_bits]
    cost = np.array([damages[group][bits] for group, bits in choices])
    nbytes = np.array([sizes[group][bits] for group, bits in choices], float)
    one_each = np.array([[float(group == each) for group, _ in choices] for each in sizes])
    scale = cost.max() or 1.0
    solved = milp(
        cost / scale,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(nbytes[None] / budget, ub=1.0)],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
    )
    assert solved.x is not None, solved.message  # parse_budget made sure of a solution
    taken = [choice for choice, share in zip(choices, solved.x, strict=True) if share > 0.5]
    return Allocation(
        bits=dict(taken),
        nbytes=sum(sizes[group][bits] for group, bits in taken),
        damage=sum(damages[group][bits] for group, bits in taken),
    )


def frontier(damages: Sensitivity, sizes: Sizes, points: int = 17) -> list[Allocation]:
    """The best choice for budgets from the smallest to the largest: damage against bytes."""
    least, most = (sum(pick(by_bits.values()) for by_bits in sizes.values()) for pick in (min, max))
    budgets = [least + (most - least) * point // (points - 1) for point in range(points)]
    return [allocate(damages, sizes, budget) for budget in budgets]
