"""Decode throughput by batch size: rows of one bundle stepped together, in one run, interleaved.

    python -m benchmarks.batched_decode BUNDLE --context 64 --output benchmarks/results/batched_decode.json

Every row holds ``--context`` tokens of random ids, fed in one row after another, and takes ``--steps`` tokens, greedy,
through the same calls ``generate_batch`` makes. Reported per batch size: tokens per second over all rows (median,
minimum and maximum over ``--rounds``), the gain over a batch of one, and the share of the time outside the engine.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import spread, write_report
from benchmarks.decoding import TextDecoder
from deepstitch.runtime.decode import DecoderState


class Batch:
    """Rows in flight that can be stepped again and again from the same place."""

    def __init__(self, decoder: TextDecoder, *, rows: int, context: int, steps: int) -> None:
        self.table = decoder.table
        self.context = context
        self.state = DecoderState(decoder.engine, rows=rows, capacity=context + steps)
        ids = decoder.random_ids(rows, context)
        self.first = ids[:, -1]
        for start in range(0, context, 512):  # together where the kernels can, which they cannot onto filled rows
            self.state.prefill([decoder.text(row[start : start + 512], start) for row in ids])

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of ``steps`` steps, and those inside the engine."""
        state = self.state
        for row in range(state.rows):
            state.truncate(row, self.context)
        began, inside = time.perf_counter(), state.engine_seconds
        tokens = self.first
        for _ in range(steps):
            logits = state.step(self.table(tokens), state.lengths.astype(np.int64))
            tokens = logits.argmax(axis=-1)
        return time.perf_counter() - began, state.engine_seconds - inside


def measure(bundle: Path, sizes: list[int], context: int, steps: int, rounds: int, threads: int) -> dict[str, Any]:
    """Interleave the batch sizes; the first round warms up and is dropped."""
    decoder = TextDecoder(bundle, threads)
    batches = {size: Batch(decoder, rows=size, context=context, steps=steps) for size in sizes}
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    outside: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds + 1):
        for size, batch in batches.items():
            seconds, inside = batch.run(steps)
            if number:
                rates[size].append(size * steps / seconds)
                outside[size].append(1 - inside / seconds)
    alone = spread(rates[sizes[0]])["median"]
    return {
        str(size): {
            "tokens_per_second": spread(rates[size]),
            "gain": spread(rates[size])["median"] / alone,
            "outside_engine_share": spread(outside[size])["median"],
        }
        for size in sizes
    }


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an exported bundle")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=64, help="tokens each row holds before the first step")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON report")
    given = parser.parse_args()
    found = measure(given.bundle, given.batch, given.context, given.steps, given.rounds, given.threads)
    settings = {"context": given.context, "steps": given.steps, "rounds": given.rounds, "threads": given.threads}
    write_report("batched_decode", {"bundle": given.bundle.name, **settings, "batch": found}, given.output)


if __name__ == "__main__":
    main()
