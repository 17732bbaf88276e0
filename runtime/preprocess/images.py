"""Opens pictures from files, bytes, PIL images and arrays, and brings all of them to 8-bit RGB.

1. The orientation tag of EXIF is applied.
2. Transparency is composited onto white.
3. 16-bit greyscale is scaled to 8 bits, not clipped; other modes follow Pillow's conversion.
4. Arrays: integers 0..255; floats 0..1 or 0..255; booleans; channels first or last, with 1, 3 or 4 channels.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from deepstitch.errors import InputError

__all__ = ["MAX_IMAGE_PIXELS", "ImageSource", "array_to_uint8", "describe", "load_image"]

ImageSource = Any
"""A path, a ``data:image/...;base64,`` URL, bytes, a binary file object, a PIL image, or an array."""

MAX_IMAGE_PIXELS = 1 << 27
"""134 million: a larger picture is refused before it is decoded, 400 MB as RGB."""

# Formats decoded in Pillow's own process; EPS, for one, would start an interpreter on the file's content.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def describe(source: ImageSource) -> str:
    """Name a source in an error message, shortly."""
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        text = text if isinstance(text, str) else text.decode(errors="replace")
        return f"'{text[:40]}…'" if text.startswith("data:") else f"'{text}'"
    return type(source).__name__


def load_image(source: ImageSource, label: str = "image") -> Image.Image:
    """Open a picture.

    Args:
        source: see :data:`ImageSource`.
        label: what to call it in an error message.

    Returns:
        An RGB image, upright.

    Raises:
        InputError: it is missing, not a picture, damaged, too large, empty, or its values are no colours.
    """
    label = f"{label} ({describe(source)})"
    if isinstance(source, Image.Image):
        return _decode(source, label)
    if isinstance(source, str | os.PathLike):
        return _decode(_open(_file_or_data(os.fspath(source), label), label), label)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(_open(io.BytesIO(source), label), label)
    if hasattr(source, "__array__"):
        return Image.fromarray(_array_to_rgb(np.asarray(source), label))
    if hasattr(source, "read"):
        return _decode(_open(source, label), label)
    raise InputError(f"{label}: cannot be read as a picture; pass a path, bytes, a PIL image or a numpy array")


def _file_or_data(text: str | bytes, label: str) -> Path | io.BytesIO:
    text = os.fsdecode(text)
    if text.startswith(("http://", "https://")):
        raise InputError(f"{label}: remote pictures are not fetched; download it and pass the file")
    if text.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(text.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise InputError(f"{label}: not valid base64 ({error})") from None
    path = Path(text)
    if not path.is_file():
        raise InputError(f"{label}: {'is a folder, not a picture' if path.is_dir() else 'no such file'}")
    return path


def _open(file: Any, label: str) -> Image.Image:
    """Read the header only."""
    try:
        with warnings.catch_warnings():
            # Pillow warns from half its limit on; ours is checked, with an error, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        raise InputError(f"{label}: not a picture; readable formats are {', '.join(_FORMATS)}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{label}: more than {MAX_IMAGE_PIXELS:,} pixels; reduce it first") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, … on hostile headers
        raise InputError(f"{label}: cannot be opened ({error}); is the file damaged?") from None


def _decode(image: Image.Image, label: str) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{label}: {width}x{height} pixels; the picture is empty")
    if width * height > MAX_IMAGE_PIXELS:
        raise InputError(f"{label}: {width}x{height} is more than {MAX_IMAGE_PIXELS:,} pixels; reduce it first")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), label)
    except InputError:
        raise
    except Exception as error:  # as in _open: each decoder has its own exceptions for damaged data
        raise InputError(f"{label}: cannot be decoded ({error}); is the file damaged?") from None


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(_wide_to_uint8(np.asarray(image))).convert("RGB")
    if image.mode == "I":  # how older versions of Pillow open a 16-bit PNG
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(f"{label}: 32-bit values {values.min()}..{values.max()}; convert it to 8 or 16 bits")
        return Image.fromarray(_wide_to_uint8(values)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_array_to_rgb(np.asarray(image), label))
    if "A" in image.getbands() or image.mode in ("La", "RGBa") or "transparency" in image.info:
        coloured = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _wide_to_uint8(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale 0..65535 to 0..255, rounded."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def array_to_uint8(array: npt.NDArray[Any], label: str) -> npt.NDArray[np.uint8]:
    """Bring the values of an array of any shape to 0..255.

    Raises:
        InputError: NaN, infinite, outside the ranges named at the top of this file, or not numbers.
    """
    if array.dtype == np.uint8:
        return array
    if array.size == 0:
        raise InputError(f"{label}: shape {array.shape}; the picture is empty")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{label}: an array of {array.dtype} is not a picture; pass uint8 or float32")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{label}: the array holds NaN or infinite values")
    if low < 0 or high > 255:
        raise InputError(f"{label}: values {low}..{high}; scale them to 0..255, or to 0..1 as floats")
    if array.dtype.kind != "f":
        return array.astype(np.uint8)
    return np.rint(array * 255 if high <= 1 else array).astype(np.uint8)


def _array_to_rgb(array: npt.NDArray[Any], label: str) -> npt.NDArray[np.uint8]:
    """Bring an array to ``[H, W, 3]``."""
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim != 3:
        raise InputError(f"{label}: shape {array.shape}; a picture has shape (height, width, channels)")
    elif array.shape[0] in (1, 3, 4):  # where both ends could be the channels, HF takes the first
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] not in (1, 3, 4):
        raise InputError(f"{label}: shape {array.shape}; a picture has 1, 3 or 4 channels")
    if array.size == 0:
        raise InputError(f"{label}: shape {array.shape}; the picture is empty")
    if array.size // array.shape[-1] > MAX_IMAGE_PIXELS:
        raise InputError(f"{label}: shape {array.shape} is more than {MAX_IMAGE_PIXELS:,} pixels; reduce it first")
    values = np.ascontiguousarray(array_to_uint8(array, label))
    if values.shape[-1] == 1:
        return np.repeat(values, 3, axis=-1)
    if values.shape[-1] == 4:
        return np.asarray(_to_rgb(Image.fromarray(values, "RGBA"), label))
    return values
