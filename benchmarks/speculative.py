"""What prompt-lookup speculation gains: with and without, same bundle, same run, interleaved.

    python -m benchmarks.speculative --output benchmarks/results/speculative_sample.json
    python -m benchmarks.speculative BUNDLE --tokens 256

Without BUNDLE the sample model is exported and asked held-out questions too; its answers are one to four tokens long.
``repetitive`` is greedy text written far past its end, which runs in circles; ``fresh`` is text drawn at a high
temperature, in which nothing can be guessed: its ratio shows what trying costs. Ratios are medians over ``--rounds`` of
decode seconds without and with guesses (above 1: guesses help); ``same_tokens`` says whether all answers were equal.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepstitch
from benchmarks.common import spread, write_report
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.models.sample.generator import HELD_OUT, make_episode
from deepstitch.runtime.pipeline import Pipeline
from deepstitch.runtime.results import Result

Request = tuple[Any, list[Any], dict[str, Any]]  # messages, images, options

TEXTS = (
    "Say it again and again.",
    "The red cat sat on the mat. The green cat sat on the red mat. Who sat on the mat?",
    "Count: 1 2 3 1 2 3 1 2",
)


def questions(kind: str, episodes: int) -> Iterator[Request]:
    """Held-out questions of the sample model."""
    for index in range(episodes):
        episode = make_episode(HELD_OUT, kind, index)
        prefix = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in episode.prefix
        ]
        for question in episode.questions:
            content = [*prefix, {"type": "text", "text": question.text}]
            yield [{"role": "user", "content": content}], episode.pixels(), {"max_tokens": 24}


def workloads(*, sample: bool, tokens: int) -> dict[str, list[Request]]:
    """Requests by name."""
    length = {"max_tokens": tokens, "ignore_eos": True}
    found = {
        "repetitive": [(text, [], length) for text in TEXTS],
        "fresh": [(text, [], length | {"temperature": 2.0, "seed": 1}) for text in TEXTS],
    }
    if sample:
        found |= {f"questions: {kind}": list(questions(kind, 6)) for kind in ("one", "text", "recall")}
    return found


def run(pipeline: Pipeline, requests: list[Request], speculate: int) -> list[Result]:
    """Answer all requests."""
    return [
        pipeline.generate(messages, images=images, speculate=speculate, **options)
        for messages, images, options in requests
    ]


def measure(pipeline: Pipeline, requests: list[Request], speculate: int, rounds: int) -> dict[str, Any]:
    """Interleave; the first round warms up and is dropped."""
    settings = (0, speculate)
    seconds: dict[int, list[float]] = {setting: [] for setting in settings}
    answers: dict[int, list[Result]] = {}
    for round_number in range(rounds + 1):
        for setting in settings if round_number % 2 else settings[::-1]:
            answers[setting] = run(pipeline, requests, setting)
            if round_number:
                seconds[setting].append(sum(each.timings["decode"] for each in answers[setting]))
    count = sum(each.generated_tokens - 1 for each in answers[0])
    plain, guessed = (spread(seconds[setting]) for setting in settings)
    return {
        "tokens": count,
        "same_tokens": [a.token_ids for a in answers[0]] == [b.token_ids for b in answers[speculate]],
        "drafted": sum(each.drafted_tokens for each in answers[speculate]),
        "accepted": sum(each.accepted_tokens for each in answers[speculate]),
        "tokens_per_second": {
            "without": count / max(plain["median"], 1e-9),
            "with": count / max(guessed["median"], 1e-9),
        },
        "ratio": plain["median"] / max(guessed["median"], 1e-9),
    }


def main() -> None:
    """Parse arguments, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="an exported bundle; default: the sample model")
    parser.add_argument("--speculate", type=int, default=8, help="most tokens to guess per call")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON report")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = given.bundle or _export(Path(scratch, "bundle"))
        pipeline = deepstitch.load(bundle, threads=given.threads)
        cases = {
            name: measure(pipeline, requests, given.speculate, given.rounds)
            for name, requests in workloads(sample=given.bundle is None, tokens=given.tokens).items()
        }
    settings = {"speculate": given.speculate, "rounds": given.rounds, "threads": given.threads}
    model = pipeline.manifest.model.num_parameters
    write_report("speculative", {**settings, "parameters": model, "workloads": cases}, given.output)


def _export(bundle: Path) -> Path:
    from deepstitch.export import ExportConfig, export_checkpoint

    return export_checkpoint(ExportConfig(checkpoint=CHECKPOINT, output=bundle, target="ort-cpu", progress=False))


if __name__ == "__main__":
    main()
