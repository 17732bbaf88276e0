"""Hostile bytes for the control connection: libFuzzer, by way of Atheris, on the decoders of messages and of frames.

    pip install atheris
    python -m benchmarks.fuzz_messages --runs 1000000 --output benchmarks/results/fuzz_messages.json

``messages`` gets raw bytes. ``frames`` gets them too, and every other time inside a frame with the right checksum: what
a peer with bad intentions would send. Every input must be refused with ProtocolError, or come out as a message whose
values are in range and which is the same when it is sent on. Anything else, an answer after more than five seconds, or
more memory than ``--memory-mib`` ends the run with an error. Each decoder has a process of its own. The test-suite does
the same with 100,000 mutants of its own making; the two share ``tests/runtime/disaggregated/fuzzing.py``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import run_child, write_report
from deepstitch.runtime.disaggregated.errors import ProtocolError
from deepstitch.runtime.disaggregated.framing import pack, unpack
from deepstitch.runtime.disaggregated.messages import decode, encode
from tests.runtime.disaggregated.fuzzing import corpus, handmade, misfit, mutated

TARGETS = ("messages", "frames")
LIMIT = 1 << 20  # bytes of a frame


def unframed(data: bytes) -> Any:
    """The message in a frame."""
    return decode(unpack(data, LIMIT))


def opened(data: bytes) -> bytes:
    """The payload of a frame; where it is none, all of it."""
    try:
        return unpack(data, LIMIT)
    except ProtocolError:
        return data


def worker(target: str, folder: Path, runs: int, memory_mib: int) -> None:
    """Fuzz in this process, which ends with it."""
    import atheris

    for each in (unpack, decode, unframed):
        atheris.instrument_func(each)  # msgspec itself is compiled: no feedback from inside
    decoder = decode if target == "messages" else unframed
    counts = {"refused": 0, "accepted": 0, "longest_cpu_ms": 0.0}
    seeds = [encode(message) for message in corpus(1)]

    @atheris.instrument_func
    def one(data: bytes) -> None:
        began = time.thread_time()
        try:
            message = decoder(data)
        except ProtocolError:
            seconds = time.thread_time() - began
            counts["refused"] += 1
        else:
            seconds = time.thread_time() - began
            counts["accepted"] += 1
            again = encode(message)
            complaint = misfit(message, type(message))
            if complaint or encode(decode(again)) != again:
                raise AssertionError(complaint or f"changes when sent on: {message}")
        counts["longest_cpu_ms"] = max(counts["longest_cpu_ms"], 1e3 * seconds)
        if counts["refused"] + counts["accepted"] == runs:
            (folder / "counts.json").write_text(json.dumps(counts))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        order = random.Random(seed)
        inside = target == "frames" and order.random() < 0.5
        data = opened(data) if inside else data
        data = mutated(data, order, seeds) if order.random() < 0.5 else atheris.Mutate(data, max_size)
        return (pack(data) if inside else data)[:max_size]

    start = folder / "corpus"
    start.mkdir()
    for number, data in enumerate([*seeds, *(each for each in handmade().values() if len(each) < 4096)]):
        (start / str(number)).write_bytes(pack(data) if target == "frames" else data)
    options = [f"-runs={runs}", "-seed=1", "-max_len=4096", "-len_control=0", "-timeout=5", "-verbosity=0"]
    options += [f"-rss_limit_mb={memory_mib}", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(start)], one, custom_mutator=mutate)
    atheris.Fuzz()


def fuzzed(target: str, runs: int, memory_mib: int) -> dict[str, Any]:
    """Fuzz one decoder in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--worker", target, "--folder", folder, "--runs", str(runs), "--memory-mib", str(memory_mib)]
        child = run_child([sys.executable, "-m", "benchmarks.fuzz_messages", *arguments])
        counts = json.loads((Path(folder) / "counts.json").read_text())
    return {**counts, "seconds": child["seconds"], "peak_rss_bytes": child["peak_rss_bytes"]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs of each decoder (%(default)s)")
    parser.add_argument("--memory-mib", type=int, default=1024, help="most resident memory (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the report there too")
    parser.add_argument("--worker", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.folder, arguments.runs, arguments.memory_mib)
        return
    report = {target: fuzzed(target, arguments.runs, arguments.memory_mib) for target in TARGETS}
    fuzzer = f"atheris {importlib.metadata.version('atheris')} (libFuzzer)"
    write_report("fuzz_messages", {"fuzzer": fuzzer, "runs": arguments.runs, **report}, arguments.output)


if __name__ == "__main__":
    main()
