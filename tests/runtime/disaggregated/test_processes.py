"""Both processes for real, killed and stopped at every step: the right answer or one typed error, and nothing stays."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepstitch.runtime.disaggregated.faults import STEPS

from .pair import png
from .processes import QUICK, Cluster, Plan, cluster
from .strikes import RIGHT, Aftermath, Blow, Question, outcome_of, questions_about, strike

NOTICED, HUNG, SERVICE = 0.1, QUICK.hang + QUICK.ping + 0.5, 2.0  # seconds
SLOW_MACHINE = 5.0  # other processes share the cores with a test; benchmarks.chaos measures without them
OTHER = {"encode": "language", "language": "encode"}
INSIDE = ("encode.announced", "encode.ready", "language.reading", "language.received_sent", "language.release_sent")


class Arena:
    """A cluster that many blows fall on; after one that went wrong, another cluster."""

    def __init__(self, plan: Plan, questions: list[Question]) -> None:
        self.questions = questions
        self._plan = plan
        self._loop = asyncio.new_event_loop()
        self._context: AbstractAsyncContextManager[Cluster] | None = None
        self._cluster: Cluster

    def run(self, act: Callable[[Cluster], Coroutine[Any, Any, Any]]) -> Any:
        return self._loop.run_until_complete(self._run(act))

    def strike(self, blow: Blow) -> Aftermath:
        after: Aftermath = self.run(lambda processes: strike(processes, blow, self.questions[2:]))
        if complaints := after.complaints(blow):
            self.close()
            pytest.fail("; ".join(complaints))
        return after

    def close(self) -> None:
        if self._context is not None:
            context, self._context = self._context, None
            self._loop.run_until_complete(context.__aexit__(None, None, None))

    async def _run(self, act: Callable[[Cluster], Coroutine[Any, Any, Any]]) -> Any:
        if self._context is None:
            context = cluster(self._plan, *[question.picture for question in self.questions])
            self._cluster = await context.__aenter__()
            self._context = context
        return await act(self._cluster)


@pytest.fixture(scope="module")
def questions(plain_bundle: Path, pictures: Any) -> list[Question]:
    return asyncio.run(questions_about(plain_bundle, [png(each) for each in pictures]))


@pytest.fixture(scope="module")
def arenas(plain_bundle: Path, questions: list[Question]) -> Iterator[Callable[..., Arena]]:
    made: dict[str, Arena] = {}

    def make(transport: str, **changes: Any) -> Arena:
        name = f"{transport} {changes}"
        if name not in made:
            made[name] = Arena(replace(Plan(bundle=plain_bundle, transport=transport), **changes), questions)
        return made[name]

    yield make
    for arena in made.values():
        arena.close()


def test_every_step_is_of_one_of_the_sides() -> None:
    assert {step.partition(".")[0] for step in STEPS} == set(OTHER)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step(arenas: Callable[..., Arena], step: str) -> None:
    check_kill(arenas("shm").strike(Blow(step=step, action="kill", victim=step.partition(".")[0])))


@pytest.mark.parametrize("step", INSIDE)
def test_the_other_one_is_killed_at_a_step(arenas: Callable[..., Arena], step: str) -> None:
    """It then dies in the middle of something else, such as sending bytes."""
    check_kill(arenas("shm").strike(Blow(step=step, action="kill", victim=OTHER[step.partition(".")[0]])))


def check_kill(after: Aftermath) -> None:
    assert after.noticed is not None and after.noticed < NOTICED * SLOW_MACHINE
    assert after.service is not None and after.service < SERVICE * SLOW_MACHINE


@pytest.mark.parametrize("victim", OTHER)
@pytest.mark.parametrize("step", ["encode.staged", "language.reading"])
def test_killed_at_a_step_over_tcp(arenas: Callable[..., Arena], step: str, victim: str) -> None:
    check_kill(arenas("tcp").strike(Blow(step=step, action="kill", victim=victim)))


@pytest.mark.parametrize(
    ("transport", "step", "victim"),
    [
        ("shm", "encode.accepted", "encode"),
        ("shm", "encode.staging", "encode"),
        ("shm", "encode.released", "encode"),
        ("shm", "language.reading", "encode"),
        ("tcp", "language.reading", "encode"),
        ("tcp", "encode.ready", "encode"),
    ],
)
def test_a_stopped_encoder_is_noticed_and_replaced(
    arenas: Callable[..., Arena], transport: str, step: str, victim: str
) -> None:
    after = arenas(transport).strike(Blow(step=step, action="stop", victim=victim))
    assert after.noticed is not None and after.noticed < HUNG * SLOW_MACHINE


@pytest.mark.parametrize(
    ("transport", "step", "victim"),
    [
        ("shm", "encode.staging", "encode"),
        ("tcp", "language.reading", "encode"),
        ("shm", "language.reading", "language"),
        ("tcp", "encode.ready", "language"),
    ],
)
def test_what_was_stopped_goes_on_late(arenas: Callable[..., Arena], transport: str, step: str, victim: str) -> None:
    arenas(transport).strike(Blow(step=step, action="stop", victim=victim, restart=False))


@pytest.mark.parametrize("action", ["kill", "stop"])
def test_requests_survive_on_the_other_encoder(arenas: Callable[..., Arena], action: str) -> None:
    """Nobody starts the lost one again before all is answered."""
    arena = arenas("shm", encoders=2)

    async def run(processes: Cluster) -> tuple[list[str], dict[str, Any]]:
        lost = processes.encoders[0]
        await lost.call("arm", faults=f"encode.staged={action}")
        asking = [outcome_of(processes.language, question, QUICK.request) for question in arena.questions]
        outcomes = await asyncio.gather(*asking)
        assert lost.signal(signal.SIGKILL) and any(event["event"] == "fault" for event in lost.events)
        await processes.restart(lost)
        return list(outcomes), await processes.leftovers()

    outcomes, leftovers = arena.run(run)
    assert outcomes == [RIGHT] * len(arena.questions)
    assert leftovers == {}


def test_requests_survive_on_the_local_encoder(arenas: Callable[..., Arena]) -> None:
    arena = arenas("shm", language={"local_encoder": True})

    async def run(processes: Cluster) -> tuple[list[str], dict[str, Any]]:
        lost = processes.encoders[0]
        await lost.call("arm", faults="encode.staged=kill")
        asking = [outcome_of(processes.language, question, QUICK.request) for question in arena.questions]
        outcomes = await asyncio.gather(*asking)
        assert await lost.end() == -signal.SIGKILL
        outcomes.append(await outcome_of(processes.language, arena.questions[0], QUICK.request))
        await processes.restart(lost)
        return outcomes, await processes.leftovers()

    outcomes, leftovers = arena.run(run)
    assert outcomes == [RIGHT] * (len(arena.questions) + 1)
    assert leftovers == {}


def test_text_is_answered_while_the_encoder_hangs(arenas: Callable[..., Arena]) -> None:
    arena = arenas("shm")

    async def run(processes: Cluster) -> float:
        encoder = processes.encoders[0]
        encoder.signal(signal.SIGSTOP)
        try:
            reply = await processes.language.ask([], timeout=5.0)
        finally:
            encoder.signal(signal.SIGCONT)
        assert await processes.leftovers() == {}
        return float(reply["seconds"])

    assert arena.run(run) < QUICK.hang


def test_what_the_leak_check_would_see(arenas: Callable[..., Arena]) -> None:
    """A held block, a file and a descriptor are found; else the tests above would prove nothing."""
    arena = arenas("shm")

    async def run(processes: Cluster) -> dict[str, Any]:
        baseline = processes._baseline
        processes._baseline = {
            **baseline,
            "files": baseline["files"][1:],
            "language": {**baseline["language"], "fds": 1, "blocks": {"tokens": [1, 1], "deepstack": [32, 32]}},
        }
        try:
            return await processes.leftovers(grace=0.2)
        finally:
            processes._baseline = baseline

    assert set(arena.run(run)) == {"files", "language"}
