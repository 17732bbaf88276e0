"""Encode and language processes are killed and stopped at every step of their protocol; what becomes of the requests.

    python -m benchmarks.chaos --repeats 20 --output benchmarks/results/chaos_shm.json
    python -m benchmarks.chaos --soak 10000 --output benchmarks/results/chaos_soak.json

Every blow falls while two picture requests are under way, on the process that reaches the step or on the other one:
``kill`` is SIGKILL and a new process; ``stop`` is SIGSTOP, then either a new process in its place or SIGCONT ten
seconds later. A request has to end in the answer of one process, bit for bit in the probabilities, or in one typed
error; only clients of a killed language process may see their connection break. Then a new request has to be right, and
both pools, rooms, file descriptors, threads, tasks, files and stderr have to be as before. Deadlines are the defaults.
Medians of the seconds until a death or hang is noticed and until service is back are held against targets.

``--soak`` sends that many picture requests, several at a time, with faults in one of a hundred, between as many
without: connections cut, bytes damaged, clients that go away, encode processes killed.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.common import write_report
from benchmarks.soak import soak
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.runtime.disaggregated.config import Deadlines, PoolConfig
from deepstitch.runtime.disaggregated.faults import STEPS
from tests.runtime.disaggregated.processes import Cluster, Plan, cluster
from tests.runtime.disaggregated.strikes import Aftermath, Blow, Question, questions_about, strike
from tests.runtime.tiny_bundle import write_tiny_bundle

OTHER = {"encode": "language", "language": "encode"}
SIZES = ((64, 64), (96, 160), (128, 96), (224, 224))
LATE_SECONDS = 10.0
UNDER_WAY = 2
# Medians of seconds. Service after a stop is not judged: many clusters wait for hangs at a time.
TARGETS = {
    "death_noticed": 0.1,
    "hang_noticed": 5.0,
    "idle_hang_noticed": 5.0,
    "service_again_encode_after_kill": 2.0,
    "service_again_language_after_kill": 2.0,
}


def pictures(count: int) -> list[bytes]:
    """PNG files of noise, in turn of several sizes."""
    random, files = np.random.default_rng(5), []
    for place in range(count):
        buffer = io.BytesIO()
        pixels = random.integers(0, 256, (*SIZES[place % len(SIZES)], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def blows(steps: Sequence[str], action: str, repeats: int) -> list[Blow]:
    """Every step, both victims; every other stop is followed by a late continuation instead of a new process."""
    return [
        Blow(
            step=step,
            action=action,
            victim=victim,
            restart=action == "kill" or repeat % 2 == 0,
            resume_after=LATE_SECONDS,
        )
        for repeat in range(repeats)
        for step in steps
        for victim in OTHER
    ]


class Record:
    """What came of all blows."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.times: dict[str, list[float]] = defaultdict(list)
        self.complaints: list[str] = []
        self.count = 0

    def add(self, blow: Blow, after: Aftermath) -> None:
        """Take down one."""
        self.count += 1
        end = "" if blow.action == "kill" else ", replaced" if blow.restart else ", continued late"
        self.outcomes[f"{blow.step} {blow.action} {blow.victim}{end}"].update(after.outcomes)
        if after.noticed is not None:
            self.times["death_noticed" if blow.action == "kill" else "hang_noticed"].append(after.noticed)
        if after.service is not None:
            self.times[f"service_again_{blow.victim}_after_{blow.action}"].append(after.service)
        self.complaints += [f"{blow}: {text}" for text in after.complaints(blow)]

    def report(self) -> dict[str, Any]:
        """As JSON types."""
        total: Counter[str] = sum(self.outcomes.values(), Counter())
        times = {
            name: {"median": statistics.median(values), "max": max(values), "count": len(values)}
            for name, values in self.times.items()
        }
        steps = {name: dict(counts) for name, counts in sorted(self.outcomes.items())}
        return {
            "blows": self.count,
            "requests": dict(total),
            "seconds": times,
            "complaints": self.complaints,
            "outcomes_by_step": steps,
        }


