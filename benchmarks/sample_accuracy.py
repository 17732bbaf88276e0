"""Held-out accuracy of the shipped sample model: per task, without DeepStack, and the use of every expert.

python benchmarks/sample_accuracy.py [--json]

Exits with 1 when a promise of the model card does not hold.
"""

from __future__ import annotations

import json
import platform
import time

import click
import torch

from deepstitch.models.sample.evaluate import evaluate, load_sample


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def main(as_json: bool) -> None:
    """Evaluate the shipped checkpoint and hold the model card's promises against it."""
    start = time.perf_counter()
    report = evaluate(load_sample(), progress=not as_json)
    seconds = time.perf_counter() - start
    promises = {
        "at least 1000 questions": report.total.questions >= 1000,
        "accuracy at least 0.95": report.accuracy >= 0.95,
        "zeroed DeepStack at least 0.10 lower": report.accuracy - report.accuracy_without_deepstack >= 0.10,
        "every expert used": all(share > 0 for layer in report.expert_share for share in layer),
        "prompts of several thousand tokens": report.longest_prompt >= 3000,
    }
    if as_json:
        machine = {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        click.echo(json.dumps(json.loads(report.to_json()) | machine | {"seconds": seconds, "promises": promises}))
    else:
        click.echo(report.tables())
        size = f"longest prefix {report.longest_prompt} tokens"
        click.echo(f"\n{report.total.questions} questions in {seconds:.0f} s, {size}")
        for promise, kept in promises.items():
            click.echo(f"{'kept  ' if kept else 'BROKEN'}  {promise}")
    raise SystemExit(0 if all(promises.values()) else 1)


if __name__ == "__main__":
    main()
