"""What rounding cost: a bundle's next-token distributions against those of the checkpoint's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from deepstitch.export.compare.stages import Floats
from deepstitch.export.quantize.calibration import CalibrationSet
from deepstitch.export.quantize.walk import LayerWalk
from deepstitch.models.checkpoint import Checkpoint, WeightSource
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.decode import DecoderState
from deepstitch.runtime.embedding import merge
from deepstitch.runtime.pipeline import Pipeline
from deepstitch.runtime.preprocess import Prompt
from deepstitch.runtime.sampling import log_probabilities

__all__ = ["Quality", "checkpoint_logits", "distance", "measure_quality"]

_POSITIONS = 16  # the last ones of each conversation: its answer, if it has one
_HEAD_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Distance between two models on some conversations.

    Attributes:
        conversations: how many.
        positions: next-token distributions compared.
        mean_kl: mean Kullback-Leibler divergence of the bundle from the checkpoint, in nats.
        max_kl: largest one.
        top1_agreement: share of positions with the same most probable token.
    """

    conversations: int
    positions: int
    mean_kl: float
    max_kl: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_quality(
    bundle: Bundle, checkpoint: Path, conversations: Path, *, expert_layout: str | None = None, progress: bool = True
) -> Quality:
    """Compare a bundle with the float32 model on conversations.

    The model runs layer by layer, so that its size does not matter; the bundle runs as a user runs it.

    Args:
        bundle: opened.
        checkpoint: the folder it was exported from.
        conversations: a file as for ``deepstitch export --calibration``; better not the same one.
        expert_layout: where the shapes of the experts cannot tell.
        progress: show bars on stderr.

    Raises:
        InputError: the conversations cannot be used.
        CheckpointError: the checkpoint is damaged.
    """
    opened = Checkpoint.open(checkpoint)
    prompts = CalibrationSet.open(conversations, opened).prompts
    wanted = [np.arange(max(0, len(prompt.input_ids) - _POSITIONS), len(prompt.input_ids)) for prompt in prompts]
    sources = opened.sources(expert_layout=expert_layout)
    expected = checkpoint_logits(opened, sources, prompts, wanted, progress=progress)
    pipeline = Pipeline.open(bundle, verify="size", progress=progress)
    disable = None if progress else True
    actual = [
        bundle_logits(pipeline, prompt, positions)
        for prompt, positions in tqdm(zip(prompts, wanted, strict=True), "bundle", len(prompts), disable=disable)
    ]
    return distance(actual, expected)


def distance(actual: Sequence[Floats], expected: Sequence[Floats]) -> Quality:
    """Compare logits ``(n, vocab)`` of a candidate and of the reference, per conversation."""
    divergences, same = [], 0
    for mine, true in zip(actual, expected, strict=True):
        for row, true_row in zip(mine, true, strict=True):
            log_true = log_probabilities(true_row)
            divergences.append(float((np.exp(log_true) * (log_true - log_probabilities(row))).sum()))
            same += int(row.argmax() == true_row.argmax())
    return Quality(
        conversations=len(expected),
        positions=len(divergences),
        mean_kl=float(np.mean(divergences)),
        max_kl=float(np.max(divergences)),
        top1_agreement=same / len(divergences),
    )


def checkpoint_logits(
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    prompts: Sequence[Prompt],
    wanted: Sequence[np.ndarray[Any, Any]],
    *,
    progress: bool,
) -> list[Floats]:
    """Logits of the checkpoint in float32, ``(len(wanted), vocab)`` per prompt, one layer in memory at a time."""
    walk = LayerWalk(checkpoint.config, sources, prompts)
    walk.start()
    for index in tqdm(range(walk.num_layers), desc="checkpoint", unit="layer", disable=None if progress else True):
        with walk.layer(index) as layer:
            walk.advance(index, walk.outputs(layer))
    hidden = [rows[0, picks] for rows, picks in zip(walk.final_hidden(), wanted, strict=True)]
    head = sources.get("lm_head.weight") or sources[walk.embedding]
    steps = range(0, head.shape[0], _HEAD_ROWS)
    parts = [torch.from_numpy(head.read_float32(start, start + _HEAD_ROWS)) for start in steps]
    return [torch.cat([rows @ part.T for part in parts], dim=-1).numpy() for rows in hidden]


def bundle_logits(pipeline: Pipeline, prompt: Prompt, wanted: np.ndarray[Any, Any]) -> Floats:
    """Logits of a bundle at some positions of a prompt."""
    parts, model = pipeline.parts, pipeline.manifest.model
    (features,) = parts.encoder.features([prompt.vision])
    row = merge(
        parts.table,
        prompt,
        features,
        visual_ids=parts.visual_ids,
        deepstack_width=model.num_deepstack * model.hidden_size,
    )
    state = DecoderState(pipeline.engine, capacity=len(prompt.input_ids))
    return state.prefill([row], wanted=[wanted])[0]
