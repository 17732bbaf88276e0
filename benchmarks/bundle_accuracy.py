"""Held-out accuracy of an exported bundle of the sample model, through the runtime a user has.

    python -m benchmarks.bundle_accuracy --target ort-cpu --weights fp16

The questions are those of ``benchmarks/sample_accuracy.py``; here each is a chat message that the pipeline answers by
greedy generation, and counts when the text is exactly the answer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import deepstitch
from benchmarks.common import write_report
from deepstitch.export import ExportConfig, export_checkpoint
from deepstitch.models.sample.evaluate import EPISODES
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.models.sample.generator import HELD_OUT, Episode, make_episode
from deepstitch.runtime.pipeline import Pipeline


def score(pipeline: Pipeline, episode: Episode, asked: Counter[str], right: Counter[str]) -> None:
    """Ask every question of one episode by itself."""
    images = episode.pixels()
    prefix = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in episode.prefix]
    for question in episode.questions:
        content = [*prefix, {"type": "text", "text": question.text}]
        result = pipeline.generate([{"role": "user", "content": content}], images=images, max_tokens=24)
        asked[question.task] += 1
        right[question.task] += result.text.strip() == question.answer


def main() -> None:
    """Export, ask, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("portable", "ort-cpu"), default="ort-cpu")
    parser.add_argument("--weights", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--output", type=Path, help="JSON report")
    given = parser.parse_args()
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder, "bundle")
        config = ExportConfig(checkpoint=CHECKPOINT, output=bundle, target=given.target, weights=given.weights)
        pipeline = deepstitch.load(export_checkpoint(config))
        start = time.perf_counter()
        for kind, count in EPISODES.items():
            for index in tqdm(range(count), desc=kind):
                score(pipeline, make_episode(HELD_OUT, kind, index), asked, right)
        seconds = time.perf_counter() - start
    report = {
        "target": given.target,
        "weights": given.weights,
        "questions": asked.total(),
        "accuracy": right.total() / asked.total(),
        "tasks": {task: f"{right[task]}/{asked[task]}" for task in sorted(asked)},
        "seconds": round(seconds, 1),
    }
    write_report("bundle_accuracy", report, given.output)


if __name__ == "__main__":
    main()
