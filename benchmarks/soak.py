"""Thousands of picture requests with faults in one of a hundred, between as many without; part of benchmarks.chaos."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deepstitch.runtime.disaggregated.config import Deadlines, PoolConfig
from deepstitch.runtime.disaggregated.errors import error_from_code
from tests.runtime.disaggregated.processes import Cluster, Plan, cluster
from tests.runtime.disaggregated.strikes import RIGHT, Question, outcome_of, questions_about

__all__ = ["soak"]

AT_A_TIME = 8
SEGMENT = 500
FAULTS = {"connection cut": 40, "bytes damaged": 30, "client gone": 26, "encoder killed": 4}  # of 100
ENCODERS = 2
TIMEOUT = 60.0
GONE = "client gone"


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the requests of one kind of segment."""

    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        """As JSON types."""
        count = sum(self.outcomes.values())
        rate = count / self.seconds if self.seconds else 0.0
        outcomes, faults = dict(self.outcomes), dict(self.faults)
        return {"requests": count, "requests_per_second": rate, "outcomes": outcomes, "faults": faults}


class Soak:
    """Requests to a cluster, and faults."""

    def __init__(self, processes: Cluster, questions: Sequence[Question]) -> None:
        self.processes = processes
        self.questions = questions
        self._random = random.Random(9)
        self._asked = 0
        self._repairs: set[asyncio.Task[Any]] = set()

    async def segment(self, count: int, tally: Tally, faults: Sequence[str], bar: Any) -> None:
        """``count`` requests, ``AT_A_TIME`` at a time, with these faults at random places."""
        places = self._random.sample(range(count), len(faults))
        plan = dict(zip(places, faults, strict=True))
        numbers = iter(range(count))
        began = time.monotonic()

        async def work() -> None:
            for number in numbers:
                tally.outcomes[await self._request(plan.get(number))] += 1
                bar.update()

        await asyncio.gather(*[work() for _ in range(AT_A_TIME)])
        await asyncio.gather(*self._repairs)  # the next segment must not pay for it
        tally.seconds += time.monotonic() - began
        tally.faults.update(faults)

    async def _request(self, fault: str | None) -> str:
        question = self.questions[self._asked % len(self.questions)]
        self._asked += 1
        language = self.processes.language
        if fault == "bytes damaged":
            await language.call("corrupt")
        asking = asyncio.create_task(outcome_of(language, question, TIMEOUT))
        if fault is not None:
            await asyncio.sleep(self._random.uniform(0.0, 0.03))
        if fault == "connection cut":
            await language.call("cut")
        elif fault == "client gone":
            asking.cancel()
        elif fault == "encoder killed":
            victim = self._random.choice(self.processes.encoders)
            victim.signal(signal.SIGKILL)
            repair = asyncio.create_task(self.processes.restart(victim))
            self._repairs.add(repair)
            repair.add_done_callback(self._repairs.discard)
        with suppress(asyncio.CancelledError):
            return await asking
        return GONE


async def memory(processes: Cluster) -> AsyncIterator[tuple[str, int]]:
    """Resident bytes by process."""
    yield "language", processes.language.usage()["rss"]
    for place, child in enumerate(processes.encoders):
        yield f"encode {place}", child.usage()["rss"]


async def soak(bundle: Path, transport: str, count: int, files: Sequence[bytes]) -> dict[str, Any]:
    """``count`` requests with faults and ``count`` without, in turns.

    Args:
        bundle: folder.
        transport: ``shm`` or ``tcp``.
        count: of requests.
        files: pictures; more than the caches hold.
    """
    questions = await questions_about(bundle, files)
    kinds = [kind for kind, share in FAULTS.items() for _ in range(share)]
    random.Random(4).shuffle(kinds)
    faults = [kinds[index % len(kinds)] for index in range(count // 100)]
    plan = Plan(
        bundle=bundle,
        transport=transport,
        encoders=ENCODERS,
        deadlines=Deadlines(),
        pool=PoolConfig(block_tokens=16, blocks=64, checksums=True),
        options={"encoder_cache_bytes": 64 << 10},
    )
    faulty, clean = Tally(), Tally()
    async with cluster(plan, *files[:4]) as processes:
        load = Soak(processes, questions)
        await load.segment(min(SEGMENT, count), Tally(), [], tqdm(disable=True))
        before = {name: size async for name, size in memory(processes)}
        with tqdm(total=2 * count, unit="request") as bar:
            for start in range(0, count, SEGMENT):
                size = min(SEGMENT, count - start)
                now = faults[start // 100 : (start + size) // 100]
                turns = [(clean, []), (faulty, now)]
                for tally, chosen in turns if start // SEGMENT % 2 else turns[::-1]:
                    await load.segment(size, tally, chosen, bar)
        leftovers = await processes.leftovers()
        after = {name: size async for name, size in memory(processes)}
    return _report(faulty, clean, leftovers, before, after)


def _report(
    faulty: Tally, clean: Tally, leftovers: dict[str, Any], before: dict[str, int], after: dict[str, int]
) -> dict[str, Any]:
    complaints = [f"left behind: {leftovers}"] if leftovers else []
    for tally in (faulty, clean):
        bad = {name for name in tally.outcomes if name not in (RIGHT, GONE) and error_from_code(name, "").code != name}
        complaints += [f"{tally.outcomes[name]} requests: {name}" for name in sorted(bad)]
    if set(clean.outcomes) != {RIGHT}:
        complaints.append(f"without faults: {dict(clean.outcomes)}")
    ratio = faulty.report()["requests_per_second"] / clean.report()["requests_per_second"]
    return {
        "requests_at_a_time": AT_A_TIME,
        "encode_processes": ENCODERS,
        "with_faults": faulty.report(),
        "without": clean.report(),
        "throughput_ratio": ratio,
        "rss_bytes": {name: {"before": before[name], "after": after[name]} for name in before},
        "complaints": complaints,
    }
