"""Inputs of a case, made up from the bundle's own facts: the same ones on every run, for any checkpoint."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.export.compare.cases import Case, Clip, Picture, Text, Turn
from deepstitch.manifest import Manifest, ModelFacts
from deepstitch.runtime.preprocess import VisionBatch
from deepstitch.runtime.preprocess.items import ClipItem, ImageItem, VisualItem, pack
from deepstitch.runtime.preprocess.patches import PatchShape
from deepstitch.runtime.preprocess.settings import ImageSettings, VideoSettings
from deepstitch.runtime.preprocess.video import Clip as VideoClip

__all__ = ["CaseInputs", "InputMaker", "RowInputs"]

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
_OFF_GRID = 5  # pixels by which pictures miss a whole number of tokens, so that they have to be resized


@dataclass(frozen=True, slots=True, kw_only=True)
class RowInputs:
    """One batch row.

    Attributes:
        turns: token ids ``(S,)`` of each turn, one placeholder id per visual token.
        items: visual items of each turn, as numbers into the case's :class:`VisionBatch`.
        pixels: the 8-bit original of each item: a picture ``(H, W, 3)`` or a clip ``(frames, H, W, 3)``.
        decode_ids: ``(n,)`` tokens fed one by one afterwards.
    """

    turns: tuple[Ints, ...]
    items: tuple[range, ...]
    pixels: tuple[Pixels, ...]
    decode_ids: Ints

    @property
    def prompt(self) -> Ints:
        """All turns, one after the other."""
        return np.concatenate(self.turns)

    @property
    def all_items(self) -> range:
        """Items of all turns."""
        return range(self.items[0].start, self.items[-1].stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseInputs:
    """A case for one model; ``vision`` packs the pictures and clips of all rows in reading order."""

    case: Case
    rows: tuple[RowInputs, ...]
    vision: VisionBatch | None


class InputMaker:
    """Makes the inputs of any case for the model of one bundle."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Read the pixel limits.

        Raises:
            BundleError: a processor file is missing or malformed.
        """
        self._model, self._vision = manifest.model, manifest.vision
        self._ids = _ordinary_ids(folder, manifest.model)
        if self._vision is not None:
            self._image_settings = ImageSettings.from_folder(folder, self._vision)
            self._video_settings = VideoSettings.from_folder(folder, self._vision)

    def __call__(self, case: Case) -> CaseInputs | None:
        """The inputs of a case, without its pictures for a text-only model; None where it does not apply."""
        if self._vision is None:
            return None if case.needs_vision else self._make(case, None)
        shape = PatchShape(
            size=self._vision.patch_size,
            temporal=self._vision.temporal_patch_size,
            merge=self._vision.spatial_merge_size,
            channels=self._vision.in_channels,
        )
        return self._make(case, shape)

    def _make(self, case: Case, shape: PatchShape | None) -> CaseInputs:
        rng = np.random.default_rng(zlib.crc32(case.name.encode()))
        items: list[VisualItem] = []
        rows = []
        for turns in case.rows:
            ids, spans = [], []
            pixels: list[Any] = []
            for turn in turns:
                first = len(items)
                ids.append(np.concatenate(list(self._turn_ids(turn, shape, rng, items, pixels))))
                spans.append(range(first, len(items)))
            decode_ids = rng.choice(self._ids, case.decode)
            rows.append(RowInputs(turns=tuple(ids), items=tuple(spans), pixels=tuple(pixels), decode_ids=decode_ids))
        batch = pack(items, self._vision, shape) if items and self._vision and shape else None
        return CaseInputs(case=case, rows=tuple(rows), vision=batch)

    def _turn_ids(
        self,
        turn: Turn,
        shape: PatchShape | None,
        rng: np.random.Generator,
        items: list[VisualItem],
        pixels: list[Pixels],
    ) -> Iterator[Ints]:
        """Token ids part by part; pictures and clips are appended to ``items`` and ``pixels``."""
        for part in turn:
            if isinstance(part, Text):
                yield rng.choice(self._ids, part.tokens)
            elif shape is not None:
                item, original = (
                    self._picture(part, shape, rng) if isinstance(part, Picture) else self._clip(part, shape, rng)
                )
                items.append(item)
                pixels.append(original)
                yield from self._placeholders(item, shape, rng, is_clip=isinstance(part, Clip))

    def _placeholders(
        self, item: VisualItem, shape: PatchShape, rng: np.random.Generator, *, is_clip: bool
    ) -> Iterator[Ints]:
        """Start, placeholders, end; for a clip per time step, with a timestamp's worth of text before."""
        steps, height, width = item.grid
        model = self._model
        pad = model.video_token_id if is_clip else model.image_token_id
        for _ in range(steps):
            if is_clip:
                yield rng.choice(self._ids, 3)
            count = height * width // shape.merge**2
            ids = [model.vision_start_token_id, *[pad] * count, model.vision_end_token_id]
            yield np.array([each for each in ids if each is not None], np.int64)

    def _picture(self, part: Picture, shape: PatchShape, rng: np.random.Generator) -> tuple[VisualItem, Pixels]:
        side = math.ceil(math.sqrt(self._image_settings.min_pixels / shape.factor**2))
        height, width = ((side + extra) * shape.factor - _OFF_GRID for extra in (part.taller, part.wider))
        pixels = _pattern(rng, height, width)
        return ImageItem(pixels, self._image_settings, shape, "picture"), pixels

    def _clip(self, part: Clip, shape: PatchShape, rng: np.random.Generator) -> tuple[VisualItem, Pixels]:
        count = part.steps * shape.temporal
        wanted = (2 * shape.factor, 3 * shape.factor)

        def item(height: int, width: int) -> tuple[ClipItem, Pixels]:
            frames = np.stack([_pattern(rng, height, width) for _ in range(count)])
            return ClipItem(VideoClip(frames=frames, do_sample=False), self._video_settings, shape, "clip"), frames

        _, height, width = item(*wanted)[0].grid
        # At the size the checkpoint's limits lead to: Hugging Face resizes clips with another library, which
        # rounds its own way.
        return item(height * shape.size, width * shape.size)


def _pattern(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Random coloured tiles under noise, ``(height, width, 3)``: no two patches are alike."""
    tiles = rng.integers(0, 256, (height // 24 + 1, width // 24 + 1, 3))
    coarse = np.kron(tiles, np.ones((24, 24, 1), np.int64))[:height, :width]
    noise = rng.integers(0, 256, (height, width, 3))
    return ((3 * coarse + noise) // 4).astype(np.uint8)


def _ordinary_ids(folder: Path, model: ModelFacts) -> Ints:
    """Token ids without a meaning of their own."""
    special = {*model.eos_token_ids, model.image_token_id, model.video_token_id}
    special |= {model.vision_start_token_id, model.vision_end_token_id}
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        added = json.loads(tokenizer.read_text("utf-8")).get("added_tokens") or ()
        special |= {token["id"] for token in added}
    ids = np.arange(model.vocab_size, dtype=np.int64)
    return ids[~np.isin(ids, [each for each in special if each is not None])]
