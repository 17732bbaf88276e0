"""The manifest survives a round trip and refuses every edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepstitch.errors import BundleError
from deepstitch.manifest import (
    EmbeddingTable,
    FileRecord,
    Graph,
    Manifest,
    ModelFacts,
    TensorSpec,
    VisionFacts,
    file_sha256,
)


def example(*, vision: bool = True) -> Manifest:
    model = ModelFacts(
        model_type="qwen3_vl_moe" if vision else "qwen3",
        hidden_size=64,
        vocab_size=900,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        num_deepstack=3 if vision else 0,
        num_parameters=620288,
        num_active_parameters=472832,
        kv_cache_in_place=True,
        batched_continuation=False,
        rope_theta=10000.0,
        mrope_section=(6, 5, 5),
        eos_token_ids=(1, 2),
        image_token_id=898 if vision else None,
    )
    encoder = VisionFacts(
        in_channels=3,
        patch_size=16,
        temporal_patch_size=2,
        spatial_merge_size=2,
        num_grid_per_side=8,
        head_dim=16,
        rope_theta=10000.0,
        out_hidden_size=64,
    )
    decoder = Graph(
        file="decoder.onnx",
        opset=23,
        nodes=100,
        inputs=(TensorSpec(name="inputs_embeds", dtype="float32", shape=("batch", "seq", 64)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", "kept", 900)),),
    )
    return Manifest(
        format_version=1,
        deepstitch_version="0.1.0",
        target="portable",
        weights="fp32",
        command="deepstitch export …",
        versions={"onnx": "1.20"},
        model=model,
        vision=encoder if vision else None,
        embedding=EmbeddingTable(file="weights.safetensors", tensor="embed_tokens.weight"),
        graphs={"decoder": decoder},
        files={"decoder.onnx": FileRecord(sha256="0" * 64, size=1)},
    )


@pytest.mark.parametrize("vision", [True, False])
def test_round_trip(vision: bool) -> None:
    manifest = example(vision=vision)
    assert Manifest.from_json(manifest.to_json()) == manifest


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split(".")

    def apply(raw: dict[str, Any]) -> None:
        for key in parents:
            raw = raw[key]
        raw[last] = value

    return apply


def remove(path: str) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split(".")

    def apply(raw: dict[str, Any]) -> None:
        for key in parents:
            raw = raw[key]
        del raw[last]

    return apply


EDITS = {
    "another format": (change("format_version", 99), "format_version is 99, this deepstitch reads 1"),
    "no format": (remove("format_version"), "format_version is None"),
    "unknown entry": (
        change("model.hiden_size", 1),
        r"unknown entry 'hiden_size' \(did you mean 'hidden_size'\?\)",
    ),
    "missing entry": (remove("model.head_dim"), "entry 'head_dim' is missing"),
    "text for a number": (change("model.head_dim", "32"), r"model\.head_dim: expected int, found '32'"),
    "true for a number": (change("model.head_dim", True), "expected int, found True"),
    "number for a flag": (change("model.kv_cache_in_place", 1), "expected bool, found 1"),
    "null": (change("model", None), "expected dict, found None"),
    "list for a dict": (change("graphs", []), "expected dict"),
    "too few axes": (change("model.mrope_section", [6, 5]), "expected 3 entries, found 2"),
    "wrong element": (change("model.eos_token_ids", [1, "2"]), r"eos_token_ids\[1\]: expected int"),
    "file without hash": (change("files", {"a": {"size": 1}}), "'sha256' is missing"),
}


@pytest.mark.parametrize("case", EDITS)
def test_edits_are_refused(case: str) -> None:
    edit, message = EDITS[case]
    raw = json.loads(example().to_json())
    edit(raw)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(raw))


def test_integers_are_accepted_as_floats() -> None:
    raw = json.loads(example().to_json())
    raw["model"]["rope_theta"] = 10000
    assert Manifest.from_json(json.dumps(raw)) == example()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Manifest.from_json(text)


def test_read_says_what_the_folder_is(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        Manifest.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="run 'deepstitch export' first"):
        Manifest.read(tmp_path)
    with pytest.raises(BundleError, match="cannot be read"):
        Manifest.read(tmp_path / "config.json")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BundleError, match="cannot be read"):
        Manifest.read(tmp_path)


def test_sha256_counts_every_byte(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40000  # more than two read steps of 4 MiB
    (tmp_path / "x").write_bytes(content)
    steps: list[int] = []
    assert file_sha256(tmp_path / "x", steps.append) == hashlib.sha256(content).hexdigest()
    assert sum(steps) == len(content) and len(steps) == 3
