"""Scores a checkpoint of the sample model on held-out questions.

    python -m deepstitch.models.sample.evaluate [CHECKPOINT] [--share S] [--json]

Exact match: a question counts when greedy decoding would write its answer and the end token, nothing else.
That is so exactly when the arg-max is right at every answer position given the true tokens before it, so one
forward pass decides it for all questions of a batch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from deepstitch.models.build import load_model
from deepstitch.models.sample.files import CHECKPOINT, round_to_bfloat16
from deepstitch.models.sample.forward import gates, run
from deepstitch.models.sample.generator import HELD_OUT, make_episode
from deepstitch.models.sample.packing import Batch, pack
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration

# Held-out episodes per kind: about 1,500 questions.
EPISODES = {
    "one": 150,
    "several": 60,
    "album": 16,
    "album-long": 10,
    "text": 12,
    "recall": 20,
    "recall-long": 16,
}
# Episodes that run as one batch.
_BATCH = {"one": 16, "several": 10, "album": 4, "album-long": 1, "text": 12, "recall": 4, "recall-long": 1}


@dataclass(slots=True, kw_only=True)
class Score:
    """Questions asked, and answered exactly, with and without DeepStack rows."""

    questions: int = 0
    correct: int = 0
    correct_without_deepstack: int = 0

    def add(self, correct: bool, without: bool) -> None:
        """Counts one question."""
        self.questions += 1
        self.correct += correct
        self.correct_without_deepstack += without


@dataclass(slots=True, kw_only=True)
class Report:
    """Results of an evaluation.

    Attributes:
        tasks: Score per task.
        total: Score over all questions.
        expert_share: Per decoder layer, each expert's share of the routed tokens; a row sums to 1.
        longest_prompt: Tokens of the longest prefix scored.
    """

    tasks: dict[str, Score] = field(default_factory=dict)
    total: Score = field(default_factory=Score)
    expert_share: list[list[float]] = field(default_factory=list)
    longest_prompt: int = 0

    @property
    def accuracy(self) -> float:
        """Share of all questions answered exactly."""
        return self.total.correct / self.total.questions

    @property
    def accuracy_without_deepstack(self) -> float:
        """The same with zeroed DeepStack rows."""
        return self.total.correct_without_deepstack / self.total.questions

    def tables(self) -> str:
        """Returns the tables of the model card, in Markdown."""
        lines = ["| task | questions | exact match | DeepStack rows zeroed |", "|---|---|---|---|"]
        for name, score in [*sorted(self.tasks.items()), ("**all**", self.total)]:
            right, without = (100 * n / score.questions for n in (score.correct, score.correct_without_deepstack))
            lines.append(f"| {name} | {score.questions} | {right:.1f} % | {without:.1f} % |")
        header = " | ".join(f"expert {index}" for index in range(len(self.expert_share[0])))
        lines += ["", f"| layer | {header} |", "|---" * (len(self.expert_share[0]) + 1) + "|"]
        for layer, expert_shares in enumerate(self.expert_share):
            lines.append(f"| {layer} | " + " | ".join(f"{100 * share:.1f} %" for share in expert_shares) + " |")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Returns the report as one JSON object."""
        return json.dumps(
            asdict(self) | {"accuracy": self.accuracy, "accuracy_without_deepstack": self.accuracy_without_deepstack}
        )


class _ExpertCounter:
    """Counts how many real tokens each expert of each layer receives."""

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration) -> None:
        config = model.config.text
        self.top_k = config.num_experts_per_tok
        self.counts = torch.zeros(config.num_hidden_layers, config.num_experts)
        self.real = torch.zeros(0, dtype=torch.bool)
        self._handles = [gate.register_forward_hook(self._hook(index)) for index, gate in enumerate(gates(model))]

    def _hook(self, index: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def count(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
            chosen = logits.flatten(0, -2)[self.real].topk(self.top_k, dim=-1).indices
            self.counts[index] += chosen.flatten().bincount(minlength=self.counts.shape[1])

        return count

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def held_out_batches(episodes: Mapping[str, int]) -> Iterator[Batch]:
    """Yields held-out episodes as batches; `episodes` says how many of each kind."""
    for kind, count in episodes.items():
        for start in range(0, count, _BATCH[kind]):
            indices = range(start, min(start + _BATCH[kind], count))
            yield pack([make_episode(HELD_OUT, kind, index) for index in indices])


def correct_questions(model: Qwen3VLMoeForConditionalGeneration, batch: Batch, *, use_deepstack: bool) -> list[bool]:
    """Returns for each question of a batch whether its whole answer is right."""
    predicted = run(model, batch, use_deepstack=use_deepstack).logits.argmax(-1)
    wrong = predicted != torch.from_numpy(batch.targets)
    right = torch.ones(len(batch.tasks), dtype=torch.bool)
    right[torch.from_numpy(batch.questions)[wrong]] = False
    return right.tolist()


@torch.no_grad()
def evaluate(
    model: Qwen3VLMoeForConditionalGeneration,
    episodes: Mapping[str, int] = MappingProxyType(EPISODES),
    *,
    progress: bool = False,
) -> Report:
    """Scores a model on held-out questions.

    Args:
        model: The model, with the weights to be judged (bf16-rounded, for the shipped ones).
        episodes: How many episodes of each kind.
        progress: Show a bar on stderr.
    """
    model.eval()
    report = Report()
    scores: defaultdict[str, Score] = defaultdict(Score)
    counter = _ExpertCounter(model)
    try:
        for batch in tqdm(held_out_batches(episodes), disable=not progress, unit="batch"):
            counter.real = torch.from_numpy(batch.segments >= 0).flatten()
            right = correct_questions(model, batch, use_deepstack=True)
            counter.real = torch.zeros_like(counter.real)  # the ablation does not count
            without = correct_questions(model, batch, use_deepstack=False) if batch.vision else right
            for task, one, other in zip(batch.tasks, right, without, strict=True):
                scores[task].add(one, other)
                report.total.add(one, other)
            report.longest_prompt = max(report.longest_prompt, int((batch.segments == 0).sum(1).max()))
    finally:
        counter.close()
    report.tasks = dict(scores)
    report.expert_share = (counter.counts / counter.counts.sum(1, keepdim=True)).tolist()
    return report


def load_sample(folder: Path = CHECKPOINT) -> Qwen3VLMoeForConditionalGeneration:
    """Loads a checkpoint of the sample model in fp32 (the stored weights are bf16)."""
    model = load_model(folder)
    assert isinstance(model, Qwen3VLMoeForConditionalGeneration)
    round_to_bfloat16(model)
    return model


@click.command(help=__doc__)
@click.argument("checkpoint", default=CHECKPOINT, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--share", default=1.0, show_default=True, help="Share of the held-out episodes to score.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def main(checkpoint: Path, share: float, as_json: bool) -> None:
    """Runs the command line."""
    episodes = {kind: max(1, round(count * share)) for kind, count in EPISODES.items()}
    report = evaluate(load_sample(checkpoint), episodes, progress=not as_json)
    click.echo(report.to_json() if as_json else report.tables())


if __name__ == "__main__":
    main()
