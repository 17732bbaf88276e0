"""Bad bundles, pictures and prompts through the command line: one clear line, exit code 2, nothing on stdout."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from deepstitch.cli import main
from deepstitch.errors import InputError

Spoil = Callable[[Path], None]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("deepstitch: error: ")
        return captured.err

    return run


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(bundle: Path) -> None:
        raw = json.loads((bundle / "manifest.json").read_text("utf-8"))
        change(raw)
        (bundle / "manifest.json").write_text(json.dumps(raw), "utf-8")

    return spoil


def flip_weight(bundle: Path) -> None:
    with (bundle / "weights.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def other_opset(bundle: Path) -> None:
    """A graph a newer exporter might write, with a manifest that agrees with the file."""
    from deepstitch.manifest import file_sha256

    path = bundle / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    model.opset_import[0].version = 999
    path.write_bytes(model.SerializeToString())
    record = {"sha256": file_sha256(path), "size": path.stat().st_size}
    edit_manifest(lambda raw: raw["files"].update({"decoder.onnx": record}))(bundle)


BUNDLES: dict[str, tuple[Spoil, str]] = {
    "no manifest": (lambda bundle: (bundle / "manifest.json").unlink(), "not a bundle"),
    "manifest is not json": (lambda bundle: (bundle / "manifest.json").write_text("{"), "not valid JSON"),
    "manifest of another format": (edit_manifest(lambda raw: raw.update(format_version=99)), "format_version is 99"),
    "manifest with an unknown entry": (edit_manifest(lambda raw: raw.update(tragets=1)), "unknown entry 'tragets'"),
    "manifest lacks an entry": (edit_manifest(lambda raw: raw.pop("embedding")), "entry 'embedding' is missing"),
    "manifest with a wrong type": (edit_manifest(lambda raw: raw["model"].update(hidden_size="x")), "hidden_size"),
    "manifest with another contract": (
        edit_manifest(lambda raw: raw["graphs"]["decoder"]["inputs"][0].update(shape=["B", "S", 7])),
        "inputs_embeds",
    ),
    "graph of another version": (other_opset, "decoder.onnx"),
    "weights changed": (flip_weight, r"weights\.safetensors.*sha256"),
    "weights missing": (lambda bundle: (bundle / "weights.safetensors").unlink(), r"weights\.safetensors"),
    "no chat template": (
        lambda bundle: (
            edit_manifest(lambda raw: raw["files"].pop("chat_template.jinja"))(bundle)
            or (bundle / "chat_template.jinja").unlink()
        ),
        "chat template",
    ),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_bad_bundle(name: str, refused: Callable[..., str], sample_bundle: Callable[..., Path], tmp_path: Path) -> None:
    spoil, message = BUNDLES[name]
    bundle = Path(shutil.copytree(sample_bundle(), tmp_path / "bundle"))
    spoil(bundle)
    line = refused("run", bundle, "--prompt", "What comes after 7?")
    assert re.search(message, line), line


def bomb(path: Path) -> None:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def cut_png(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:200])


PICTURES: dict[str, tuple[Spoil, str]] = {
    "not a picture": (lambda path: path.write_bytes(b"hello"), "image"),
    "empty file": (lambda path: path.write_bytes(b""), "image"),
    "no file": (lambda path: None, "picture.png"),
    "truncated": (cut_png, "image"),
    "decompression bomb": (bomb, "pixels"),
    "a line": (lambda path: Image.new("RGB", (4000, 4)).save(path), "4000"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_bad_picture(
    name: str, refused: Callable[..., str], sample_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    spoil, message = PICTURES[name]
    path = tmp_path / "picture.png"
    spoil(path)
    line = refused("run", sample_bundle(), "--image", path, "--prompt", "What color is the circle?")
    assert ("picture.png" in line or "image 1" in line) and re.search(message, line), line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "blue " * 40_000), r"\d+ tokens.*context"),
        (("--prompt", "hello", "--max-tokens", "1000000"), "context"),
        (("--prompt", "hello", "--temperature", "-1"), "temperature"),
        (("--prompt", "hello", "--top-p", "1.5"), "top_p|top-p"),
    ],
)
def test_bad_prompt(
    words: tuple[str, ...], message: str, refused: Callable[..., str], sample_bundle: Callable[..., Path]
) -> None:
    assert re.search(message, refused("run", sample_bundle(), *words))


def test_bad_arrays_and_placeholders(sample_bundle: Callable[..., Path]) -> None:
    """What only the Python API can be given."""
    import deepstitch

    pipeline = deepstitch.load(sample_bundle())
    picture = np.zeros((64, 64, 3), np.float32)
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "hello"}]}]
    picture[3, 4] = np.nan
    with pytest.raises(InputError, match=r"NaN|nan|finite"):
        pipeline.generate("hello", images=[picture])
    with pytest.raises(InputError, match="0"):
        pipeline.generate("hello", images=[np.zeros((0, 64, 3), np.uint8)])
    with pytest.raises(InputError, match=r"2.*1|1.*2"):
        pipeline.generate(two, images=[np.zeros((64, 64, 3), np.uint8)])
