"""Clips: sampling, sizes, patches, timestamps and prompt text against Hugging Face's two processors."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from deepstitch.errors import InputError, MissingDependency
from deepstitch.runtime.preprocess import Clip, Processor
from deepstitch.runtime.preprocess.settings import VideoSettings
from deepstitch.runtime.preprocess.video import frame_indices, timestamps


def frames(count, height=70, width=100, seed=0):
    """Smooth moving pictures, so that a wrong frame or order shows."""
    y, x, t = np.mgrid[:height, :width, :count].astype(float)
    waves = [127 + 120 * np.sin((x + 2 * y) / 15 + t / 2 + phase + seed) for phase in range(3)]
    return np.stack(waves, -1).transpose(2, 0, 1, 3).astype(np.uint8)


@pytest.fixture(scope="module")
def hf_video():
    """HF's video processor, called method by method: building it needs torchvision."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return Qwen3VLVideoProcessor


@pytest.fixture(scope="module")
def hf_processor():
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    instance = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    instance.image_token, instance.video_token = "<|image_pad|>", "<|video_pad|>"
    instance.vision_start_token, instance.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    instance.image_processor = instance.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    return instance


@pytest.mark.parametrize("changes", [{}, {"fps": 5}, {"max_frames": 6}, {"min_frames": 8}, {"num_frames": 5}], ids=str)
def test_sampling_equals_hf(folder, edit, vision, hf_video, changes):
    edit("video_preprocessor_config.json", **changes)
    settings = VideoSettings.from_folder(folder, vision)
    limits = SimpleNamespace(fps=settings.fps, min_frames=settings.min_frames, max_frames=settings.max_frames)
    for total in (1, 2, 3, 7, 24, 100, 1001):
        for fps in (1.0, 23.976, 24.0, 60.0):
            metadata = SimpleNamespace(total_num_frames=total, fps=fps)
            wanted = None if settings.num_frames is None else min(settings.num_frames, total)
            expected = hf_video.sample_frames(limits, metadata, num_frames=wanted)
            assert frame_indices(total, fps, settings) == expected.tolist()


def test_timestamps_equal_hf(hf_processor):
    for indices in ([0], [0, 1], [0, 12, 24], [0, 5, 9, 14], list(range(0, 90, 7))):
        for fps in (1.0, 23.976, 24.0, 30.0):
            assert timestamps(indices, fps, 2) == hf_processor._calculate_timestamps(list(indices), fps, 2)


def expected_patches(hf_video, clip, indices, grid, mean=0.5, std=0.5):
    """HF's chain with torch's own 8-bit antialiased bicubic filter, which torchvision calls."""
    import torch

    video = torch.from_numpy(clip[indices]).permute(0, 3, 1, 2)
    size = (grid[1] * 16, grid[2] * 16)
    video = torch.nn.functional.interpolate(video, size, mode="bicubic", antialias=True)
    video = (video.float() / 255 - mean) / std
    out, *actual_grid = hf_video.patchify(None, video[None], 16, 2, 2)
    assert tuple(actual_grid) == tuple(grid)
    return out[0].numpy()


@pytest.mark.parametrize("count", [2, 3, 8, 9])
@pytest.mark.parametrize("size", [(64, 96), (70, 100)])
def test_pixels_equal_hf(processor, hf_video, count, size):
    clip = frames(count, *size)
    batch = processor("x", videos=[Clip(frames=clip, do_sample=False)]).vision
    expected = expected_patches(hf_video, clip, list(range(count)), batch.grid_thw[0])
    # Pillow's and torch's filters may round a pixel to neighbouring 8-bit values: one level is 2/255.
    resized = size != (64, 96)
    np.testing.assert_allclose(batch.pixel_values, expected, rtol=0, atol=2.01 / 255 if resized else 1e-6)
    assert np.abs(batch.pixel_values - expected).mean() < 1e-3


def test_all_ways_to_pass_frames_are_equal(processor, tmp_path):
    clip = frames(6)
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for frame, path in zip(clip, paths, strict=True):
        Image.fromarray(frame).save(path)
    ways = [
        clip,
        clip.transpose(0, 3, 1, 2),
        clip / 255,
        list(clip),
        [Image.fromarray(frame) for frame in clip],
        paths,
        Clip(frames=clip, fps=24),
    ]
    prompts = [processor("x", videos=[way]) for way in ways]
    for prompt in prompts[1:]:
        np.testing.assert_array_equal(prompt.input_ids, prompts[0].input_ids)
        assert prompt.vision.content_keys == prompts[0].vision.content_keys


def test_text_with_timestamps_equals_hf(processor, hf_processor):
    import torch

    clips = [
        Clip(frames=frames(9), fps=3.0, do_sample=False),
        Clip(frames=frames(2, 64, 64), fps=10.0, do_sample=False),
    ]
    picture = Image.fromarray(frames(1)[0])
    parts = [{"type": "video"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "how many?"}]
    prompt = processor([{"role": "user", "content": parts}], images=[picture], videos=clips)
    grid = torch.from_numpy(prompt.vision.grid_thw)
    assert grid[:, 0].tolist() == [5, 1, 1]
    metadata = [
        SimpleNamespace(fps=3.0, frames_indices=list(range(9))),
        SimpleNamespace(fps=10.0, frames_indices=[0, 1]),
    ]
    inputs = {"video_grid_thw": grid[[0, 2]], "video_metadata": metadata}
    videos = [hf_processor.replace_video_token(inputs, index) for index in range(2)]
    image = hf_processor.replace_image_token({"image_grid_thw": grid[[1]]}, 0)
    text, _ = hf_processor.get_text_with_replacements([prompt.text], [image], videos)
    assert "<0.2 seconds>" in text[0] and "<2.7 seconds>" in text[0]
    assert prompt.input_ids.tolist() == processor.tokenizer.encode(text[0]).tolist()
    assert prompt.position_ids[:, -1].tolist() == [len(prompt.input_ids) + prompt.rope_delta - 1] * 3


