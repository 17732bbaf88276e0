"""One blow against a cluster: a process is killed or stopped at a step of the protocol, and everything is looked at."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from deepstitch.runtime.disaggregated.config import LanguageConfig
from deepstitch.runtime.disaggregated.errors import error_from_code

from .processes import Child, Cluster, Gone, Refused

RIGHT, GONE = "right", "gone"
_REACHED_SECONDS = 15.0


class Question(NamedTuple):
    """A picture and the answer of one process to the question about it."""

    picture: bytes
    answer: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """What is done.

    Attributes:
        step: of ``faults.STEPS``.
        action: ``kill`` or ``stop``.
        victim: ``encode`` or ``language``: the process that reaches the step, or the other one.
        restart: replace the victim by a new process; None: continue a stopped one instead.
        resume_after: seconds until then.
    """

    step: str
    action: str
    victim: str
    restart: bool = True
    resume_after: float = 2.0


@dataclass(slots=True, kw_only=True)
class Aftermath:
    """What came of it.

    Attributes:
        outcomes: of the requests under way: ``right``, ``gone`` (the client's own server died), the code of an error,
            or what must not be: ``wrong``, ``silent``, ``untyped …``.
        fresh: of a request after everything was up again.
        noticed: seconds until the other process knew.
        service: seconds from the start of the new process to the first right answer.
        leftovers: what is held beyond what was held before.
    """

    outcomes: list[str] = field(default_factory=list)
    fresh: str = ""
    noticed: float | None = None
    service: float | None = None
    leftovers: dict[str, Any] = field(default_factory=dict)

    def complaints(self, blow: Blow) -> list[str]:
        """What is not as it has to be."""
        found = [f"{outcome} answer" for outcome in self.outcomes if not _allowed(outcome, blow)]
        if self.fresh != RIGHT:
            found.append(f"a later request: {self.fresh}")
        if self.leftovers:
            found.append(f"left behind: {self.leftovers}")
        return found


def _allowed(outcome: str, blow: Blow) -> bool:
    if outcome == GONE:
        return blow.victim == "language" and blow.restart
    return outcome == RIGHT or error_from_code(outcome, "").code == outcome


async def questions_about(bundle: Path, pictures: Sequence[bytes]) -> list[Question]:
    """Pictures, and what one process answers."""
    alone = await Child.start("alone", LanguageConfig(bundle=bundle, threads=1))
    try:
        return [Question(picture, (await alone.ask([picture]))["answer"]) for picture in pictures]
    finally:
        await alone.end()


async def outcome_of(child: Child, question: Question, timeout: float) -> str:
    """Ask, and compare with what one process answers."""
    try:
        reply = await child.ask([question.picture], timeout=timeout)
    except Gone:
        return GONE
    except Refused as error:
        return error.code
    except asyncio.TimeoutError:
        return "silent"
    return RIGHT if reply["answer"] == question.answer else "wrong"


async def strike(cluster: Cluster, blow: Blow, questions: Sequence[Question]) -> Aftermath:
    """Ask the questions at once, strike when the step is reached, bring the victim back, ask again."""
    deadlines, after = cluster.plan.deadlines, Aftermath()
    patience = deadlines.request
    encoder, language = cluster.encoders[0], cluster.language
    reaching = encoder if blow.step.startswith("encode.") else language
    victim, other = (encoder, language) if blow.victim == "encode" else (language, encoder)
    since = max([event["at"] for event in [*encoder.events, *language.events]], default=0.0) + 1e-9
    target = 0 if victim is reaching else victim.pid
    await reaching.call("arm", faults=f"{blow.step}={blow.action}", victim=target)
    asking = [asyncio.create_task(outcome_of(language, each, patience)) for each in questions]
    struck = (await reaching.event("fault", since, _REACHED_SECONDS))["at"]
    if victim is not reaching:
        await reaching.call("arm", faults="")
    if blow.restart:
        if blow.action == "kill" or blow.victim == "encode":
            lost = await other.event("lost", struck, 3 * deadlines.hang + 5.0)
            after.noticed = lost["at"] - struck
        fresh = await cluster.restart(victim)
        after.fresh = await outcome_of(cluster.language, questions[0], patience)
        after.service = asyncio.get_running_loop().time() - fresh.started
        after.outcomes = list(await asyncio.gather(*asking))
    else:
        await asyncio.sleep(blow.resume_after)
        victim.signal(signal.SIGCONT)
        after.outcomes = list(await asyncio.gather(*asking))
        after.fresh = await outcome_of(cluster.language, questions[0], patience)
    after.leftovers = await cluster.leftovers()
    return after
