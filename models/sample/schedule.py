"""What to train on when: the curriculum, and the memory-aware schedule of micro-batches."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from deepstitch.models.sample.generator import TRAIN, Episode, draw_sizes, make_episode
from deepstitch.models.sample.packing import Batch, pack

# Share of micro-batches per kind, at these fractions of the run and linear in between. Long inputs come last:
# they are the most expensive, and teach nothing before short ones are understood.
_MILESTONES = (0.08, 0.4, 0.6)
_SHARES = {
    "one": (0.76, 0.46, 0.43),
    "several": (0.06, 0.28, 0.26),
    "album": (0.0, 0.06, 0.06),
    "album-long": (0.0, 0.0, 0.03),
    "text": (0.06, 0.08, 0.08),
    "recall": (0.12, 0.12, 0.11),
    "recall-long": (0.0, 0.0, 0.03),
}

# Filler sentences of "recall" texts; the last lead up to the long texts.
_FILLERS = (0, 2, 6, 15, 40, 80, 150, 250)

# Bytes that training keeps per token (forward activations for the backward pass), measured with fp32
# activations.
BYTES_PER_TEXT_TOKEN = 120_000
BYTES_PER_PATCH = 60_000
CHECKPOINTED_FRACTION = 0.2

_TEXT_TOKENS = {
    "one": 100,
    "several": 110,
    "album": 80,
    "album-long": 200,
    "text": 130,
    "recall": 75,
    "recall-long": 3000,
}


# Strides of the numbering that gives every episode of a run its own seed.
_MOST_BATCHES, _MOST_PROCESSES, _MOST_EPISODES = 8, 16, 256


@dataclass(slots=True, kw_only=True, frozen=True)
class MemoryPlan:
    """How much one micro-batch may hold.

    Attributes:
        limit_bytes: Activation memory a micro-batch of one process may keep.
        step_bytes: Activation bytes a process sees per optimizer step, over its micro-batches.
    """

    limit_bytes: int
    step_bytes: int


def activation_bytes(kind: str, sizes: list[tuple[int, int]], fillers: int = 0) -> int:
    """Estimates the activation memory of one episode, without gradient checkpointing."""
    patches = sum(height * width // 256 for height, width in sizes)
    tokens = _TEXT_TOKENS[kind] + patches // 4 + 6 * len(sizes) + 11 * fillers
    return tokens * BYTES_PER_TEXT_TOKEN + patches * BYTES_PER_PATCH


def batch_bytes(batch: Batch) -> int:
    """Estimates the activation memory of a batch, without gradient checkpointing."""
    patches = sum(len(group.rows) * 4 for group in batch.vision)
    return int(batch.input_ids.size) * BYTES_PER_TEXT_TOKEN + patches * BYTES_PER_PATCH


def shares(progress: float) -> dict[str, float]:
    """Returns the share of micro-batches per kind; `progress` is the elapsed fraction of the run."""
    return {kind: float(np.interp(progress, _MILESTONES, values)) for kind, values in _SHARES.items()}


def micro_batch(plan: MemoryPlan, weights: dict[str, float], number: int, rank: int) -> tuple[Batch, int]:
    """Makes a training micro-batch.

    Args:
        plan: Memory limits; an episode that exceeds them alone becomes a batch of one, to be checkpointed.
        weights: Share of each kind to draw from.
        number: Counts micro-batches over the whole run; decides kind, picture sizes and, with `rank`, the
            seeds.
        rank: Which process; all processes get the same kind and sizes, so that they finish together.

    Returns:
        The batch and its estimated activation bytes.
    """
    rng = random.Random(number)
    kind = rng.choices(list(weights), list(weights.values()))[0]
    has_pictures = kind in ("one", "several", "album", "album-long")
    sizes = draw_sizes(rng, kind) if has_pictures else []
    fillers = rng.choice(_FILLERS) if kind == "recall" else 0
    size_bytes = activation_bytes(kind, sizes, fillers)
    count = max(1, min(_MOST_EPISODES, plan.limit_bytes // size_bytes))
    first = (number * _MOST_PROCESSES + rank) * _MOST_EPISODES
    episodes: list[Episode] = [
        make_episode(TRAIN, kind, first + index, sizes=sizes or None, fillers=fillers) for index in range(count)
    ]
    return pack(episodes), count * size_bytes


def training_step(plan: MemoryPlan, progress: float, step: int, rank: int) -> list[Batch]:
    """Makes the micro-batches of one optimizer step of one process.

    The first shows one or several pictures, so that no step rests on a few long inputs alone; the others
    follow the curriculum, until `plan.step_bytes` are filled.
    """
    weights = shares(progress)
    pictures = {kind: weights[kind] for kind in ("one", "several")}
    batches: list[Batch] = []
    total = 0
    while len(batches) < 2 or (total < plan.step_bytes and len(batches) < _MOST_BATCHES):
        number = step * _MOST_BATCHES + len(batches)
        batch, size = micro_batch(plan, weights if batches else pictures, number, rank)
        batches.append(batch)
        total += size
    return batches
