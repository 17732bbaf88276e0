"""The whole path: placeholders, order, keys, and messages that must be refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from deepstitch.errors import BundleError, DeepstitchError, InputError
from deepstitch.runtime.preprocess import Clip, Processor, mrope_position_ids

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (128, 64), "blue")
CLIP = Clip(frames=np.zeros((4, 64, 64, 3), np.uint8), do_sample=False)


def test_text_only(processor, model):
    prompt = processor("red circle")
    length = len(prompt.input_ids)
    assert prompt.vision is None and prompt.rope_delta == 0
    assert prompt.position_ids.tolist() == [list(range(length))] * 3
    assert prompt.input_ids.dtype == prompt.position_ids.dtype == np.int64
    assert prompt.text == "<|im_start|>user\nred circle<|im_end|>\n<|im_start|>assistant\n"
    assert processor("red circle", add_generation_prompt=False).text.endswith("<|im_end|>\n")


def test_each_image_becomes_as_many_tokens_as_the_encoder_gives_it(processor, model, vision):
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "video"}, {"type": "image"}]
    prompt = processor([{"role": "user", "content": content}], images=[RED, BLUE], videos=[CLIP])
    grid = prompt.vision.grid_thw
    assert grid.tolist() == [[1, 4, 4], [2, 4, 4], [1, 4, 8]]
    assert prompt.vision.tokens_per_item.tolist() == [4, 8, 8]
    assert (prompt.input_ids == model.image_token_id).sum() == 12
    assert (prompt.input_ids == model.video_token_id).sum() == 8
    visual = {"visual_token_ids": (model.image_token_id, model.video_token_id), "merge_size": 2}
    positions, delta = mrope_position_ids(prompt.input_ids, grid, **visual)
    np.testing.assert_array_equal(prompt.position_ids, positions[:, 0])
    assert prompt.rope_delta == delta[0] < 0
    assert prompt.vision.pixel_values.shape == (80, 1536)


def test_pictures_in_the_messages_and_beside_them(processor, tmp_path):
    path = tmp_path / "blue.png"
    BLUE.save(path)
    expected = processor("x", images=[RED, BLUE])
    for parts, images in (
        ([{"type": "image", "image": RED}, {"type": "image", "image": str(path)}], []),
        ([{"type": "image"}, {"type": "image", "path": path}], [RED]),
        ([{"image": RED}, {"type": "image_url", "image_url": {"url": str(path)}}], []),
        ([{"type": "image", "image": np.asarray(RED)}, {"type": "image"}], [BLUE]),
    ):
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "x"}]}]
        prompt = processor(messages, images=images)
        assert prompt.text == expected.text
        assert prompt.vision.content_keys == expected.vision.content_keys
        np.testing.assert_array_equal(prompt.input_ids, expected.input_ids)


def test_content_keys_tell_contents_apart(processor):
    almost = np.asarray(RED).copy()
    almost[5, 5, 1] = 1
    # Equal bytes in another shape must not be taken for the same picture.
    tall = Image.fromarray(np.asarray(BLUE).reshape(128, 64, 3))
    keys = processor("x", images=[RED, RED.copy(), almost, BLUE, tall]).vision.content_keys
    assert keys[0] == keys[1] and len(set(keys)) == 4 and all(len(key) == 64 for key in keys)


def test_messages_are_left_as_they_were(processor):
    messages = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "x"}]}]
    processor(messages)
    assert messages == [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "x"}]}]


def test_a_finished_prompt_as_text(processor):
    prompt = processor("x", images=[RED])
    again = processor.from_text(prompt.text, images=[RED])
    np.testing.assert_array_equal(again.input_ids, prompt.input_ids)


USER = {"role": "user"}
BAD = {
    "more images": (
        dict(messages=[{**USER, "content": "x"}], images=[RED, BLUE]),
        "0 image placeholders .*2 images",
    ),
    "fewer images": (
        dict(messages=[{**USER, "content": [{"type": "image"}] * 3}], images=[RED]),
        "3 image .*1 images",
    ),
    "placeholder in the text": (dict(messages="what is <|image_pad|>?"), "1 image placeholders .*0 images"),
    "missing clip": (
        dict(messages=[{**USER, "content": [{"type": "video"}]}]),
        "1 video placeholders .*0 videos",
    ),
    "extra clip": (
        dict(messages=[{**USER, "content": "x"}], videos=[CLIP]),
        "0 video placeholders .*1 videos",
    ),
    "image not in a list": (dict(messages="x", images=RED), r"images must be a list; .*images=\[\.\.\.\]"),
    "path not in a list": (dict(messages="x", images="a.png"), "images must be a list"),
    "no messages": (dict(messages=[]), "no messages"),
    "one dict": (dict(messages={"role": "user", "content": "x"}), "list of messages, not dict"),
    "number": (dict(messages=3), "list of messages, not int"),
    "strings": (dict(messages=["hello"]), r"messages\[0\] must be a dict"),
    "no role": (dict(messages=[{"content": "x"}]), r"messages\[0\] has no 'role'"),
    "no content": (dict(messages=[USER]), r"messages\[0\] has no 'content'"),
    "odd content": (dict(messages=[{**USER, "content": 5}]), "must be a string or a list of parts, not int"),
    "odd part": (dict(messages=[{**USER, "content": [5]}]), r"content\[0\] must be a dict"),
    "part type": (
        dict(messages=[{**USER, "content": [{"type": "imgae"}]}]),
        "'imgae' .*did you mean 'image'",
    ),
    "audio": (dict(messages=[{**USER, "content": [{"type": "input_audio"}]}]), "supported are 'text'"),
    "text part": (dict(messages=[{**USER, "content": [{"type": "text", "text": None}]}]), "must be a string"),
    "bad picture": (dict(messages="x", images=[RED, b"zzz"]), r"image 2 \(bytes\): not a picture"),
    "thin picture": (dict(messages="x", images=[Image.new("RGB", (2, 500))]), "image 1: 2x500|500x2"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(processor, case):
    arguments, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        processor(**arguments)
    assert "\n" not in str(error.value)


def test_a_text_model_refuses_pictures(folder, model):
    processor = Processor.from_folder(folder, dataclasses.replace(model, image_token_id=None, video_token_id=None))
    assert processor("x").vision is None
    with pytest.raises(InputError, match="reads text only, but 1 images"):
        processor("x", images=[RED])


def test_a_tokenizer_of_another_model_is_noticed(folder, model, vision):
    other = dataclasses.replace(model, image_token_id=999999)
    with pytest.raises(BundleError, match="image_token_id is 999999"):
        Processor.from_folder(folder, other, vision)


def test_a_text_folder_needs_no_pixel_settings(folder, model):
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert len(Processor.from_folder(folder, model)("x").input_ids)
    with pytest.raises(DeepstitchError):
        Processor.from_folder(folder / "nowhere", model)


def test_preprocessing_needs_neither_torch_nor_transformers(folder):
    import subprocess
    import sys

    code = (
        "import sys; import deepstitch.runtime.preprocess;"
        "bad = {'torch', 'transformers', 'onnx', 'av'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