def too_slow(seconds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Medians beyond their targets, in words."""
    return [
        f"{name}: {seconds[name]['median']:.3f} s in the median, the target is {target:g} s"
        for name, target in TARGETS.items()
        if name in seconds and seconds[name]["median"] > target
    ]


async def fight(plan: Plan, queue: list[Blow], questions: Sequence[Question], record: Record, bar: Any) -> None:
    """Take blows from the queue until it is empty; after one that went wrong, with new processes."""
    warm_up = [question.picture for question in questions[:4]]
    while queue:
        async with cluster(plan, *warm_up) as processes:
            while queue:
                blow = queue.pop()
                try:
                    after = await strike(processes, blow, questions[-UNDER_WAY:])
                except Exception as error:
                    record.complaints.append(f"{blow}: {type(error).__name__} {error}")
                    bar.update()
                    break
                record.add(blow, after)
                bar.update()
                bar.set_postfix(complaints=len(record.complaints))
                if after.complaints(blow):
                    break


async def matrix(given: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """All blows of both kinds; those that kill by few at a time, because their times are measured."""
    questions, record = await questions_about(bundle, pictures(4)), Record()
    long = max(question.answer["prompt_tokens"] for question in questions)
    # at least three transfers for the pictures under way, in blocks for both of them
    pool = PoolConfig(block_tokens=8, blocks=2 * -(-long // 8), first_blocks=-(-long // 32), checksums=True)
    plan = Plan(bundle=bundle, transport=given.transport, pool=pool, deadlines=Deadlines())
    steps = [step for step in STEPS if any(step.startswith(each) for each in given.steps)]
    began = time.monotonic()
    for action, parallel in (("kill", given.parallel), ("stop", given.parallel_stops)):
        if action not in given.actions:
            continue
        queue = blows(steps, action, given.repeats)[::-1]
        with tqdm(total=len(queue), desc=action, unit="blow") as bar:
            await asyncio.gather(*[fight(plan, queue, questions, record, bar) for _ in range(parallel)])
    return {**record.report(), "wall_seconds": time.monotonic() - began}


async def idle_hang(bundle: Path, transport: str, rounds: int) -> dict[str, float]:
    """How long nobody notices that an encode process hangs which nobody has asked anything."""
    from signal import SIGCONT, SIGSTOP

    files, seconds = pictures(1), []

    async def once(processes: Cluster, number: int) -> None:
        await asyncio.sleep(number / rounds)
        stopped = processes.encoders[0].signal(SIGSTOP)
        lost = await processes.language.event("lost", stopped, 20.0)
        seconds.append(lost["at"] - stopped)
        processes.encoders[0].signal(SIGCONT)
        await processes.leftovers()

    async with cluster(Plan(bundle=bundle, transport=transport, deadlines=Deadlines()), *files) as processes:
        for number in tqdm(range(rounds), desc="idle hang"):
            await once(processes, number)
    return {"median": statistics.median(seconds), "max": max(seconds), "count": len(seconds)}


def export_sample(folder: Path) -> Path:
    """The sample model, for a CPU."""
    from deepstitch.export import ExportConfig, export_checkpoint

    return export_checkpoint(ExportConfig(checkpoint=CHECKPOINT, output=folder, target="ort-cpu", progress=False))


def main() -> None:
    """Parse arguments, fight, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the sample model, exported; for a soak, a tiny one")
    parser.add_argument("--transport", choices=("shm", "tcp"), default="shm")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", nargs="*", default=[""], help="beginnings of names, such as encode.staged")
    parser.add_argument("--actions", nargs="*", default=["kill", "stop"], choices=("kill", "stop"))
    parser.add_argument("--parallel", type=int, default=1, help="clusters that are killed at a time")
    parser.add_argument("--parallel-stops", type=int, default=12, help="clusters that wait for a hang at a time")
    parser.add_argument("--soak", type=int, metavar="N", help="N requests with faults, and N without")
    parser.add_argument("--output", type=Path, help="JSON report")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make = write_tiny_bundle if given.soak else export_sample  # a soak is about the protocol
        bundle = given.bundle or make(Path(scratch, "bundle"))
        if given.soak:
            report = asyncio.run(soak(bundle, given.transport, given.soak, pictures(256)))
        else:
            report = asyncio.run(matrix(given, bundle))
            report["seconds"]["idle_hang_noticed"] = asyncio.run(idle_hang(bundle, given.transport, 5))
            report["complaints"] += too_slow(report["seconds"])
    settings = {"transport": given.transport, **({} if given.soak else {"repeats": given.repeats})}
    write_report("chaos", {**settings, **report}, given.output)
    if report["complaints"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
