"""Scales of an integer KV cache, from what calibration prompts put into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from deepstitch.export.kv_functions import KV_CACHES, CacheKind
from deepstitch.export.quantize.calibration import CalibrationSet
from deepstitch.export.quantize.walk import LayerWalk
from deepstitch.models import ops
from deepstitch.models.checkpoint import Checkpoint, WeightSource
from deepstitch.models.config import TextConfig

if TYPE_CHECKING:
    from deepstitch.export.exporter import ExportConfig

__all__ = ["KVRecorder", "KVScales", "cache_scales", "measure_scales"]

Floats = npt.NDArray[np.float32]

_INT8 = 127
_MARGIN = 1.2  # int8 has steps to spare: values up to a fifth larger than any seen are not cut off
# int4 has none: what is cut off is weighed against the size of a step, over these fractions of the largest value. The
# fourth power of the error was measured to lose less than the square, which cuts off too much.
_FRACTIONS = tuple(np.linspace(0.3, 1.0, 29).tolist())
_MOST_TOKENS = 4096  # per layer, for that search
_SMALLEST = 1e-6  # of a channel that is always zero


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScales:
    """One scale per key/value head and channel of every layer.

    Attributes:
        keys: per layer ``[1, Hkv, 1, D]`` float32.
        values: likewise.
        tokens: calibration tokens they come from.
    """

    keys: tuple[Floats, ...]
    values: tuple[Floats, ...]
    tokens: int

    def scale(self, layer: int, part: str) -> Floats:
        """The scale of ``key`` or ``value`` of one layer."""
        return (self.keys if part == "key" else self.values)[layer]


class KVRecorder:
    """Stands in for :class:`deepstitch.models.text.KVCache`: whole prompts attend to themselves and are kept."""

    def __init__(self, config: TextConfig) -> None:
        self._heads = config.num_attention_heads, config.num_key_value_heads
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally; arguments and result as for the cache."""
        for kept, new in ((self._keys, key), (self._values, value)):
            kept.append(new.unflatten(-1, (self._heads[1], -1)).flatten(0, 1))
        return ops.causal_attention(query, key, value, *self._heads, None)

    def take(self) -> tuple[Tensor, Tensor]:
        """Keys and values since the last time, each ``[tokens, Hkv, D]``."""
        taken = torch.cat(self._keys), torch.cat(self._values)
        self._keys.clear()
        self._values.clear()
        return taken


def measure_scales(walk: LayerWalk, config: TextConfig, kind: CacheKind, *, progress: bool) -> KVScales:
    """Run the prompts through the model, one layer in memory at a time.

    Args:
        walk: the prompts; it is started here.
        config: of the decoder.
        kind: int8 or int4.
        progress: show a bar on stderr.
    """
    recorder = KVRecorder(config)
    keys, values, tokens = [], [], 0
    walk.start()
    for index in tqdm(range(walk.num_layers), desc="KV cache scales", unit="layer", disable=None if progress else True):
        with walk.layer(index) as layer:
            walk.advance(index, walk.outputs(layer, recorder))
        key, value = recorder.take()
        tokens = len(key)
        keys.append(_scale(key, _largest_of_pairs(key), kind))
        values.append(_scale(value, value.abs().amax(0), kind))
    return KVScales(keys=tuple(keys), values=tuple(values), tokens=tokens)


def _largest_of_pairs(key: Tensor) -> Tensor:
    """What a key channel can reach at any position: the largest length of the pair of channels that is rotated."""
    first, second = key.chunk(2, dim=-1)
    largest = torch.hypot(first, second).amax(0)
    return torch.cat((largest, largest), dim=-1)  # (Hkv, D)


def _scale(found: Tensor, largest: Tensor, kind: CacheKind) -> Floats:
    """``[1, Hkv, 1, D]`` for values ``[tokens, Hkv, D]`` that reach ``largest [Hkv, D]``."""
    assert kind.largest is not None
    steps = largest.clamp_min(_SMALLEST) / kind.largest
    scale = steps * (_MARGIN if kind.largest == _INT8 else _best_fraction(found, steps, kind.largest))
    return scale[None, :, None].contiguous().numpy()


def _best_fraction(found: Tensor, steps: Tensor, limit: int) -> Tensor:
    """The fraction of ``steps`` that leaves the least error to the fourth power, per channel."""
    found = found[:: -(-len(found) // _MOST_TOKENS)]
    best = torch.full_like(steps, torch.inf)
    fraction = torch.ones_like(steps)
    for each in _FRACTIONS:
        scale = steps * each
        error = (found / scale).round_().clamp_(-limit - 1, limit).mul_(scale).sub_(found).pow_(4).sum(0)
        fraction = torch.where(error < best, each, fraction)
        best = torch.minimum(error, best)
    return fraction


def cache_scales(
    config: ExportConfig,
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    calibration: CalibrationSet | None,
) -> KVScales | None:
    """Measure what the export needs; None for a floating-point cache.

    Args:
        config: of the export.
        checkpoint: its checkpoint.
        sources: the checkpoint's weights.
        calibration: the calibration set, where it has been read before.

    Raises:
        InputError: the calibration set cannot be used.
    """
    kind = KV_CACHES[config.kv_cache]
    path = config.quantization.calibration
    if kind.largest is None or path is None:
        return None
    prompts = (calibration or CalibrationSet.open(path, checkpoint)).prompts
    walk = LayerWalk(checkpoint.config, sources, prompts)
    return measure_scales(walk, checkpoint.config.text, kind, progress=config.progress)
