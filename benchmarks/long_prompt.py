"""Peak memory and prompt speed against prompt length, whole prompts and chunks, each in a process of its own.

    python -m benchmarks.long_prompt BUNDLE --tokens 2048 8192 --chunk 0 256 512 1024
    python -m benchmarks.long_prompt BUNDLE --tokens 32768 --chunk 512 --packed-cache

Random token ids go through the decoder as a prompt does. Reported per length and chunk (0: all at once): tokens per
second, peak resident memory, what of it the bundle's files are (pages of weights in use, which the system can drop),
the bytes of the KV cache, and the peak over those and the weights the decoder has to hold (its own and the token
embedding; the vision encoder is not loaded). ``--max-gib`` skips what would need more memory: a child over it is ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import write_report
from benchmarks.decoding import TextDecoder
from deepstitch.runtime.decode import DecoderState


def resident() -> dict[str, int]:
    """Peak and present resident bytes of this process, by kind."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak_rss": "VmHWM", "rss": "VmRSS", "anonymous": "RssAnon", "files": "RssFile"}
    return {name: int(fields[key].split()[0]) * 1024 for name, key in names.items()}


def child(bundle: Path, tokens: int, chunk: int, threads: int, packed_cache: bool) -> dict[str, Any]:
    """Load, feed one prompt, report."""
    began = time.perf_counter()
    decoder = TextDecoder(bundle, threads, packed_cache=packed_cache)
    loaded = time.perf_counter() - began
    after_load = resident()
    prompt = decoder.text(decoder.random_ids(tokens))
    state = DecoderState(decoder.engine, capacity=tokens)
    began = time.perf_counter()
    state.prefill([prompt], chunk=chunk or None)
    seconds = time.perf_counter() - began
    return {
        "load_seconds": loaded,
        "after_load": after_load,
        "prefill_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "kv_cache_bytes": state.cache_bytes,
        **resident(),
    }


def run(given: argparse.Namespace, tokens: int, chunk: int) -> dict[str, Any]:
    """One child process; a failure is a result too."""
    arguments = [str(given.bundle), "--child", str(tokens), str(chunk), "--threads", str(given.threads)]
    if given.packed_cache:
        arguments.append("--packed-cache")
    limit = int(given.max_gib * 2**30)

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # anonymous memory; mapped files do not count

    command = [sys.executable, "-m", "benchmarks.long_prompt", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=bound)
    if finished.returncode:
        return {"failed": (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1][-200:]}
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def decoder_bytes(bundle: Path) -> int:
    """Stored bytes of the decoder and the token embedding."""
    from benchmarks.peers.traffic import tensor_bytes, text_bytes  # here: a child whose memory counts has no need of it

    return text_bytes(tensor_bytes("deepstitch", "", {"bundle": str(bundle)}))


def per_weights_and_kv(found: dict[str, Any], weights: int) -> dict[str, float]:
    """Peak memory of a run over what it has to hold at least; nothing for a run that failed."""
    return (
        {"per_weights_and_kv": found["peak_rss"] / (weights + found["kv_cache_bytes"])} if "peak_rss" in found else {}
    )


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an exported bundle")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--chunk", type=int, nargs="+", default=[0, 512])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--packed-cache", action="store_true", help="as of deepstitch run")
    parser.add_argument("--max-gib", type=float, default=16.0, help="most anonymous memory of a child")
    parser.add_argument("--output", type=Path, help="JSON report")
    parser.add_argument("--child", type=int, nargs=2, metavar=("TOKENS", "CHUNK"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        sys.stdout.write(json.dumps(child(given.bundle, *given.child, given.threads, given.packed_cache)))
        return
    weights = decoder_bytes(given.bundle)
    runs = []
    for tokens, chunk in itertools.product(given.tokens, given.chunk):
        found = run(given, tokens, chunk)
        runs.append({"tokens": tokens, "chunk": chunk, **found, **per_weights_and_kv(found, weights)})
    settings = {"bundle": given.bundle.name, "weight_bytes": weights, "threads": given.threads}
    settings["packed_cache"] = given.packed_cache
    write_report("long_prompt", {**settings, "runs": runs}, given.output)


if __name__ == "__main__":
    main()
