"""The short pre-run in which each runtime's settings compete, figure by figure; the rounds use the winners."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.figures import FIGURES, Figure
from benchmarks.peers.peers import Candidate, Variant, candidates

__all__ = ["Job", "Trial", "choose", "jobs"]

_FINALISTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One child process: how the model is opened, and what is run."""

    group: str
    open: dict[str, Any]
    runs: tuple[tuple[str, dict[str, Any]], ...]

    @property
    def parts(self) -> list[str]:
        """Parts of the model the child loads."""
        return ["text", "vision"] if self.group in ("image", "first_token", "load") else ["text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate and the value it reached."""

    candidate: Candidate
    value: float


Execute = Callable[[list[Job]], Iterable[tuple[str, Candidate, float]]]


def jobs(chosen: dict[str, Candidate]) -> list[Job]:
    """Processes for the chosen settings: one per group of figures and way to open the model."""
    return _grouped((FIGURES[name], candidate) for name, candidate in chosen.items())


def _grouped(wanted: Iterable[tuple[Figure, Candidate]]) -> list[Job]:
    found: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for figure, candidate in wanted:
        key = (figure.group, json.dumps(candidate.open, sort_keys=True))
        found.setdefault(key, []).append((figure.name, candidate.settings))
    return [Job(group=group, open=json.loads(opened), runs=tuple(runs)) for (group, opened), runs in found.items()]


def choose(
    peer: str, variant: Variant, figures: list[Figure], execute: Execute, *, quick: bool, experts: bool
) -> tuple[dict[str, Candidate], dict[str, list[Trial]]]:
    """Best settings per figure.

    Args:
        peer: the runtime.
        variant: of its weights.
        figures: to be measured later.
        execute: runs processes and yields ``(figure, candidate, value)`` for what succeeded.
        quick: fewer candidates.
        experts: whether the model is a mixture of experts.

    Returns:
        Settings per figure, and what was tried.
    """

    def options(figure: Figure) -> list[Candidate]:
        return candidates(peer, variant, figure.kind, quick=quick, experts=experts)

    trials: dict[str, list[Trial]] = {}

    def try_out(wanted: list[tuple[Figure, Candidate]]) -> None:
        for name, candidate, value in execute(_grouped(wanted)):
            trials.setdefault(name, []).append(Trial(candidate=candidate, value=value))

    probes = {figure.name: _probe(figure, peer, figures) for figure in figures if len(options(figure)) > 1}
    first = {name: FIGURES[name] for name in probes.values() if name != "decode_8192"}
    try_out([(figure, candidate) for figure in first.values() for candidate in options(figure)])
    if "decode_8192" in probes.values():
        figure = FIGURES["decode_8192"]
        near = ranked("decode_2048", trials)[:_FINALISTS] or options(figure)
        try_out([(figure, candidate) for candidate in near])
    chosen = {}
    for figure in figures:
        best = ranked(probes.get(figure.name, ""), trials)
        chosen[figure.name] = best[0] if best else options(figure)[0]
    return _put_together(peer, chosen, trials), trials


def ranked(name: str, trials: dict[str, list[Trial]]) -> list[Candidate]:
    """Candidates of a figure, the best first."""
    if name not in trials:
        return []
    order = sorted(trials[name], key=lambda trial: trial.value, reverse=FIGURES[name].more_is_better)
    return [trial.candidate for trial in order]


def _probe(figure: Figure, peer: str, figures: list[Figure]) -> str:
    """The figure that stands for ``figure`` while settings are chosen."""
    names = [each.name for each in figures if each.kind == figure.kind]
    if peer.startswith("transformers"):
        return names[0]
    if figure.kind == "prefill":
        return "prefill_512" if "prefill_512" in names else names[0]
    return names[0] if figure.kind == "image" else figure.name


def _put_together(peer: str, chosen: dict[str, Candidate], trials: dict[str, list[Trial]]) -> dict[str, Candidate]:
    """Figures that use both parts, or need no search of their own, take the winners of the others."""
    if peer != "llama.cpp":
        return chosen
    prefill = next(iter(_winners("prefill", trials)), Candidate())
    image = next(iter(_winners("image", trials)), Candidate())
    both = {
        "first_token": Candidate(open=prefill.open, settings={**prefill.settings, **image.settings}),
        "quality": prefill,
    }
    return {name: both.get(name, candidate) for name, candidate in chosen.items()}


def _winners(kind: str, trials: dict[str, list[Trial]]) -> list[Candidate]:
    return [ranked(name, trials)[0] for name in trials if FIGURES[name].kind == kind]
