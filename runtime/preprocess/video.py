"""Clips: which frames are sampled, when they happen, and where they come from.

A clip is a file (read through PyAV, ``pip install 'deepstitch[video]'``), a list of pictures, an array
``[T, H, W, C]`` or ``[T, C, H, W]``, or a :class:`Clip`, which says how fast the frames run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from deepstitch.errors import InputError
from deepstitch.runtime.preprocess.images import ImageSource, array_to_uint8, describe, load_image
from deepstitch.runtime.preprocess.settings import VideoSettings

__all__ = ["Clip", "FrameSource", "VideoSource", "frame_indices", "open_clip", "timestamps"]

_DEFAULT_FPS = 24.0  # assumed for frames that come without a rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Frames with their rate.

    Attributes:
        frames: pictures in any form ``load_image`` takes, or an array ``[T, H, W, C]`` or ``[T, C, H, W]``.
        fps: frames per second of ``frames``.
        do_sample: False keeps every frame; None does what the checkpoint's settings say.
    """

    frames: Sequence[ImageSource] | np.ndarray[Any, Any]
    fps: float = _DEFAULT_FPS
    do_sample: bool | None = None


VideoSource = Any
"""A path, the bytes of a file, a sequence of pictures, an array of frames, or a :class:`Clip`."""


class FrameSource(Protocol):
    """An opened clip.

    Attributes:
        num_frames: frames before sampling.
        fps: frames per second.
        size: ``(height, width)`` of every frame.
        do_sample: as in :class:`Clip`.
    """

    num_frames: int
    fps: float
    size: tuple[int, int]
    do_sample: bool | None

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the RGB frames at ascending indices, one at a time."""
        ...


def open_clip(source: VideoSource, label: str = "video") -> FrameSource:
    """Open a clip of any kind; frames are decoded when they are read.

    Raises:
        InputError: it is missing, damaged, empty, or no clip.
        MissingDependency: it is a file and PyAV is not installed.
    """
    if isinstance(source, str | os.PathLike | bytes):
        from deepstitch.runtime.preprocess.video_file import FileFrames

        return FileFrames(source, f"{label} ({describe(source)})")
    clip = source if isinstance(source, Clip) else Clip(frames=_frames(source, label))
    if not (np.isfinite(clip.fps) and clip.fps > 0):
        raise InputError(f"{label}: fps is {clip.fps}; it must be a positive number")
    return _ListFrames(clip, label)


def _frames(source: Any, label: str) -> Any:
    if isinstance(source, list | tuple):
        return source
    if hasattr(source, "__array__") and np.ndim(source) == 4:
        return source
    what = f"an array of shape {np.shape(source)}" if hasattr(source, "__array__") else describe(source)
    raise InputError(
        f"{label}: {what} is no clip; pass a file, a list of pictures, or an array (frames, height, width, 3)"
    )


class _ListFrames:
    """Frames that are already in memory, or files of one picture each."""

    def __init__(self, clip: Clip, label: str) -> None:
        frames = clip.frames
        if hasattr(frames, "__array__"):
            # One look at the whole array decides its range: a dark frame must not be taken for one in 0..1.
            frames = array_to_uint8(np.asarray(frames), label)
        if len(frames) == 0:
            raise InputError(f"{label}: no frames")
        self._frames, self._label = frames, label
        self.num_frames, self.fps, self.do_sample = len(frames), float(clip.fps), clip.do_sample
        first = load_image(frames[0], f"{label}, frame 0")
        self.size = (first.height, first.width)

    def read(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the RGB frames at ``indices``."""
        for index in indices:
            frame = load_image(self._frames[index], f"{self._label}, frame {index}")
            if (frame.height, frame.width) != self.size:
                raise InputError(
                    f"{self._label}: frame {index} is {frame.width}x{frame.height} pixels, frame 0 is "
                    f"{self.size[1]}x{self.size[0]}; all frames of a clip must have one size"
                )
            yield frame


def frame_indices(num_frames: int, fps: float, settings: VideoSettings, do_sample: bool | None = None) -> list[int]:
    """Indices of the frames to take, evenly spread from the first to the last.

    Args:
        num_frames: frames of the clip.
        fps: its frames per second.
        settings: from the checkpoint.
        do_sample: overrides ``settings.do_sample``.
    """
    if not (settings.do_sample if do_sample is None else do_sample):
        return list(range(num_frames))
    if settings.num_frames is not None:
        count = min(settings.num_frames, num_frames)
    else:
        count = int(num_frames / fps * settings.fps)
        count = min(max(count, settings.min_frames), settings.max_frames, num_frames)
    return [int(index) for index in np.linspace(0, num_frames - 1, count).round()]


def timestamps(indices: Sequence[int], fps: float, temporal: int) -> list[float]:
    """Seconds of each time step: the middle between its first and its last frame.

    Args:
        indices: of the sampled frames; the last one is repeated up to a whole time step.
        fps: frames per second before sampling.
        temporal: frames per time step.
    """
    padded = [*indices, *[indices[-1]] * (-len(indices) % temporal)]
    steps = zip(padded[::temporal], padded[temporal - 1 :: temporal], strict=True)
    return [(first / fps + last / fps) / 2 for first, last in steps]
