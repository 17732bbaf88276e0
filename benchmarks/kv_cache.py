"""The four kinds of KV cache: what each costs in answers, bytes and time.

    python -m benchmarks.kv_cache --questions 200 --shape mid --output benchmarks/results/kv_cache.json

Answers: the sample model is exported once per kind. Every held-out question is answered by greedy generation and counts
when the text is exactly the answer; the KL divergence is that of the next-token distributions over question and answer
from those of the float32 cache, where the last tokens of each conversation are a call of their own and so read what the
cache stored. Time: a random checkpoint of ``--shape`` decodes with all four kinds in turn, from caches that hold
``--contexts`` tokens of noise, and takes in a prompt; milliseconds per token as median, minimum and maximum.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import deepstitch
from benchmarks.bundle_accuracy import score
from benchmarks.checkpoints import SHAPES, shape_config, write_random_checkpoint
from benchmarks.common import spread, write_report
from benchmarks.decoding import TextDecoder
from deepstitch.export import ExportConfig, QuantizationConfig, export_checkpoint
from deepstitch.export.compare.quality import distance
from deepstitch.export.kv_functions import KV_CACHES
from deepstitch.inspection import inspect
from deepstitch.models.sample.calibration import write_calibration
from deepstitch.models.sample.evaluate import EPISODES
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.models.sample.generator import HELD_OUT, Episode, make_episode
from deepstitch.runtime.decode import DecoderState
from deepstitch.runtime.embedding import merge
from deepstitch.runtime.pipeline import Pipeline

_POSITIONS = 16  # next-token distributions per conversation
_PROMPT = 512  # tokens of the prompt that is timed
_STEPS = 16


def export_kinds(checkpoint: Path, folder: Path, calibration: Path, weights: str) -> dict[str, Path]:
    """One bundle per kind of cache, of the same weights."""
    bundles = {}
    for kind, facts in KV_CACHES.items():
        # rtn does not look at the calibration set, and is refused one that nothing looks at
        options: dict[str, Any] = {"method": "rtn"} if weights.startswith("int") else {}
        options |= {"calibration": calibration} if facts.largest is not None else {}
        config = ExportConfig(
            checkpoint=checkpoint,
            output=folder / kind,
            weights=weights,
            kv_cache=kind,
            quantization=QuantizationConfig(**options),
            progress=False,
        )
        began = time.perf_counter()
        bundles[kind] = export_checkpoint(config)
        sys.stderr.write(f"{kind}: exported in {time.perf_counter() - began:.1f} s\n")
    return bundles


def episodes(questions: int) -> Iterator[Episode]:
    """Held-out episodes of all kinds in turn, until they hold so many questions."""
    asked = 0
    for index in itertools.count():
        for kind, count in EPISODES.items():
            if asked >= questions or index >= max(EPISODES.values()):
                return
            if index < count:
                episode = make_episode(HELD_OUT, kind, index)
                asked += len(episode.questions)
                yield episode


def answer_logits(pipeline: Pipeline, episode: Episode) -> np.ndarray:
    """Logits at the end of the first question and its answer, ``(_POSITIONS, vocab)``."""
    question = episode.questions[0]
    prefix = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in episode.prefix]
    messages = [
        {"role": "user", "content": [*prefix, {"type": "text", "text": question.text}]},
        {"role": "assistant", "content": question.answer},
    ]
    parts, model = pipeline.parts, pipeline.manifest.model
    prompt = parts.processor(messages, images=episode.pixels(), add_generation_prompt=False)
    (features,) = parts.encoder.features([prompt.vision])
    width = model.num_deepstack * model.hidden_size
    row = merge(parts.table, prompt, features, visual_ids=parts.visual_ids, deepstack_width=width)
    state = DecoderState(pipeline.engine, capacity=len(row))
    cut = max(1, len(row) - _POSITIONS)
    state.prefill([row.part(0, cut)])
    return state.prefill([row.part(cut, len(row))], wanted=[np.arange(len(row) - cut)])[0]


def measure_answers(bundles: dict[str, Path], questions: int, threads: int) -> dict[str, dict[str, Any]]:
    """Accuracy and KL divergence per kind."""
    pipelines = {kind: deepstitch.load(bundle, threads=threads) for kind, bundle in bundles.items()}
    asked: dict[str, Counter[str]] = {kind: Counter() for kind in bundles}
    right: dict[str, Counter[str]] = {kind: Counter() for kind in bundles}
    logits: dict[str, list[np.ndarray]] = {kind: [] for kind in bundles}
    for episode in tqdm(list(episodes(questions)), desc="answers", unit="episode"):
        for kind, pipeline in pipelines.items():
            score(pipeline, episode, asked[kind], right[kind])
            logits[kind].append(answer_logits(pipeline, episode))
    return {
        kind: {
            "questions": asked[kind].total(),
            "accuracy": right[kind].total() / asked[kind].total(),
            "tasks": {task: f"{right[kind][task]}/{asked[kind][task]}" for task in sorted(asked[kind])},
            "from_fp32_cache": distance(logits[kind], logits["fp32"]).to_dict(),
            "bytes_per_token": inspect(bundles[kind]).kv_bytes_per_token,
        }
        for kind in bundles
    }


def noisy_state(decoder: TextDecoder, context: int) -> DecoderState:
    """A row that holds ``context`` tokens of noise: memory that was written, unlike fresh zeros."""
    state = DecoderState(decoder.engine, capacity=context + _STEPS)
    rng = np.random.default_rng(0)
    for past, _ in state._cache.bindings(range(1)):
        for array in past.values():
            small = rng.integers(-99, 99, array.shape, np.int8)
            array[:] = small.view(np.uint8) if array.dtype == np.uint8 else small
            if array.dtype.kind == "f":
                array /= 64
    state.lengths[:] = context
    return state


def measure_time(bundles: dict[str, Path], contexts: list[int], rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Milliseconds per token, the kinds in turn; the first round warms up and is dropped."""
    decoders = {kind: TextDecoder(bundle, threads) for kind, bundle in bundles.items()}
    steps: dict[tuple[str, int], list[float]] = {(kind, context): [] for context in contexts for kind in bundles}
    prompts: dict[str, list[float]] = {kind: [] for kind in bundles}
    for context in contexts:
        states = {kind: noisy_state(decoder, context) for kind, decoder in decoders.items()}
        for number, (kind, state) in itertools.product(range(rounds + 1), states.items()):
            ids = decoders[kind].random_ids(1)
            state.truncate(0, context)
            began = time.perf_counter()
            for step in range(_STEPS):
                state.step(decoders[kind].table(ids), np.array([context + step]))
            if number:
                steps[kind, context].append(1e3 * (time.perf_counter() - began) / _STEPS)
    for number, (kind, decoder) in itertools.product(range(3), decoders.items()):
        state = DecoderState(decoder.engine, capacity=_PROMPT)
        tokens = decoder.text(decoder.random_ids(_PROMPT))
        began = time.perf_counter()
        state.prefill([tokens])
        if number:
            prompts[kind].append(1e3 * (time.perf_counter() - began) / _PROMPT)
    return {
        kind: {
            "bytes_per_token": inspect(bundle).kv_bytes_per_token,
            "decode_ms": {str(context): spread(steps[kind, context]) for context in contexts},
            f"prompt_{_PROMPT}_ms_per_token": spread(prompts[kind]),
        }
        for kind, bundle in bundles.items()
    }


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    contexts = report["contexts"] if "time" in report else []
    heads = ["cache", "accuracy", "mean KL", "largest KL", "same token"]
    heads += [f"decode at {context:,}, ms" for context in contexts] + (["prompt, ms per token"] if contexts else [])
    lines = [heads, ["---"] * len(heads)]
    for kind in KV_CACHES:
        found = report["answers"][kind]
        far = found["from_fp32_cache"]
        cells = [kind, f"{found['accuracy']:.1%}", f"{far['mean_kl']:.4f}", f"{far['max_kl']:.2f}"]
        cells.append(f"{far['top1_agreement']:.1%}")
        if contexts:
            timed = report["time"][kind]
            cells += [f"{timed['decode_ms'][str(context)]['median']:.2f}" for context in contexts]
            cells.append(f"{timed[f'prompt_{_PROMPT}_ms_per_token']['median']:.2f}")
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Export, ask, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200, help="held-out questions, about; 2000 asks all")
    parser.add_argument("--shape", choices=SHAPES, help="also measure time, on random weights of this shape")
    parser.add_argument("--weights", choices=("fp32", "fp16", "int8", "int4"), default="int8", help="of that shape")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="JSON report")
    given = parser.parse_args()
    report: dict[str, Any] = {"threads": given.threads}
    with tempfile.TemporaryDirectory() as folder:
        bundles = export_kinds(CHECKPOINT, Path(folder), write_calibration(Path(folder, "calibration")), "fp32")
        report["answers"] = measure_answers(bundles, given.questions, given.threads)
    if given.shape is not None:
        report |= {"shape": given.shape, "weights": given.weights, "contexts": given.contexts}
        with tempfile.TemporaryDirectory() as folder:
            write_random_checkpoint(shape_config(given.shape), Path(folder, "checkpoint"), dtype="BF16")
            texts = Path(folder, "texts.jsonl")
            texts.write_text(json.dumps({"prompt": "What color is the circle left of the square?"}) + "\n", "utf-8")
            bundles = export_kinds(Path(folder, "checkpoint"), Path(folder), texts, given.weights)
            report["time"] = measure_time(bundles, given.contexts, given.rounds, given.threads)
    write_report("kv_cache", report, given.output)
    sys.stderr.write(table(report))


if __name__ == "__main__":
    main()
