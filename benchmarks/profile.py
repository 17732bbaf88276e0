"""Where the time of a decoder goes, by operator: a prompt and single steps at several contexts.

    python -m benchmarks.profile BUNDLE --prompt 512 --contexts 64 2048 8192 --output benchmarks/results/profile.json

ONNX Runtime's own profile of one bundle: milliseconds per call and share of each kind of operator, of those above one
percent. Nodes inside a branch are counted, the branch itself is not. Caches are filled with noise, not with a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.common import write_report
from deepstitch.runtime.bundle import DECODER, Bundle

_CONTROL_FLOW = ("If", "Loop", "Scan")
_LEAST_SHARE = 0.01


def inputs_of(bundle: Bundle, past: int, new: int) -> dict[str, np.ndarray]:
    """Random feeds for ``new`` tokens over ``past`` cached ones."""
    random, sizes = np.random.default_rng(0), {"B": 1, "S": new, "L": 1, "R": 1}
    values: dict[str, np.ndarray] = {}
    for spec in bundle.graph(DECODER).inputs:
        shape = [size if isinstance(size, int) else sizes.get(size, past + new) for size in spec.shape]
        values[spec.name] = np.zeros(shape, spec.dtype)
        if spec.dtype == "float32" and spec.name != "deepstack_embeds":
            values[spec.name] = random.standard_normal(shape, dtype=np.float32)
    values["past_lengths"][:], values["query_lengths"][:], values["logit_index"][:] = past, new, new - 1
    values["position_ids"][:] = past + np.arange(new)
    return values


def profile(bundle: Bundle, past: int, new: int, *, calls: int, threads: int) -> dict[str, Any]:
    """Milliseconds per call by operator."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = ort.InferenceSession(str(bundle.graph_path(DECODER)), options, providers=["CPUExecutionProvider"])
        binding, values = session.io_binding(), inputs_of(bundle, past, new)
        for name, value in values.items():
            binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        for output in session.get_outputs():
            cached = values.get(output.name.replace("present.", "past_key_values."))
            if cached is None:
                binding.bind_output(output.name, "cpu")
            else:  # in place, as the runtime does
                binding.bind_output(output.name, "cpu", 0, cached.dtype.type, cached.shape, cached.ctypes.data)
        for _ in range(1 + calls):
            session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return summary(events, calls)


def summary(events: list[dict[str, Any]], calls: int) -> dict[str, Any]:
    """Of ONNX Runtime's events, those of kernels; the first call is left out."""
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    spent: Counter[str] = Counter()
    for event in events:
        name = event.get("args", {}).get("op_name", "")
        if event["name"].endswith("_kernel_time") and event["ts"] >= runs[1] and name not in _CONTROL_FLOW:
            spent[name] += event["dur"] / 1000 / calls
    total = sum(spent.values())
    shown = {name: each for name, each in spent.most_common() if each >= _LEAST_SHARE * total}
    return {"ms": total, "operators": {name: {"ms": each, "share": each / total} for name, each in shown.items()}}


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an exported bundle for ort-cpu")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 2048, 8192])
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON report")
    given = parser.parse_args()
    bundle = Bundle.open(given.bundle)
    found = {f"prompt of {given.prompt}": profile(bundle, 0, given.prompt, calls=2, threads=given.threads)}
    for context in given.contexts:
        found[f"one token at {context}"] = profile(bundle, context, 1, calls=given.calls, threads=given.threads)
    settings = {"bundle": given.bundle.name, "threads": given.threads, "weights": bundle.manifest.weights}
    write_report("profile", {**settings, "calls": found}, given.output)


if __name__ == "__main__":
    main()
