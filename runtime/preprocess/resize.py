"""The size rules: which height and width an image or clip is resized to, from the checkpoint's pixel limits.

1. Both sides become multiples of ``factor`` (patch size times merge size), the nearest one.
2. Too many pixels: shrink by the square root of the excess and round down; never below one factor.
3. Too few pixels: grow by the square root of the shortage and round up.
"""

from __future__ import annotations

import math

from deepstitch.errors import InputError

__all__ = ["MAX_ASPECT_RATIO", "clip_size", "image_size"]

MAX_ASPECT_RATIO = 200


def image_size(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, label: str = "image"
) -> tuple[int, int]:
    """Size an image is resized to.

    Args:
        height: pixels.
        width: pixels.
        factor: patch size times merge size, in pixels.
        min_pixels: lower limit of ``height * width`` after resizing.
        max_pixels: upper limit of ``height * width`` after resizing.
        label: name of the image in an error message.

    Returns:
        ``(height, width)``, multiples of ``factor``.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    return _size(1, 1, height, width, factor, min_pixels, max_pixels, label)


def clip_size(
    num_frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    temporal_factor: int,
    min_pixels: int,
    max_pixels: int,
    label: str = "video",
) -> tuple[int, int]:
    """Size every frame of a clip is resized to; the pixel limits count all frames together.

    Args:
        num_frames: sampled frames.
        height: pixels of a frame.
        width: pixels of a frame.
        factor: patch size times merge size, in pixels.
        temporal_factor: frames joined into one patch.
        min_pixels: lower limit of ``frames * height * width`` after resizing.
        max_pixels: upper limit of ``frames * height * width`` after resizing.
        label: name of the clip in an error message.

    Returns:
        ``(height, width)``, multiples of ``factor``.

    Raises:
        InputError: one side of a frame is more than 200 times the other.
    """
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded_frames = round(num_frames / temporal_factor) * temporal_factor
    return _size(num_frames, rounded_frames, height, width, factor, min_pixels, max_pixels, label)


def _size(
    num_frames: int,
    rounded_frames: int,
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    label: str,
) -> tuple[int, int]:
    if min(height, width) < 1:
        raise InputError(f"{label}: {width}x{height} pixels; an image needs at least one pixel each way")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InputError(
            f"{label}: {width}x{height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other, "
            "crop or pad it"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels, new_pixels = num_frames * height * width, rounded_frames * new_height * new_width
    if new_pixels > max_pixels:
        shrink = math.sqrt(pixels / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_pixels < min_pixels:
        grow = math.sqrt(min_pixels / pixels)
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width
