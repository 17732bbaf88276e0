"""What the checkpoint's processor files say about pixels: limits, normalisation, frame sampling."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deepstitch.errors import BundleError, UnsupportedError
from deepstitch.manifest import VisionFacts

__all__ = ["ImageSettings", "VideoSettings", "read_json"]

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read_json(path: Path) -> dict[str, Any] | None:
    """Parse a JSON object; None where there is no such file.

    Raises:
        BundleError: the file cannot be read, or is not a JSON object.
    """
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); copy it again from the checkpoint") from None
    if not isinstance(raw, dict):
        raise BundleError(f"{path}: expected a JSON object; copy it again from the checkpoint")
    return raw


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """How pictures become patches.

    Attributes:
        min_pixels: lower limit of height times width after resizing (of all frames together for a clip).
        max_pixels: upper limit.
        rescale_factor: multiplies 8-bit values, normally 1/255.
        mean: per channel, after rescaling.
        std: per channel.
        resample: Pillow's number of the filter; 3 is bicubic.
    """

    min_pixels: int
    max_pixels: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @classmethod
    def from_folder(cls, folder: Path, vision: VisionFacts) -> ImageSettings:
        """Read ``preprocessor_config.json``, or the image section of ``processor_config.json``.

        Raises:
            BundleError: neither exists, or an entry contradicts the model.
            UnsupportedError: the file asks for a step that is not done here.
        """
        raw, where = _find(folder, "image_processor", ("preprocessor_config.json",))
        return cls(**_pixels(raw, where, vision, (56 * 56, 28 * 28 * 1280), (_CLIP_MEAN, _CLIP_STD)))


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSettings(ImageSettings):
    """How clips become patches: the same, and which frames are taken.

    Attributes:
        fps: frames per second to sample.
        num_frames: frames to sample whatever the length; overrides ``fps``.
        min_frames: at least so many, if the clip has them.
        max_frames: at most so many.
        do_sample: False takes every frame.
        cap_pixels_per_frame: limit each frame to ``max_video_tokens`` too.
        max_video_tokens: tokens per frame for that limit.
    """

    fps: float
    num_frames: int | None
    min_frames: int
    max_frames: int
    do_sample: bool
    cap_pixels_per_frame: bool
    max_video_tokens: int

    @classmethod
    def from_folder(cls, folder: Path, vision: VisionFacts) -> VideoSettings:
        """Read ``video_preprocessor_config.json``, a section of ``processor_config.json``, or the image file.

        Raises:
            BundleError: none of them exists, or an entry contradicts the model.
            UnsupportedError: the file asks for a step that is not done here.
        """
        names = ("video_preprocessor_config.json", "preprocessor_config.json")
        raw, where = _find(folder, "video_processor", names)
        half = (0.5,) * vision.in_channels
        try:
            return cls(
                **_pixels(raw, where, vision, (128 * 32 * 32, 32 * 32 * 768), (half, half)),
                fps=float(raw.get("fps") or 2),
                num_frames=int(raw["num_frames"]) if raw.get("num_frames") else None,
                min_frames=int(raw.get("min_frames") or 4),
                max_frames=int(raw.get("max_frames") or 768),
                do_sample=raw.get("do_sample_frames") is not False,
                cap_pixels_per_frame=bool(raw.get("cap_pixels_per_frame")),
                max_video_tokens=int(raw.get("max_video_tokens") or 768),
            )
        except (TypeError, ValueError) as error:
            raise BundleError(f"{where}: a frame setting is not a number ({error})") from None


def _find(folder: Path, section: str, names: tuple[str, ...]) -> tuple[dict[str, Any], Path]:
    joint = folder / "processor_config.json"
    nested = (read_json(joint) or {}).get(section)
    if isinstance(nested, dict):
        return nested, joint
    for name in names:
        raw = read_json(folder / name)
        if raw is not None:
            return raw, folder / name
    raise BundleError(
        f"{folder}: no {names[0]}, so the pixel limits are unknown; copy it from the checkpoint, export again"
    )


def _pixels(
    raw: dict[str, Any],
    where: Path,
    vision: VisionFacts,
    limits: tuple[int, int],
    colours: tuple[tuple[float, ...], tuple[float, ...]],
) -> dict[str, Any]:
    """What image and video files share. ``limits`` and ``colours`` are HF's defaults for absent entries."""
    _check_steps(raw, where, vision)
    try:
        minimum, maximum = _limits(raw, limits)
        values: dict[str, Any] = {
            "min_pixels": minimum,
            "max_pixels": maximum,
            "rescale_factor": float(raw.get("rescale_factor") or 1 / 255),
            "mean": _per_channel(raw.get("image_mean"), colours[0], vision.in_channels),
            "std": _per_channel(raw.get("image_std"), colours[1], vision.in_channels),
            "resample": int(Image.Resampling(3 if raw.get("resample") is None else raw["resample"])),
        }
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise BundleError(f"{where}: size, image_mean, image_std or resample is malformed ({error})") from None
    if raw.get("do_rescale") is False:
        values["rescale_factor"] = 1.0
    if raw.get("do_normalize") is False:
        values |= {"mean": (0.0,) * vision.in_channels, "std": (1.0,) * vision.in_channels}
    if not 0 < minimum <= maximum:
        raise BundleError(f"{where}: pixel limits {minimum}..{maximum} leave no size")
    if 0 in values["std"]:
        raise BundleError(f"{where}: image_std holds a zero")
    return values


def _limits(raw: dict[str, Any], defaults: tuple[int, int]) -> tuple[int, int]:
    """Both spellings; the older ``min_pixels``/``max_pixels`` win where both are given, as in HF."""
    size = raw.get("size") or {}
    found = []
    spellings = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    for (old, new), default in zip(spellings, defaults, strict=True):
        candidates = (raw.get(old), size.get(new), size.get(old))
        chosen = next((value for value in candidates if value is not None), None)
        if chosen is None and size:
            raise KeyError(f"size has no {new}")
        found.append(int(default if chosen is None else chosen))
    return found[0], found[1]


def _per_channel(value: Any, default: tuple[float, ...], channels: int) -> tuple[float, ...]:
    value = default if value is None else value
    each = (value,) * channels if isinstance(value, int | float) else value
    result = tuple(float(number) for number in each)
    if len(result) != channels:
        raise ValueError(f"{len(result)} values for {channels} channels")
    return result


def _check_steps(raw: dict[str, Any], where: Path, vision: VisionFacts) -> None:
    if raw.get("do_resize") is False:
        raise UnsupportedError(f"{where}: do_resize is false; pictures must be resized to whole patches")
    if vision.in_channels != 3:
        raise UnsupportedError(f"the vision encoder takes {vision.in_channels} channels; preprocessing makes RGB, 3")
    expected = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    for key, value in expected.items():
        if raw.get(key) not in (None, value):
            raise BundleError(f"{where}: {key} is {raw[key]}, the model has {value}; copy the file of this checkpoint")
