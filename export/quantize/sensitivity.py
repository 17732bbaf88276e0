"""How much each part of the decoder suffers from fewer bits, measured on calibration prompts.

One group at a time is rounded while everything else stays exact, and the damage is read where the group's layer hands
over to the next one: the mean over all tokens of ``|h' - h|² / |h|²``. Only one layer is in memory at a time. Damages
of different groups are taken to add up.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepstitch.blockwise import WeightFormat
from deepstitch.export.quantize.recipe import Group, is_expert
from deepstitch.export.quantize.rounding import round_to_nearest
from deepstitch.export.quantize.walk import ExpertStack, LayerWalk, QuantizedStack, StackedExperts
from deepstitch.models.checkpoint import WeightSource
from deepstitch.runtime.verify import cache_folder

__all__ = ["Sensitivity", "cache_file", "load_or_measure", "measure"]

Sensitivity = dict[str, dict[int, float]]
"""Group name → bits → damage."""
_ROWS = 4096  # of the vocabulary at a time


def cache_file(work: str) -> Path:
    """Where a measurement is kept: the user's cache folder."""
    return cache_folder() / f"sensitivity-{work}.json"


def load_or_measure(path: Path, wanted: Mapping[str, Iterable[int]], take: Callable[[], Sensitivity]) -> Sensitivity:
    """Read an earlier measurement; take and keep it where there is none, or none that can be used.

    Args:
        path: the file, see :func:`cache_file`.
        wanted: bits by group, what a measurement must hold.
        take: measures.
    """
    earlier = _read(path, wanted)
    if earlier is not None:
        return earlier
    found = take()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(found), "utf-8")
    temporary.replace(path)
    return found


def _read(path: Path, wanted: Mapping[str, Iterable[int]]) -> Sensitivity | None:
    """An earlier measurement; None where the file is missing, damaged or of something else."""
    try:
        raw = json.loads(path.read_text("utf-8"))
        found = {group: {bits: float(raw[group][str(bits)]) for bits in widths} for group, widths in wanted.items()}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    finite = all(math.isfinite(damage) for by_bits in found.values() for damage in by_bits.values())
    return found if finite and raw.keys() == found.keys() else None


def measure(
    walk: LayerWalk,
    sources: Mapping[str, WeightSource],
    groups: Iterable[Group],
    formats: Mapping[int, Mapping[str, WeightFormat]],
    progress: Callable[[int], object],
) -> Sensitivity:
    """Take the measurement.

    Args:
        walk: calibration prompts, not started.
        sources: every parameter.
        groups: what to measure.
        formats: by bits, the format of every parameter.
        progress: called with the number of groups just measured.
    """
    walk.start()
    by_layer: dict[int, list[Group]] = {}
    found: Sensitivity = {}
    outside = []
    for group in groups:
        if group.name.startswith("layers."):
            by_layer.setdefault(int(group.name.split(".")[1]), []).append(group)
        else:
            outside.append(group)
    for group in outside:
        if group.name == "embedding":
            found[group.name] = {bits: _table_damage(walk, sources, group, stored) for bits, stored in formats.items()}
            progress(1)
    for index in range(walk.num_layers):
        with walk.layer(index) as layer:
            exact = walk.outputs(layer)
            for group in by_layer.get(index, []):
                found[group.name] = {}
                for bits, stored in formats.items():
                    with _rounded(layer, walk.layer_prefix(index), group, stored):
                        found[group.name][bits] = _damage(walk.outputs(layer), exact)
                progress(1)
            walk.advance(index, exact)
    head = next((group for group in outside if group.name == "lm_head"), None)
    hidden = torch.cat([rows.flatten(0, -2) for rows in walk.final_hidden()])
    for group in [head] if head is not None else outside:  # a tied head is the embedding
        (name,) = group.parameters
        damages = {bits: _head_damage(hidden, sources[name], stored[name]) for bits, stored in formats.items()}
        earlier = found.get(group.name, dict.fromkeys(damages, 0.0))
        found[group.name] = {bits: earlier[bits] + damage for bits, damage in damages.items()}
    return found


def _damage(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Mean over tokens of the squared relative error."""
    errors = [
        ((a - e).square().sum(-1) / e.square().sum(-1).clamp(min=1e-20)).flatten()
        for a, e in zip(actual, exact, strict=True)
    ]
    return float(torch.cat(errors).mean())


@contextmanager
def _rounded(layer: nn.Module, prefix: str, group: Group, formats: Mapping[str, WeightFormat]) -> Iterator[None]:
    """Round one group's weights for a while."""
    modules: Any = dict(layer.named_modules())
    if is_expert(group.parameters[0]):
        experts = modules["mlp"].experts
        stacks = [
            _round_stack(getattr(experts, name.rsplit(".", 1)[1]), formats[name])
            for name in sorted(group.parameters, key=lambda name: name.endswith("down_proj"))
        ]
        modules["mlp"].experts = StackedExperts(*stacks)
        try:
            yield
        finally:
            modules["mlp"].experts = experts
        return
    weights = {name: modules[name.removeprefix(prefix).removesuffix(".weight")].weight for name in group.parameters}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(round_to_nearest(weight.detach(), formats[name]).dequantized())
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


def _round_stack(stack: ExpertStack, stored: WeightFormat) -> QuantizedStack:
    rounded = QuantizedStack(stored, (len(stack), *stack[0].T.shape))
    for expert in range(len(stack)):
        rounded.put(expert, round_to_nearest(stack[expert].T.contiguous(), stored))
    return rounded


def _table_damage(
    walk: LayerWalk, sources: Mapping[str, WeightSource], group: Group, formats: Mapping[str, WeightFormat]
) -> float:
    """Error of the token embeddings that the prompts use, each as often as it is used."""
    (name,) = group.parameters
    ids, counts = np.unique(np.concatenate(walk.token_ids()), return_counts=True)
    rows = torch.from_numpy(np.concatenate([sources[name].read_float32(int(i), int(i) + 1) for i in ids]))
    rounded = round_to_nearest(rows, formats[name]).dequantized()
    errors = (rounded - rows).square().sum(-1) / rows.square().sum(-1).clamp(min=1e-20)
    return float((errors * torch.from_numpy(counts)).sum() / counts.sum())


def _head_damage(hidden: Tensor, source: WeightSource, stored: WeightFormat) -> float:
    """Error of the logits; their mean says nothing and is left out of the norm."""
    wrong, total, power = (torch.zeros(len(hidden), dtype=torch.double) for _ in range(3))
    for start in range(0, source.shape[0], _ROWS):
        weight = torch.from_numpy(source.read_float32(start, start + _ROWS))
        logits = (hidden @ weight.T).double()
        rounded = (hidden @ round_to_nearest(weight, stored).dequantized().T).double()
        wrong += (rounded - logits).square().sum(-1)
        total += logits.sum(-1)
        power += logits.square().sum(-1)
    return float((wrong / (power - total.square() / source.shape[0]).clamp(min=1e-20)).mean())
