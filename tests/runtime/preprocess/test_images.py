"""Opening pictures: formats, orientation, depth, and everything that must be refused."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from deepstitch.errors import InputError
from deepstitch.runtime.preprocess import images, load_image

GRADIENT = np.stack(np.broadcast_arrays(np.arange(60)[:, None] * 4, np.arange(80) * 3, 77), -1).astype(np.uint8)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG"])
def test_formats_and_ways_to_pass_them(tmp_path, form):
    data = encoded(Image.fromarray(GRADIENT), form, **({"lossless": True} if form == "WEBP" else {}))
    path = tmp_path / "picture.bin"  # the content decides, not the name
    path.write_bytes(data)
    url = "data:image/any;base64," + base64.b64encode(data).decode()
    pictures = [np.asarray(load_image(source)) for source in (path, str(path), data, io.BytesIO(data), url)]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    lossy = form in ("JPEG", "GIF")
    np.testing.assert_allclose(pictures[0].astype(int), GRADIENT, atol=24 if lossy else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = load_image(encoded(Image.fromarray(GRADIENT), "PNG", exif=exif))
    turns = {
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.swapaxes(0, 1),
        6: np.rot90(GRADIENT, -1),
        7: GRADIENT[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(GRADIENT),
    }
    np.testing.assert_array_equal(np.asarray(upright), turns[orientation])


def test_transparency_becomes_white():
    rgba = np.dstack([GRADIENT, np.repeat([[0, 255]], 40, 1).repeat(60, 0)]).astype(np.uint8)
    picture = np.asarray(load_image(encoded(Image.fromarray(rgba), "PNG")))
    assert (picture[:, :40] == 255).all()
    np.testing.assert_array_equal(picture[:, 40:], GRADIENT[:, 40:])
    np.testing.assert_array_equal(np.asarray(load_image(rgba)), picture)


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    for source in (encoded(Image.fromarray(grey), "PNG"), Image.fromarray(grey.astype(np.int32))):
        picture = np.asarray(load_image(source))
        assert picture[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_float_and_boolean_pictures():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    assert np.array_equal(np.asarray(load_image(Image.fromarray(ramp)))[..., 0], expected)
    assert np.array_equal(np.asarray(load_image(ramp))[..., 2], expected)
    assert np.asarray(load_image(np.eye(4, dtype=bool)))[0, :2, 0].tolist() == [255, 0]


def png_of_size(width, height):
    """A valid header and no pixels to speak of."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = encoded(Image.fromarray(GRADIENT), "PNG")
BAD = {
    "no such file": ("nowhere.png", "'nowhere.png'.*no such file"),
    "folder": (".", "is a folder"),
    "web address": ("https://example.org/a.png", "not fetched"),
    "broken data url": ("data:image/png;base64,$$$", "not valid base64"),
    "empty": (b"", "not a picture"),
    "text": (b"hello, I am a text file" * 20, "not a picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "truncated png": (GOOD[: len(GOOD) // 2], "cannot be"),
    "truncated jpeg": (encoded(Image.fromarray(GRADIENT), "JPEG")[:-200], "cannot be decoded"),
    "flipped bits": (GOOD[:60] + bytes(200) + GOOD[260:], "cannot be"),
    "bomb": (png_of_size(20000, 20000), "pixels; reduce it"),
    "bomb below Pillow's limit": (png_of_size(12000, 12000), "12000x12000 is more than"),
    "zero width": (png_of_size(0, 5), "cannot be|empty|not a picture"),
    "empty array": (np.zeros((0, 5, 3), np.uint8), "empty"),
    "empty plane": (np.zeros((0, 5)), "empty"),
    "nan": (np.full((4, 4, 3), np.nan), "NaN"),
    "infinite": (np.full((4, 4, 3), np.inf, np.float32), "NaN or infinite"),
    "negative": (np.full((4, 4, 3), -0.5), "values -0.5"),
    "too large": (np.full((4, 4, 3), 300), "values 300..300"),
    "two channels": (np.zeros((7, 9, 2)), r"shape \(7, 9, 2\)"),
    "four axes": (np.zeros((2, 7, 9, 3)), "height, width, channels"),
    "strings": (np.array([["a"]]), "not a picture"),
    "complex": (np.zeros((2, 2), complex), "complex128 is not a picture"),
    "number": (7, "cannot be read as a picture"),
    "nothing": (None, "NoneType"),
    "32-bit grey": (Image.fromarray(np.array([[70000]], np.int32)), "70000"),
    "nan in a float picture": (Image.fromarray(np.array([[np.nan]], np.float32)), "NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_pictures(case):
    source, message = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(InputError, match=message) as error:
            load_image(source, "image 1")
    assert str(error.value).startswith("image 1 (")
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_an_array_over_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="more than 100 pixels"):
        load_image(np.zeros((11, 10, 3), np.uint8))
