"""The outcome of a comparison: as an object, as JSON, and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deepstitch.export.compare.metrics import StageResult
from deepstitch.export.compare.tolerance import Limit, Tolerance

__all__ = ["Comparison", "failure_lines", "format_limit", "summary_line", "table_lines", "verdict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything a comparison found.

    Attributes:
        bundle: folder compared.
        against: ``pytorch``, ``transformers``, ``portable`` or ``definitions``.
        results: one entry per case and stage, in the order they ran.
        skipped: why a case did not run, by its name.
        polygraphy: verdict of Polygraphy's comparator per case, where graphs were compared with graphs.
        seconds: of both sides together, loading included.
        engine: that ran the bundle; None: ONNX Runtime on the CPU, where plugins are their definitions.
    """

    bundle: str
    target: str
    weights: str
    against: str
    tolerance: Tolerance
    results: tuple[StageResult, ...]
    skipped: dict[str, str]
    polygraphy: dict[str, bool]
    seconds: float
    engine: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every stage of every case is within its limit."""
        return all(result.passed for result in self.results) and all(self.polygraphy.values())

    @property
    def cases(self) -> tuple[str, ...]:
        """Cases that ran."""
        return tuple(dict.fromkeys(result.case for result in self.results))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an error that could not be measured is null."""
        raw = {name: getattr(self, name) for name in ("bundle", "target", "weights", "engine", "against", "passed")}
        return {
            **raw,
            "tolerance": dataclasses.asdict(self.tolerance),
            "results": [
                {key: None if _unbounded(value) else value for key, value in dataclasses.asdict(result).items()}
                for result in self.results
            ],
            "skipped": self.skipped,
            "polygraphy": self.polygraphy,
            "seconds": round(self.seconds, 2),
        }


def _unbounded(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def format_limit(limit: Limit) -> str:
    """The limit as the report writes it."""
    return f"{limit.value:.0e} {'of max' if limit.relative else 'abs'}"


def verdict(result: StageResult) -> str:
    """``ok``, with the rows that are over the limit and were let pass, or ``FAILED``."""
    if not result.passed:
        return f"FAILED {result.note}".rstrip()
    return f"ok ({result.rows_over} rows over)" if result.rows_over else "ok"


def _argmax(result: StageResult) -> str:
    """``31/32 (1 near tie)``: rows that agree, and others without a clear winner."""
    if result.argmax_agreement is None:
        return ""
    agree = result.rows - result.disagreements - result.near_tie_disagreements
    ties = f" ({result.near_tie_disagreements} near tie)" if result.near_tie_disagreements else ""
    return f"{agree}/{result.rows}{ties}"


def table_lines(comparison: Comparison) -> Iterator[str]:
    """The whole report, for a screen."""
    yield f"{comparison.bundle} ({comparison.target}, {comparison.weights}) against {comparison.against}"
    if comparison.engine is not None:
        yield f"run by the engine {comparison.engine}"
    elif comparison.target.startswith("trt"):
        yield "in ONNX Runtime: every plugin is computed by the function that defines it"
    header = ("case", "stage", "max abs", "max rel", "cosine", "argmax", "limit", "")
    rows = [header]
    previous = ""
    for result in comparison.results:
        name = result.case if result.case != previous else ""
        previous = result.case
        errors = (f"{result.max_abs:.2e}", f"{result.max_rel:.2e}", f"{result.cosine:.7f}", _argmax(result))
        rows.append((name, result.stage, *errors, format_limit(result.limit), verdict(result)))
    yield from _aligned(rows)
    for name, reason in comparison.skipped.items():
        yield f"{name}: {reason}"
    if comparison.polygraphy:
        agreed = sum(comparison.polygraphy.values())
        yield f"Polygraphy's comparator passes {agreed} of {len(comparison.polygraphy)} cases"
    yield summary_line(comparison)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def summary_line(comparison: Comparison) -> str:
    """One line: the verdict, and the numbers most asked for."""
    logits = [result for result in comparison.results if result.argmax_agreement is not None]
    worst = max(logits, key=lambda result: result.error)
    rows, ties = sum(r.rows for r in logits), sum(r.near_tie_disagreements for r in logits)
    agree = rows - ties - sum(r.disagreements for r in logits)
    failed = len({result.case for result in comparison.results if not result.passed})
    outcome = f"{failed} of {len(comparison.cases)} cases FAILED" if failed else f"{len(comparison.cases)} cases passed"
    outcome = outcome if failed or comparison.passed else "Polygraphy's comparator FAILED"
    over = sum(r.rows_over for r in logits)
    let_pass = f", {over} positions over" if over else ""
    tied = f" ({ties} others are near ties)" if ties else ""
    return (
        f"{outcome} against {comparison.against} in {comparison.seconds:.1f} s: largest logits error "
        f"{worst.error:.1e} (limit {format_limit(worst.limit)}{let_pass}), "
        f"same most likely token at {agree} of {rows} positions{tied}"
    )


def failure_lines(comparison: Comparison) -> list[str]:
    """The first stage over its limit in every failed case: later stages only inherit its error."""
    first: dict[str, StageResult] = {}
    for result in comparison.results:
        if not result.passed:
            first.setdefault(result.case, result)
    lines = [f"case {case}, stage {result.stage}: {_reason(result)}" for case, result in first.items()]
    return lines + [
        f"case {case}: Polygraphy's comparator"
        for case, ok in comparison.polygraphy.items()
        if not ok and case not in first
    ]


def _reason(result: StageResult) -> str:
    if result.note:
        return result.note
    if result.rows_over:
        over = f"over at {result.rows_over} of {result.rows} rows"
        return f"error {result.error:.1e}, allowed {format_limit(result.limit)}, {over}"
    return f"another most likely token at {result.disagreements} of {result.rows} positions"
