"""Load time and memory of a bundle: as loaded by default, and with packed weights mapped from a file.

    python -m benchmarks.load BUNDLE --rounds 5 --output benchmarks/results/load.json

Every load is a process of its own and the settings take turns. Reported: seconds until the pipeline is ready, resident
memory then, after one answer of ``--tokens`` tokens, and its peak; ``per_weights_and_kv`` is the peak over the bytes of
the bundle's weights plus those of the KV cache that the answer fills. The page cache is warm, the files are verified
before, and the first load with packed weights, which writes their file, is reported by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import spread, write_report
from benchmarks.long_prompt import resident

SETTINGS = {"default": False, "packed_cache": True}
PROMPT = "Say it again and again."


def child(bundle: Path, setting: str, tokens: int, threads: int) -> dict[str, Any]:
    """Load, answer, report."""
    began = time.perf_counter()
    import deepstitch

    pipeline = deepstitch.load(bundle, threads=threads, packed_cache=SETTINGS[setting])
    seconds = time.perf_counter() - began
    loaded = resident()
    result = pipeline.generate(PROMPT, max_tokens=tokens, ignore_eos=True)
    model = pipeline.manifest.model
    held = result.prompt_tokens + result.generated_tokens
    kv_bytes = 8 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * held
    return {
        "seconds": seconds,
        "rss_loaded": loaded["rss"],
        "anonymous_loaded": loaded["anonymous"],
        "rss_after_answer": resident()["rss"],
        "anonymous_after_answer": resident()["anonymous"],
        "peak_rss": resident()["peak_rss"],
        "kv_bytes": kv_bytes,
    }


def run(bundle: Path, setting: str, tokens: int, threads: int) -> dict[str, Any]:
    """One child process."""
    arguments = [str(bundle), "--child", setting, "--tokens", str(tokens), "--threads", str(threads)]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def measure(bundle: Path, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Interleave the settings."""
    weights = sum(path.stat().st_size for path in bundle.rglob("*.safetensors"))
    run(bundle, "default", 2, threads)  # hashes the files and fills the page cache
    runs: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
    first = run(bundle, "packed_cache", 2, threads)
    for _ in range(rounds):
        for setting, found in runs.items():
            found.append(run(bundle, setting, tokens, threads))
    report: dict[str, Any] = {"weight_bytes": weights, "first_packed_cache_seconds": first["seconds"]}
    for setting, found in runs.items():
        figures = {name: spread([each[name] for each in found]) for name in found[0]}
        held = weights + found[0]["kv_bytes"]
        report[setting] = {
            **figures,
            "seconds_per_2_gb": figures["seconds"]["median"] * 2e9 / weights,
            "per_weights_and_kv": figures["peak_rss"]["median"] / held,
        }
    return report


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an exported bundle")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON report")
    parser.add_argument("--child", choices=tuple(SETTINGS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        sys.stdout.write(json.dumps(child(given.bundle, given.child, given.tokens, given.threads)))
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["DEEPSTITCH_CACHE"] = cache  # the user's own stays as it is
        found = measure(given.bundle, given.tokens, given.rounds, given.threads)
    settings = {"bundle": given.bundle.name, "tokens": given.tokens, "rounds": given.rounds, "threads": given.threads}
    write_report("load", {**settings, **found}, given.output)


if __name__ == "__main__":
    main()
