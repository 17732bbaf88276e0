"""Pixel values, patch order and resize rule against Hugging Face's image processor, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from deepstitch.errors import BundleError, DeepstitchError, InputError
from deepstitch.runtime.preprocess import Processor
from deepstitch.runtime.preprocess.resize import clip_size, image_size


def noise(height, width, mode="RGB", seed=0):
    generator = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    if mode == "P":
        return Image.fromarray(values[..., 0]).convert("RGB").quantize(32)
    if mode == "1":
        return Image.fromarray(values[..., 0]).convert("1")
    return Image.frombytes(mode, (width, height), values.tobytes())


@pytest.fixture
def reference(folder):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    def run(images, **options):
        raw = json.loads((folder / "preprocessor_config.json").read_text())
        for key in ("image_processor_type", "processor_class"):
            raw.pop(key, None)
        out = Qwen2VLImageProcessorPil(**raw)(images, return_tensors="np", **options)
        return out["pixel_values"], out["image_grid_thw"]

    return run


def same(batch, expected):
    np.testing.assert_array_equal(batch.grid_thw, expected[1])
    np.testing.assert_array_equal(batch.pixel_values, expected[0])


@pytest.mark.parametrize(
    "size",
    [
        (1, 1),
        (1, 190),
        (3, 7),
        (16, 16),
        (31, 33),
        (64, 64),
        (65, 63),
        (200, 1),
        (224, 224),
        (480, 640),
        (777, 1333),
    ],
)
def test_equals_hf_at_every_size(processor, reference, size):
    image = noise(*size)
    same(processor("x", images=[image]).vision, reference([image]))


def test_several_images_of_mixed_sizes_are_packed_in_order(processor, reference):
    images = [noise(80, 200, seed=1), noise(300, 90, seed=2), noise(64, 64, seed=3)]
    batch = processor("x", images=images).vision
    same(batch, reference(images))
    assert batch.tokens_per_item.tolist() == (batch.grid_thw.prod(1) // 4).tolist()
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(batch.grid_thw.prod(1))]


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "YCbCr", "RGBX"])
def test_colour_modes_follow_hf(processor, reference, mode):
    image = noise(70, 90, mode)
    same(processor("x", images=[image]).vision, reference([image]))


def test_palette_transparency_is_composited_as_hf_does(processor, reference):
    image = noise(70, 90, "P")
    image.info["transparency"] = 3
    same(processor("x", images=[image]).vision, reference([image]))


@pytest.mark.parametrize("shape", [(70, 90, 3), (3, 70, 90), (70, 90, 1), (1, 70, 90), (70, 90, 4)])
def test_uint8_arrays_follow_hf(processor, reference, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if shape[-1] == 4:
        array[..., 3] = 255  # HF's own two code paths round half-transparent values differently
    same(processor("x", images=[array]).vision, reference([array]))


def test_float_arrays_in_either_range_equal_their_8_bit_picture(processor):
    picture = np.asarray(noise(70, 90))
    expected = processor("x", images=[picture]).vision.pixel_values
    for array in (
        picture / 255,
        (picture / 255).astype(np.float32),
        picture.astype(np.float32),
        picture.astype(int),
    ):
        np.testing.assert_array_equal(processor("x", images=[array]).vision.pixel_values, expected)


@pytest.mark.parametrize(
    "entries",
    [
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}},
        {"size": {"shortest_edge": 1024, "longest_edge": 2048}},
        {"size": {"shortest_edge": 1024, "longest_edge": 999999}, "min_pixels": 40000, "max_pixels": 50000},
        {"min_pixels": 3136, "max_pixels": 12845056, "size": {"shortest_edge": 1, "longest_edge": 2}},
        {"image_mean": [0.481, 0.457, 0.408], "image_std": [0.268, 0.261, 0.275]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"resample": 2, "rescale_factor": 0.00392156862745098},
        {"image_mean": None, "image_std": None},
    ],
    ids=str,
)
def test_settings_come_from_the_checkpoint(folder, edit, model, vision, reference, entries):
    edit("preprocessor_config.json", **entries)
    path = folder / "preprocessor_config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if value is not None}
    path.write_text(json.dumps(raw))
    image = noise(150, 210)
    same(Processor.from_folder(folder, model, vision)("x", images=[image]).vision, reference([image]))


def test_settings_as_transformers_5_nests_them(folder, model, vision):
    image = noise(150, 210)
    expected = Processor.from_folder(folder, model, vision)("x", images=[image]).vision.pixel_values
    names = {
        "image_processor": "preprocessor_config.json",
        "video_processor": "video_preprocessor_config.json",
    }
    nested = {section: json.loads((folder / name).read_text()) for section, name in names.items()}
    for name in names.values():
        (folder / name).unlink()
    (folder / "processor_config.json").write_text(json.dumps(nested))
    actual = Processor.from_folder(folder, model, vision)("x", images=[image]).vision.pixel_values
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size is 14, the model has 16"),
        ("preprocessor_config.json", {"merge_size": 4}, "merge_size is 4"),
        ("preprocessor_config.json", {"size": {"height": 3}}, "size has no shortest_edge"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 9, "longest_edge": 4}}, "leave no size"),
        ("preprocessor_config.json", {"size": 224}, "malformed"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "holds a zero"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "1 values for 3 channels"),
        ("preprocessor_config.json", {"resample": 99}, "malformed"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is false"),
        ("video_preprocessor_config.json", {"fps": "fast"}, "not a number"),
    ],
    ids=str,
)
def test_refused_settings(folder, edit, model, vision, name, entries, message):
    edit(name, **entries)
    with pytest.raises(DeepstitchError, match=message) as error:
        Processor.from_folder(folder, model, vision)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_or_damaged_settings(folder, model, vision):
    path = folder / "preprocessor_config.json"
    path.write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Processor.from_folder(folder, model, vision)
    path.unlink()
    with pytest.raises(BundleError, match=r"no preprocessor_config\.json"):
        Processor.from_folder(folder, model, vision)


def test_image_rule_equals_hf_over_a_grid_of_sizes():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for factor, low, high in ((28, 3136, 12845056), (32, 65536, 16777216), (32, 4096, 65536)):
        for height in (1, 5, 15, 16, 17, 48, 80, 100, 511, 1000, 4096, 9999):
            for width in (1, 5, 15, 16, 17, 48, 80, 100, 511, 1000, 4096, 9999):
                if max(height, width) / min(height, width) > 200:
                    with pytest.raises(InputError, match="200 times"):
                        image_size(height, width, factor=factor, min_pixels=low, max_pixels=high)
                    continue
                actual = image_size(height, width, factor=factor, min_pixels=low, max_pixels=high)
                assert actual == smart_resize(height, width, factor, low, high)


def test_clip_rule_equals_hf_over_a_grid_of_sizes():
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    for low, high in ((131072, 786432), (4096, 25165824), (8192, 65536 * 64)):
        for frames in (2, 3, 4, 5, 17, 64):
            for height, width in ((1, 1), (9, 40), (31, 33), (48, 80), (240, 320), (720, 1280), (2000, 90)):
                limits = {"min_pixels": low, "max_pixels": high, "factor": 32, "temporal_factor": 2}
                assert clip_size(frames, height, width, **limits) == smart_resize(frames, height, width, **limits)