def test_a_single_frame_fills_its_time_step(processor):
    one, two = (processor("x", videos=[frames(1).repeat(count, 0)]) for count in (1, 2))
    assert one.vision.content_keys == two.vision.content_keys
    assert one.vision.grid_thw[0, 0] == 1


def test_the_cap_per_frame_limits_the_tokens(folder, edit, model, vision, hf_video):
    size = {"shortest_edge": 4096, "longest_edge": 10**8}
    clip = Clip(frames=frames(4, 320, 320), do_sample=False)
    edit("video_preprocessor_config.json", cap_pixels_per_frame=True, max_video_tokens=6, size=size)
    batch = Processor.from_folder(folder, model, vision)("x", videos=[clip]).vision
    options = SimpleNamespace(patch_size=16, merge_size=2, temporal_patch_size=2, max_video_tokens=6, size=size)
    options.cap_pixels_per_frame = True
    assert batch.grid_thw.prod() == hf_video.get_num_of_video_patches(options, 4, 320, 320)


@pytest.fixture
def video_file(tmp_path):
    av = pytest.importorskip("av")

    def write(count=20, rate=10, name="clip.mp4", codec="mpeg4"):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.bit_rate = 4_000_000
            for frame in frames(count, 64, 96):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])  # Matroska does not say how many frames it holds
def test_a_file_equals_its_sampled_frames(processor, video_file, hf_video, name):
    from transformers.video_utils import read_video_pyav

    path = video_file(name=name)
    limits = SimpleNamespace(fps=2, min_frames=2, max_frames=64)
    prompt = processor("x", videos=[path])
    if name.endswith("mp4"):
        decoded, metadata = read_video_pyav(str(path), lambda metadata: hf_video.sample_frames(limits, metadata))
        assert metadata.frames_indices.tolist() == [0, 6, 13, 19]
        clip = Clip(frames=decoded, fps=10, do_sample=False)
        assert prompt.vision.content_keys == processor("x", videos=[clip]).vision.content_keys
    steps = processor.tokenizer.decode(prompt.input_ids, skip_special_tokens=True)
    assert "<0.3 seconds>" in steps and "<1.6 seconds>" in steps


def test_bytes_equal_their_file(processor, video_file):
    path = video_file()
    left, right = (processor("x", videos=[each]).vision.content_keys for each in (path, path.read_bytes()))
    assert left == right


def test_bytes_open_no_files(processor, video_file, monkeypatch):
    """A playlist names files of the machine it is read on."""
    path = video_file()
    monkeypatch.chdir(path.parent)
    playlist = f"ffconcat version 1.0\nfile {path.name}\n".encode()
    script = path.with_suffix(".ffconcat")
    script.write_bytes(playlist)
    assert processor("x", videos=[script])  # the user's own file may
    with pytest.raises(InputError, match=r"video 1 .*cannot be decoded"):
        processor("x", videos=[playlist])


def test_only_sampled_frames_are_kept(processor, video_file):
    prompt = processor("x", videos=[str(video_file(count=90, rate=30))])
    assert prompt.vision.grid_thw.tolist() == [[3, 4, 6]]


def test_missing_pyav_is_named(processor, video_file, monkeypatch):
    path = video_file()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r"deepstitch\[video\]"):
        processor("x", videos=[path])


BAD = {
    "no such file": ("nowhere.mp4", "no such file"),
    "not a video": (__file__, "cannot be decoded as a video|no video stream"),
    "no frames": ([], "no frames"),
    "empty array": (np.zeros((0, 4, 4, 3), np.uint8), "empty|no frames"),
    "one picture": (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\) is no clip"),
    "picture object": (Image.new("RGB", (4, 4)), "Image is no clip"),
    "two sizes": ([np.zeros((40, 40, 3), np.uint8), np.zeros((40, 50, 3), np.uint8)], "frame 1 is 50x40"),
    "bad frame": ([np.zeros((40, 40, 3)), b"no"], "frame 1 .*not a picture"),
    "nan": (np.full((2, 4, 4, 3), np.nan), "NaN"),
    "no rate": (Clip(frames=[np.zeros((40, 40, 3))], fps=0), "fps is 0"),
    "thin": (np.zeros((2, 40, 40 * 201, 3), np.uint8), "200 times"),
    "number": (3, "int is no clip"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_clips(processor, case):
    if isinstance(BAD[case][0], str):
        pytest.importorskip("av")
    with pytest.raises(InputError, match=BAD[case][1]) as error:
        processor("x", videos=[BAD[case][0]])
    assert str(error.value).startswith("video 1") and "\n" not in str(error.value)
