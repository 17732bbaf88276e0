"""One process against a pair of processes on one machine: time to first token, control, bytes, throughput.

    python -m benchmarks.disaggregation --output benchmarks/results/disaggregation_sample.json
    python -m benchmarks.disaggregation --bundle DIR --side 512 --output benchmarks/results/disaggregation_mid.json

The same pictures and question go to one process and to the pair in turn; no encoder cache is in the way. ``added`` is
the median, over the pictures, of what the pair took more; the target is at most 5 % of one process plus the time of the
transfer (rows are put into the pool, read, checked and copied out; not the messages before, between and after).
``control_seconds`` is what the messages of a request cost: the time the language process waits for replies minus the
time the encode process works on them. All processes share the cores, so that two encode processes are no faster than
one where one has enough to do.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.chaos import export_sample
from benchmarks.common import spread, write_report
from deepstitch.manifest import Manifest
from deepstitch.runtime.disaggregated.config import Deadlines, LanguageConfig, PoolConfig
from tests.runtime.disaggregated.processes import Child, Cluster, Plan, cluster

QUESTION = "What color is the circle?"
WARM_UP = 3
TRANSPORTS = ("shm", "tcp")
AT_ONCE = (1, 4, 16)


def picture(seed: int, side: int) -> bytes:
    """A PNG file of noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def asked(given: argparse.Namespace, seed: int) -> list[bytes]:
    """Pictures of one request."""
    return [picture(seed * given.pictures + place, given.side) for place in range(given.pictures)]


def plan_of(given: argparse.Namespace, transport: str, **changes: Any) -> Plan:
    """Processes as a user would start them, without caches."""
    options = {"threads": given.threads, "encoder_cache_bytes": 0}
    return Plan(**{"bundle": given.bundle, "transport": transport, "pool": PoolConfig(), "options": options, **changes})


async def one_process(given: argparse.Namespace) -> Child:
    """The peer."""
    config = LanguageConfig(bundle=given.bundle, threads=given.threads, encoder_cache_bytes=0)
    return await Child.start("alone", config)


async def first_token(given: argparse.Namespace) -> dict[str, Any]:
    """Interleaved, each transport in processes of its own."""
    alone = await one_process(given)
    seconds: dict[str, list[float]] = {}
    transfer: dict[str, list[float]] = {}
    same, facts = True, {}
    try:
        async with cluster(plan_of(given, "shm")) as shm, cluster(plan_of(given, "tcp")) as tcp:
            pairs = dict(zip(TRANSPORTS, (shm, tcp), strict=True))
            before = {name: await counts(each) for name, each in pairs.items()}
            for seed in tqdm(range(given.rounds + WARM_UP), desc="first token"):
                if seed == WARM_UP:
                    before = {name: await counts(each) for name, each in pairs.items()}
                files = asked(given, seed)
                askers = {"one process": alone, **{name: each.language for name, each in pairs.items()}}
                turns = list(askers)[seed % 3 :] + list(askers)[: seed % 3]  # nobody is always the first
                replies = {name: await askers[name].ask(files, QUESTION, max_tokens=1) for name in turns}
                wanted = replies["one process"]
                same &= all(reply["answer"] == wanted["answer"] for reply in replies.values())
                if seed < WARM_UP:
                    continue
                for name, reply in replies.items():
                    seconds.setdefault(name, []).append(reply["first"])
                    transfer.setdefault(name, []).append(reply["timings"].get("transfer", 0.0))
                facts = {name: wanted["answer"][name] for name in ("prompt_tokens", "visual_tokens")}
            after = {name: await counts(each) for name, each in pairs.items()}
    finally:
        await alone.end()
    base = spread(seconds["one process"])
    report: dict[str, Any] = {**facts, "same_answers": same, "one process": base}
    for name in TRANSPORTS:
        here = spread(seconds[name])
        moved = spread(transfer[name])
        added = statistics.median(np.subtract(seconds[name], seconds["one process"]).tolist())
        allowed = 0.05 * base["median"] + moved["median"]
        report[name] = {
            "seconds": here,
            "transfer_seconds": moved,
            "added_seconds": added,
            "allowed_seconds": allowed,
            "within": added <= allowed,
            **per_request(before[name], after[name], given.rounds),
        }
    return report


