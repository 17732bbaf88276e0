"""Packed weights in a file: written once per bundle, the same answers, and clear refusals."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import deepstitch
from deepstitch.errors import BundleError
from deepstitch.manifest import Manifest
from deepstitch.runtime import verify
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import packed
from deepstitch.runtime.engine.ort import OrtEngine

from .tiny_bundle import copy_bundle


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DEEPSTITCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Graphs packed so far."""
    names = []
    real = packed._write
    monkeypatch.setattr(packed, "_write", lambda *given: (names.append(given[1].name), real(*given)))
    return names


def test_packed_once_and_the_same_answers(tiny_bundle, pictures, cache, written):
    plain = deepstitch.load(tiny_bundle, threads=1).generate("what?", images=pictures[:1], max_tokens=12)
    for _ in range(2):
        pipeline = deepstitch.load(tiny_bundle, threads=1, packed_cache=True)
        assert pipeline.generate("what?", images=pictures[:1], max_tokens=12).token_ids == plain.token_ids
    assert sorted(written) == ["decoder.onnx", "vision_encoder.onnx"]
    assert sorted(path.name for path in cache.glob("packed/*/*")) == ["decoder.onnx", "vision_encoder.onnx"]


def test_integer_weights_packed_and_the_same_answers(sample_bundle, pictures, cache, written):
    bundle = sample_bundle(weights="int4")
    asked = {"images": pictures[:1], "max_tokens": 8}
    plain = deepstitch.load(bundle, threads=1).generate("what?", **asked)
    for _ in range(2):
        pipeline = deepstitch.load(bundle, threads=1, packed_cache=True)
        assert pipeline.generate("what?", **asked).token_ids == plain.token_ids
    assert sorted(written) == ["decoder.onnx", "vision_encoder.onnx"]


def test_nothing_is_packed_unless_asked_for(plain_bundle, cache, written):
    deepstitch.load(plain_bundle, threads=1)
    assert not written and not (cache / "packed").exists()


def test_another_bundle_is_packed_for_itself(plain_bundle, tmp_path, cache, written):
    deepstitch.load(plain_bundle, threads=1, packed_cache=True)
    deepstitch.load(copy_bundle(plain_bundle, tmp_path / "copy"), threads=1, packed_cache=True)
    assert len(written) == 2  # a copy has the same contents
    manifest = Manifest.read(plain_bundle)
    record = dataclasses.replace(manifest.files["weights.safetensors"], sha256="0" * 64)
    changed = dataclasses.replace(manifest, files=manifest.files | {"weights.safetensors": record})
    keys = [packed._key(Bundle(folder=plain_bundle, manifest=each), "decoder") for each in (manifest, changed)]
    assert keys[0] != keys[1]


def test_no_space(plain_bundle, cache, monkeypatch):
    monkeypatch.setattr(packed, "_GROWTH", 1e15)
    with pytest.raises(BundleError, match=r"packed weights cannot be written .*MiB are free.* without packed_cache"):
        deepstitch.load(plain_bundle, threads=1, packed_cache=True)
    assert not [path for path in cache.rglob("*") if path.is_file() and "packed" in path.parts]


def test_a_failed_attempt_leaves_nothing(plain_bundle, cache, monkeypatch):
    def fail(source, target, options):
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "_write", fail)
    with pytest.raises(BundleError, match="No space left"):
        deepstitch.load(plain_bundle, threads=1, packed_cache=True)
    assert list((cache / "packed").iterdir()) == []


def test_what_a_killed_process_left_is_removed(plain_bundle, cache):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    left, alive = (cache / "packed" / f"{'0' * 32}.{number}" for number in (finished.pid, os.getpid()))
    for folder in (left, alive):
        folder.mkdir(parents=True)
    deepstitch.load(plain_bundle, threads=1, packed_cache=True)
    assert alive.is_dir() and not left.exists()


def test_an_exporter_can_vouch_for_its_files(plain_bundle, cache, monkeypatch):
    monkeypatch.setattr(verify, "LARGE_FILE_BYTES", 10_000)
    hashed = []
    real = verify.file_sha256
    monkeypatch.setattr(verify, "file_sha256", lambda path, *more: (hashed.append(path.name), real(path, *more))[1])
    verify.remember_files(plain_bundle, Manifest.read(plain_bundle))
    Bundle.open(plain_bundle, verify="auto")
    assert "weights.safetensors" not in hashed and hashed


def test_a_file_that_reads_back_differently_is_refused(plain_bundle, tmp_path, cache, monkeypatch):
    """As where ONNX Runtime misplaces packed weights: the graph loads, its numbers are wrong."""
    other = onnx.load(plain_bundle / "decoder.onnx")
    head = next(each for each in other.graph.initializer if each.name == "head")
    head.raw_data = (1.5 * onnx.numpy_helper.to_array(head)).tobytes()
    monkeypatch.setattr(packed, "_write", lambda source, target, options: onnx.save(other, target))
    with pytest.raises(BundleError, match="does not survive packing; load it without packed_cache"):
        OrtEngine(Bundle.open(plain_bundle), graphs=["decoder"], packed_cache=True)
    assert list((cache / "packed").iterdir()) == []
