"""Medians of what the rounds gave, and ratios between runtimes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.figures import FIGURES

__all__ = ["Sample", "ratios", "summary"]

OURS = "deepstitch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One value of one round.

    Attributes:
        value: in the figure's unit.
        other_load: share of the cores something else used meanwhile.
        extra: what came with the value.
    """

    value: float
    other_load: float
    extra: dict[str, Any]


def summary(samples: list[Sample], *, noise_limit: float) -> dict[str, Any]:
    """Median, minimum and maximum of the quiet samples, of all where none was quiet.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples")
    quiet = [sample for sample in samples if sample.other_load < noise_limit]
    chosen = quiet or samples
    values = [sample.value for sample in chosen]
    middle = min(chosen, key=lambda sample: abs(sample.value - statistics.median(values)))
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": len(chosen),
        "dropped": len(samples) - len(chosen),
        "noisy": not quiet,
        **{key: value for key, value in middle.extra.items() if key not in ("figure", "settings", "value")},
    }


def ratios(cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against the best of each other runtime in the same class of bits; above 1 is in favour of deepstitch.

    A runtime that only has wider weights is compared with each of our classes, except in ``quality``, where half the KL
    divergence is a ratio of two.

    Args:
        cases: with ``shape``, ``peer``, ``variant``, ``bits``, ``always`` and ``figures`` (name to :func:`summary`).
    """
    cases = list(cases)
    found = []
    for ours in (case for case in cases if case["peer"] == OURS):
        for peer in dict.fromkeys(case["peer"] for case in cases if case["peer"] != OURS):
            rivals = [
                case
                for case in cases
                if case["peer"] == peer
                and case["shape"] == ours["shape"]
                and (case["bits"] == ours["bits"] or case["always"])
            ]
            row = {"shape": ours["shape"], "variant": ours["variant"], "peer": peer, "figures": {}}
            for name, mine in ours["figures"].items():
                equal = [rival for rival in rivals if rival["bits"] == ours["bits"]]
                best = _best(name, equal if FIGURES[name].kind == "quality" else rivals)
                if best is not None and mine["median"] > 0 and best[1] > 0:
                    rival, value = best
                    ratio = mine["median"] / value if FIGURES[name].more_is_better else value / mine["median"]
                    row["figures"][name] = {"ratio": ratio, "against": rival}
            if row["figures"]:
                found.append(row)
    return found


def _best(name: str, rivals: list[dict[str, Any]]) -> tuple[str, float] | None:
    values = [(case["variant"], case["figures"][name]["median"]) for case in rivals if name in case["figures"]]
    if not values:
        return None
    choose = max if FIGURES[name].more_is_better else min
    return choose(values, key=lambda pair: pair[1])