async def counts(processes: Cluster) -> dict[str, float]:
    """Seconds in messages, their number, and bytes sent, so far."""
    language = (await processes.language.call("metrics"))["calls"]
    found = {"messages": language.get("messages", 0.0), "control": 0.0, "initial": 0.0, "resumed": 0.0}
    found["control"] = sum(value for name, value in language.items() if name not in ("messages", "Ping"))
    for child in processes.encoders:
        told = await child.call("metrics")
        found["control"] -= sum(told["calls"].values())
        for kind, value in re.findall(r'transfer_bytes_total\{kind="(\w+)"\} (\S+)', told["metrics"]):
            found[kind] += float(value)
    return found


def per_request(before: dict[str, float], after: dict[str, float], count: int) -> dict[str, float | None]:
    """Averages; no time of control where encoding took so long that it was asked for again: that counts twice."""
    names = {
        "messages": "messages",
        "control": "control_seconds",
        "initial": "initial_bytes",
        "resumed": "resumed_bytes",
    }
    found: dict[str, float | None] = {long: (after[name] - before[name]) / count for name, long in names.items()}
    if after["control"] < before["control"]:
        found["control_seconds"] = None
    return found


async def resumed_bytes(given: argparse.Namespace, prompt_tokens: int) -> dict[str, Any]:
    """One request whose tokens come in three parts; what a resumed transfer consists of."""
    block = 16
    blocks = -(-prompt_tokens // block)
    pool = PoolConfig(block_tokens=block, blocks=blocks, first_blocks=-(-blocks // 3))
    model = Manifest.read(given.bundle).model
    async with cluster(plan_of(given, "shm", pool=pool)) as processes:
        before = await counts(processes)
        await processes.language.ask(asked(given, 0), QUESTION, max_tokens=1)
        moved = per_request(before, await counts(processes), 1)
    row = 4 * model.hidden_size + 4 + 12  # an embedding, an id, three positions
    first = min(prompt_tokens, block * -(-blocks // 3))
    transfers = -(-(prompt_tokens - first) // (block * -(-blocks // 3)))
    without_deepstack = (prompt_tokens - first) * row + transfers * 64
    return {
        **{name: moved[name] for name in ("initial_bytes", "resumed_bytes", "messages", "control_seconds")},
        "resumes": transfers,
        "resumed_bytes_without_deepstack": without_deepstack,
        "resumed_has_no_deepstack": moved["resumed_bytes"] == without_deepstack,
    }


async def throughput(given: argparse.Namespace) -> dict[str, Any]:
    """Requests per second, 1, 4 and 16 at once."""
    batches = [asked(given, 1000 + number) for number in range(given.requests)]
    alone = await one_process(given)
    rates: dict[str, dict[str, float]] = {"one process": {"1": 0.0}}
    try:
        rates["one process"]["1"] = await rate([alone], batches, 1)
    finally:
        await alone.end()
    for encoders in (1, 2):
        async with cluster(plan_of(given, "shm", encoders=encoders, deadlines=Deadlines())) as processes:
            await rate([processes.language], batches[:4], 2)
            name = f"{encoders} encode process{'es' * (encoders - 1)}"
            rates[name] = {str(at_once): await rate([processes.language], batches, at_once) for at_once in AT_ONCE}
    return rates


async def rate(servers: Sequence[Child], batches: Sequence[list[bytes]], at_once: int) -> float:
    """Requests per second."""
    waiting = iter(batches)
    began = time.monotonic()

    async def work() -> None:
        for files in waiting:
            await servers[0].ask(files, QUESTION, timeout=600.0, max_tokens=8)

    await asyncio.gather(*[work() for _ in range(at_once)])
    return len(batches) / (time.monotonic() - began)


async def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Everything, one after the other."""
    first = await first_token(given)
    return {
        "first_token": first,
        "three_parts": await resumed_bytes(given, first["prompt_tokens"]),
        "requests_per_second": await throughput(given),
    }


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the sample model, exported for the purpose")
    parser.add_argument("--side", type=int, default=256, help="picture side in pixels")
    parser.add_argument("--pictures", type=int, default=1, help="per request")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=48, help="per throughput figure")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON report")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        name = given.bundle.name if given.bundle else "sample"
        given.bundle = given.bundle or export_sample(Path(scratch, "bundle"))
        report = asyncio.run(measure(given))
    settings = {name: getattr(given, name) for name in ("side", "pictures", "rounds", "requests", "threads")}
    write_report("disaggregation", {"bundle": name, **settings, **report}, given.output)


if __name__ == "__main__":
    main()
