"""``deepstitch build --check``: everything that can be said about an engine before a builder has seen the graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepstitch.errors import UnsupportedError
from deepstitch.export.tensorrt.advice import advise
from deepstitch.export.tensorrt.check import GraphCheck, check_graph
from deepstitch.export.tensorrt.memory_plan import Choice, MemoryPlan, Planner
from deepstitch.export.tensorrt.operators import ParserTable
from deepstitch.export.tensorrt.plugin_library import library_problems
from deepstitch.export.tensorrt.profiles import Limits, Profile, profiles
from deepstitch.export.tensorrt.subject import Subject

__all__ = ["PARSERS", "SMS", "BuildCheck", "check_build", "default_sm", "parser_of"]

PARSERS: Mapping[str, str] = {"trt8": "8.6", "trt10": "10.0"}  # target: its oldest parser
# Compute capabilities. Of 8.6 those it has code for, but not 6.0, which has no dp4a for the plugins; of 10 and 11 those
# from 7.5 on: which release has which of them, its support matrix says.
SMS: Mapping[str, tuple[int, ...]] = {
    "trt8": (61, 70, 72, 75, 80, 86, 87, 89, 90),
    "trt10": (75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildCheck:
    """What ``deepstitch build --check`` reports.

    Attributes:
        subject: the graphs.
        parser: they were held against.
        sm: compute capability, without the dot.
        limits: largest inputs.
        profiles: that the engines get.
        graphs: findings by graph.
        plan: memory; None where the sizes could not be followed.
        library: what is wrong with the plugin library; None: none was given.
    """

    subject: Subject
    parser: str
    sm: int
    limits: Limits
    profiles: tuple[Profile, ...]
    graphs: tuple[GraphCheck, ...]
    plan: MemoryPlan | None
    library: tuple[str, ...] | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with graphs and library; memory is another matter."""
        return not self.library and not any(graph.problems for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.subject.name,
            "target": self.subject.target,
            "parser": self.parser,
            "sm": self.sm,
            "weights": self.subject.weights,
            "vision_weights": self.subject.vision_weights,
            "kv_cache": self.subject.cache_dtype,
            "limits": asdict(self.limits),
            "profiles": {each.name: {"graph": each.graph, **each.corners} for each in self.profiles},
            "graphs": {each.name: _graph_dict(each) for each in self.graphs},
            "library_problems": self.library,
            "passed": self.passed,
            "memory": self.plan.to_dict() if self.plan is not None else None,
        }


def _graph_dict(check: GraphCheck) -> dict[str, Any]:
    names = ("nodes", "operators", "plugins", "corners")
    return {name: getattr(check, name) for name in names} | {"problems": [asdict(each) for each in check.problems]}


def parser_of(target: str) -> str:
    """Version of the parser behind a target.

    Raises:
        UnsupportedError: there is no table of it.
    """
    if target not in PARSERS:
        raise UnsupportedError(f"--target {target}: must be one of {', '.join(PARSERS)}")
    return PARSERS[target]


def default_sm(target: str) -> int:
    """The oldest card of a target, for which a plan is the most careful one.

    Raises:
        UnsupportedError: no such target.
    """
    parser_of(target)
    return SMS[target][0]


def check_build(
    subject: Subject, limits: Limits, sm: int, memory: tuple[int, str] | None, library: Path | None = None
) -> BuildCheck:
    """Check graphs and plan memory.

    Args:
        subject: what is to be built.
        limits: largest inputs.
        sm: compute capability of the card, without the dot.
        memory: bytes there are, and where that is from; None: not known.
        library: of the plugins, to be asked too.

    Raises:
        UnsupportedError: TensorRT has no code for the card.
        InputError: limits the model cannot have.
    """
    parser = parser_of(subject.target)
    if sm not in SMS[subject.target]:
        known = ", ".join(map(str, SMS[subject.target]))
        raise UnsupportedError(f"--sm {sm}: --target {subject.target} is for {known}")
    limits.check(merge_size=subject.merge_size, context=subject.context)
    table = ParserTable.load(parser)
    found = profiles(limits, subject.merge_size, subject.graphs)
    graphs = tuple(
        check_graph(name, model, subject.contracts[name], found, table) for name, model in subject.graphs.items()
    )
    return BuildCheck(
        subject=subject,
        parser=table.parser,
        sm=sm,
        limits=limits,
        profiles=tuple(found),
        graphs=graphs,
        plan=_plan(subject, graphs, limits, memory) if all(each.followed for each in graphs) else None,
        library=library_problems(library, sm, subject.graphs.values()) if library is not None else None,
    )


def _plan(
    subject: Subject, graphs: tuple[GraphCheck, ...], limits: Limits, memory: tuple[int, str] | None
) -> MemoryPlan:
    available, source = memory if memory is not None else (None, "not known")
    planner = Planner(subject, {each.name: each.propagation for each in graphs}, available)
    choice = Choice(limits=limits, cache_dtype=subject.cache_dtype)
    plan = MemoryPlan(items=planner.items(choice), available=available, source=source)
    if plan.fits is False and available is not None:
        plan = replace(plan, advice=advise(planner, choice, available))
    return plan
