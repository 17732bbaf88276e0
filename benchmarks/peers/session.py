"""A whole run: prepare files, choose settings, measure in rounds, summarise."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import commit, machine
from benchmarks.peers import traffic
from benchmarks.peers.figures import Figure
from benchmarks.peers.peers import PEERS, Candidate, Variant
from benchmarks.peers.prepare import PreparationError, Workshop
from benchmarks.peers.runner import ChildRun, run_child
from benchmarks.peers.statistics_of import Sample, ratios, summary
from benchmarks.peers.tuning import Job, Trial, choose, jobs

__all__ = ["Plan", "Session", "without_folders"]

_FOLDERS = re.compile(r"(?<![\w.])/(?:[\w.@+-]+/)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure; fields are those of the command line."""

    shapes: tuple[str, ...]
    peers: tuple[str, ...]
    bits: tuple[int, ...]
    variants: tuple[str, ...] | None
    own_variants: tuple[Variant, ...]
    figures: tuple[Figure, ...]
    repeats: int
    slow_repeats: int
    retries: int
    noise_limit: float
    limit_seconds: float
    quick: bool


@dataclass(slots=True, kw_only=True)
class Case:
    """One runtime with one form of the weights of one shape."""

    shape: str
    peer: str
    variant: Variant
    text: dict[str, Any]
    tied: bool
    files: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    version: str | None = None
    chosen: dict[str, Candidate] = field(default_factory=dict)
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For progress messages."""
        return f"{self.shape} {self.peer} {self.variant.name}"


class Session:
    """Holds everything measured so far."""

    def __init__(self, plan: Plan, workshop: Workshop, output: Path | None) -> None:
        self._plan, self._workshop, self._output = plan, workshop, output
        self._bandwidth: list[float] = []
        self._cases: list[Case] = []

    def run(self) -> dict[str, Any]:
        """Measure everything; shapes one after the other, so that the page cache holds one of them."""
        for shape in self._plan.shapes:
            cases = self._prepared(shape)
            self._cases += cases
            if any(figure.kind == "quality" for figure in self._plan.figures):
                self._write_reference(shape)
            for case in cases:
                if case.error is None:
                    self._tune(case)
            for number in range(self._plan.repeats):
                self._round(cases, number)
        return self.report()

    def _prepared(self, shape: str) -> list[Case]:
        cases = []
        checkpoint = self._workshop.checkpoint(shape)
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        for peer in self._plan.peers:
            for variant in self._wanted(peer):
                tied = config["tie_word_embeddings"]
                case = Case(shape=shape, peer=peer, variant=variant, text=config["text_config"], tied=tied)
                _say(f"{case.label}: preparing")
                try:
                    case.files = self._workshop.files(peer, variant, shape)
                except PreparationError as error:
                    case.error = without_folders(str(error))
                    _say(f"{case.label}: {error}")
                cases.append(case)
        return cases

    def _wanted(self, peer: str) -> list[Variant]:
        plan = self._plan
        known = {each.name: each for each in PEERS[peer].variants}
        if peer == "deepstitch":
            known |= {each.name: each for each in plan.own_variants}
        named = [each for each in known.values() if plan.variants is None or each.name in plan.variants]
        return [each for each in named if each.bits in plan.bits or each.always]

    def _reference(self, shape: str) -> Path:
        return self._workshop.work / shape / "reference.npy"

    def _write_reference(self, shape: str) -> None:
        """fp32 logits of transformers, which every ``quality`` figure is compared with."""
        if self._reference(shape).exists():
            return
        peer = PEERS["transformers"]
        files = self._workshop.files(peer.name, peer.variants[0], shape)
        job = Job(group="quality", open={}, runs=(("quality", {}),))
        case = Case(shape=shape, peer=peer.name, variant=peer.variants[0], text={}, tied=False, files=files)
        _say(f"{shape}: fp32 reference")
        done = self._execute(case, job, write_reference=True)
        if done.error:
            _say(f"{shape}: no reference: {done.error}")

    def _execute(self, case: Case, job: Job, *, write_reference: bool = False) -> ChildRun:
        peer = PEERS[case.peer]
        request = {
            "variant": case.variant.name,
            "package": peer.package,
            "files": case.files,
            "parts": job.parts,
            "open": {**job.open, **_open_for_vision(job)},
            "runs": [{"figure": name, "settings": settings} for name, settings in job.runs],
            "threads": self._workshop.threads,
            "scratch": str(self._workshop.work / case.shape / "states"),
            "reference": str(self._reference(case.shape)),
            "write_reference": write_reference,
        }
        python = self._workshop.pythons[case.peer]
        return run_child(python, peer.module, request, limit_seconds=self._plan.limit_seconds)

    def _tune(self, case: Case) -> None:
        def execute(wanted: list[Job]) -> Iterator[tuple[str, Candidate, float]]:
            for job in wanted:
                _say(f"{case.label}: trying {job.open or 'settings'} for {job.group}")
                for run in self._execute(case, job).result["runs"]:
                    if "value" in run:
                        candidate = Candidate(open=job.open, settings=run["settings"])
                        yield run["figure"], candidate, run["value"]

        experts = "num_experts" in case.text
        case.chosen, case.trials = choose(
            case.peer, case.variant, list(self._plan.figures), execute, quick=self._plan.quick, experts=experts
        )

    def _round(self, cases: list[Case], number: int) -> None:
        """Every process once; each round begins with another runtime."""
        self._measure_bandwidth()
        running = [case for case in cases if case.error is None]
        if number >= self._plan.slow_repeats:
            running = [case for case in running if not case.variant.always]
        turn = number % max(1, len(running))
        for case in running[turn:] + running[:turn]:
            for job in jobs({name: each for name, each in case.chosen.items() if name not in case.errors}):
                self._measure(case, job, number)
            if self._output:
                self._output.write_text(json.dumps(self.report(), indent=1) + "\n", "utf-8")

    def _measure(self, case: Case, job: Job, number: int) -> None:
        for _ in range(self._plan.retries + 1):
            done = self._execute(case, job)
            _say(
                f"{case.label}: round {number + 1}, {job.group}, {done.seconds:.0f} s, "
                f"other load {done.other_load:.0%}{', ' + done.error if done.error else ''}"
            )
            self._record(case, job, done)
            if done.other_load < self._plan.noise_limit or done.error:
                return

    @staticmethod
    def _record(case: Case, job: Job, done: ChildRun) -> None:
        case.version = done.result.get("version", case.version)
        finished = set()
        for run in done.result["runs"]:
            finished.add(run["figure"])
            if "error" in run:
                case.errors.setdefault(run["figure"], without_folders(run["error"]))
            else:
                sample = Sample(value=run["value"], other_load=done.other_load, extra=run)
                case.samples.setdefault(run["figure"], []).append(sample)
        for name, _ in job.runs:
            if name not in finished and name not in case.samples:
                case.errors.setdefault(name, without_folders(done.error or "nothing came back"))

    def _measure_bandwidth(self) -> None:
        command = [sys.executable, "-m", "benchmarks.peers.measure_bandwidth", str(self._workshop.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        self._bandwidth.append(json.loads(done.stdout)["bytes_per_second"])

    def report(self) -> dict[str, Any]:
        """Everything measured so far, as JSON values."""
        bandwidth = statistics.median(self._bandwidth) if self._bandwidth else None
        cases = [self._summarised(case, bandwidth) for case in self._cases]
        return {
            "benchmark": "peers",
            "commit": commit(),
            "machine": machine(),
            "threads": self._workshop.threads,
            "memory_bandwidth_bytes_per_second": bandwidth,
            "rounds": self._plan.repeats,
            "noise_limit": self._plan.noise_limit,
            "figures": {figure.name: figure.unit for figure in self._plan.figures},
            "cases": cases,
            "ratios": ratios(cases),
        }

    def _summarised(self, case: Case, bandwidth: float | None) -> dict[str, Any]:
        figures = {name: summary(samples, noise_limit=self._plan.noise_limit) for name, samples in case.samples.items()}
        facts: dict[str, Any] = {}
        if figures:
            facts = traffic.annotate(case, figures, bandwidth)
        return {
            "shape": case.shape,
            "peer": case.peer,
            "variant": case.variant.name,
            "bits": case.variant.bits,
            "always": case.variant.always,
            "version": case.version,
            "error": case.error,
            "errors": case.errors,
            "figures": figures,
            "settings": {name: {**each.open, **each.settings} for name, each in case.chosen.items() if name in figures},
            "tried": {
                name: [{**trial.candidate.open, **trial.candidate.settings, "value": trial.value} for trial in trials]
                for name, trials in case.trials.items()
            },
            **facts,
        }


def _open_for_vision(job: Job) -> dict[str, Any]:
    """The projector a picture's figure begins with, so that it is part of loading."""
    settings = job.runs[0][1]
    return {key: settings[key] for key in ("mmproj", "vision_flash") if key in settings}


def without_folders(text: str) -> str:
    """Error messages with the folders of this machine left out of their paths."""
    return _FOLDERS.sub("", text)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
