"""Outputs of the vision encoder, kept by content: the same picture is encoded once, whoever asks again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deepstitch.memory_estimate import KEPT_PICTURES
from deepstitch.runtime.engine.memory import Tensor
from deepstitch.runtime.preprocess import VisionBatch

__all__ = ["EncoderCache", "VisionFeatures"]

Encode = Callable[[VisionBatch], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """Encoder outputs of one image or clip, where the encoder left them: on the host or on a device.

    Attributes:
        image_embeds: ``(T, H)`` float32.
        deepstack_embeds: ``(T, num_deepstack*H)`` float32.
    """

    image_embeds: Tensor
    deepstack_embeds: Tensor

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.image_embeds.nbytes + self.deepstack_embeds.nbytes


class EncoderCache:
    """Least-recently-used cache in front of a vision encoder.

    Attributes:
        hits: items answered from memory so far.
        misses: items encoded so far.
    """

    def __init__(self, encode: Encode, max_bytes: int = KEPT_PICTURES) -> None:
        """Put a cache in front of ``encode``; ``max_bytes`` 0 keeps nothing."""
        self._encode = encode
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, VisionFeatures] = OrderedDict()
        self._nbytes = 0
        self.hits = 0
        self.misses = 0

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._nbytes

    def features(self, batches: Sequence[VisionBatch | None]) -> list[list[VisionFeatures]]:
        """Encoder outputs of every item of every batch; all that are missing are encoded in one call."""
        found: dict[str, VisionFeatures] = {}
        missing: dict[str, VisionBatch] = {}
        for batch in filter(None, batches):
            for item, key in enumerate(batch.content_keys):
                if key in self._entries:
                    found[key] = self._entries[key]
                    self._entries.move_to_end(key)
                    self.hits += 1
                elif key in missing:
                    self.hits += 1
                else:
                    missing[key] = batch.take([item])
        found.update(self._encode_missing(missing))
        return [[found[key] for key in batch.content_keys] if batch else [] for batch in batches]

    def get(self, key: str) -> VisionFeatures | None:
        """Outputs kept under a content key."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: str, features: VisionFeatures) -> None:
        """Keep outputs that came from elsewhere."""
        self._keep({key: features})

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._nbytes = 0

    def _encode_missing(self, missing: dict[str, VisionBatch]) -> dict[str, VisionFeatures]:
        if not missing:
            return {}
        packed = _concatenate(list(missing.values()))
        embeds, deepstack = self._encode(packed)
        ends = np.cumsum(packed.tokens_per_item).tolist()
        # copies: a view would keep the outputs of the whole call alive as long as one of its items
        fresh = {
            key: VisionFeatures(embeds[start:end].copy(), deepstack[start:end].copy())
            for key, start, end in zip(missing, [0, *ends], ends, strict=False)
        }
        self.misses += len(fresh)
        self._keep(fresh)
        return fresh

    def _keep(self, fresh: Mapping[str, VisionFeatures]) -> None:
        for key, features in fresh.items():
            if key in self._entries:
                self._nbytes -= self._entries.pop(key).nbytes
            self._entries[key] = features
            self._nbytes += features.nbytes
        while self._nbytes > self._max_bytes:
            self._nbytes -= self._entries.popitem(last=False)[1].nbytes


def _concatenate(batches: Sequence[VisionBatch]) -> VisionBatch:
    """One batch of all items, in order."""
    if len(batches) == 1:
        return batches[0]
    ends = np.cumsum([batch.cu_seqlens[-1] for batch in batches])
    seqlens = [batch.cu_seqlens[1:] + end - batch.cu_seqlens[-1] for batch, end in zip(batches, ends, strict=True)]
    return VisionBatch(
        pixel_values=np.concatenate([batch.pixel_values for batch in batches]),
        position_indices=np.concatenate([batch.position_indices for batch in batches], axis=1),
        position_weights=np.concatenate([batch.position_weights for batch in batches], axis=1),
        rotary_cos=np.concatenate([batch.rotary_cos for batch in batches]),
        rotary_sin=np.concatenate([batch.rotary_sin for batch in batches]),
        cu_seqlens=np.concatenate([np.zeros(1, np.int32), *seqlens]).astype(np.int32),
        grid_thw=np.concatenate([batch.grid_thw for batch in batches]),
        tokens_per_item=np.concatenate([batch.tokens_per_item for batch in batches]),
        content_keys=tuple(key for batch in batches for key in batch.content_keys),
    )
