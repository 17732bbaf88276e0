"""One image or clip on its way into the packed batch: first its grid is known, then patches are written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from deepstitch.errors import InputError
from deepstitch.manifest import VisionFacts
from deepstitch.runtime.preprocess.batch import VisionBatch
from deepstitch.runtime.preprocess.images import ImageSource, load_image
from deepstitch.runtime.preprocess.patches import PatchShape, normalisation_table, write_patches
from deepstitch.runtime.preprocess.resize import clip_size, image_size
from deepstitch.runtime.preprocess.settings import ImageSettings, VideoSettings
from deepstitch.runtime.preprocess.video import VideoSource, frame_indices, open_clip, timestamps
from deepstitch.runtime.preprocess.vision_inputs import vision_inputs

__all__ = ["ClipItem", "ImageItem", "KnownItem", "VisualItem", "pack"]


class VisualItem(Protocol):
    """What :func:`pack` and the prompt need of an image or clip."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along time, height, width."""
        ...

    @property
    def timestamps(self) -> Sequence[float]:
        """Seconds of each time step of a clip; none of an image."""
        ...

    def write(self, out: npt.NDArray[np.float32]) -> str:
        """Fill ``[t*h*w, patch width]`` and return the content key."""
        ...


class ImageItem:
    """A picture."""

    timestamps: tuple[float, ...] = ()

    def __init__(self, source: ImageSource, settings: ImageSettings, shape: PatchShape, label: str) -> None:
        image = load_image(source, label)
        height, width = image_size(
            image.height,
            image.width,
            factor=shape.factor,
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            label=label,
        )
        self._pixels = _resize(image, height, width, settings.resample)
        self._settings, self._shape = settings, shape
        self.grid = (1, height // shape.size, width // shape.size)

    def write(self, out: npt.NDArray[np.float32]) -> str:
        """Fill ``[h*w, patch width]`` and return the content key."""
        return _write_steps(iter([[self._pixels]]), self.grid, self._settings, self._shape, out)


@dataclass(frozen=True, slots=True)
class KnownItem:
    """A picture or clip that was prepared before: in place of its pixels, what came of them.

    Attributes:
        grid: patches along time, height, width.
        key: content key of its encoder outputs.
        timestamps: seconds of each time step of a clip.
    """

    grid: tuple[int, int, int]
    key: str
    timestamps: tuple[float, ...] = ()

    def write(self, out: npt.NDArray[np.float32]) -> str:
        """Refuse: there are no pixels."""
        raise InputError("pictures and clips that are known and others cannot be prepared in one prompt")


class ClipItem:
    """A clip. Frames are decoded, resized and cut one at a time.

    Attributes:
        timestamps: seconds of each time step.
    """

    def __init__(self, source: VideoSource, settings: VideoSettings, shape: PatchShape, label: str) -> None:
        self._frames = open_clip(source, label)
        self._settings, self._shape = settings, shape
        indices = frame_indices(self._frames.num_frames, self._frames.fps, settings, self._frames.do_sample)
        self.timestamps = timestamps(indices, self._frames.fps, shape.temporal)
        steps = len(self.timestamps)
        # A single frame fills its whole time step; from then on the size rule counts it so, too.
        num_frames = max(len(indices), shape.temporal)
        height, width = clip_size(
            num_frames,
            *self._frames.size,
            factor=shape.factor,
            temporal_factor=shape.temporal,
            min_pixels=settings.min_pixels,
            max_pixels=_clip_pixels(settings, shape, num_frames),
            label=label,
        )
        self._indices = [*indices, *[indices[-1]] * (steps * shape.temporal - len(indices))]
        self.grid = (steps, height // shape.size, width // shape.size)

    def write(self, out: npt.NDArray[np.float32]) -> str:
        """Fill ``[t*h*w, patch width]`` and return the content key."""
        return _write_steps(self._steps(), self.grid, self._settings, self._shape, out)

    def _steps(self) -> Iterator[list[npt.NDArray[np.uint8]]]:
        height, width = self.grid[1] * self._shape.size, self.grid[2] * self._shape.size
        frames = self._frames.read(self._indices)
        for _ in range(self.grid[0]):
            step = [next(frames) for _ in range(self._shape.temporal)]
            yield [_resize(frame, height, width, self._settings.resample) for frame in step]


def pack(items: Sequence[VisualItem], vision: VisionFacts, shape: PatchShape) -> VisionBatch:
    """Write all items into one batch, in their order; the only large array is ``pixel_values`` itself."""
    grid = np.array([item.grid for item in items], dtype=np.int64)
    known = [item.key for item in items if isinstance(item, KnownItem)]
    if len(known) == len(items):
        return VisionBatch.without_pixels(grid, known, shape.merge)
    patches = grid.prod(axis=1)
    pixel_values = np.empty((int(patches.sum()), shape.width), np.float32)
    ends = np.cumsum(patches).tolist()
    rows = (pixel_values[end - count : end] for end, count in zip(ends, patches, strict=True))
    keys = [item.write(out) for item, out in zip(items, rows, strict=True)]
    return VisionBatch(
        pixel_values=pixel_values,
        **vision_inputs(grid, vision)._asdict(),
        grid_thw=grid,
        tokens_per_item=patches // shape.merge**2,
        content_keys=tuple(keys),
    )


def _resize(image: Image.Image, height: int, width: int, resample: int) -> npt.NDArray[np.uint8]:
    """``[height, width, 3]`` uint8."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling(resample))
    return np.asarray(image)


def _clip_pixels(settings: VideoSettings, shape: PatchShape, num_frames: int) -> int:
    """Upper limit of the pixels of all frames together."""
    if not settings.cap_pixels_per_frame:
        return settings.max_pixels
    cap = min(settings.max_video_tokens * shape.factor**2, settings.max_pixels // num_frames)
    return max(cap, int(settings.min_pixels * 1.05)) * num_frames


def _write_steps(
    steps: Iterator[list[npt.NDArray[np.uint8]]],
    grid: tuple[int, int, int],
    settings: ImageSettings,
    shape: PatchShape,
    out: npt.NDArray[np.float32],
) -> str:
    """Fill the rows of one item. The key hashes all that they depend on, at an eighth of their size."""
    table = normalisation_table(settings.rescale_factor, settings.mean, settings.std)
    digest = hashlib.sha256(np.array(grid, np.int64).tobytes() + table.tobytes())
    rows = grid[1] * grid[2]
    for index, frames in enumerate(steps):
        write_patches(frames, table, shape, out[index * rows : (index + 1) * rows])
        for frame in frames:
            digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest()
