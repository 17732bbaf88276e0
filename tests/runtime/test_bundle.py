"""Opening bundles: every kind of damage gives one clear line, and large files are hashed once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy

from deepstitch.errors import BundleError, InputError
from deepstitch.manifest import Manifest
from deepstitch.runtime import verify
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.embedding import EmbeddingTable
from deepstitch.runtime.engine.ort import OrtEngine

from .tiny_bundle import VOCAB, copy_bundle, weights, write_manifest


@pytest.fixture
def bundle(plain_bundle, tmp_path) -> Path:
    return copy_bundle(plain_bundle, tmp_path / "bundle")


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def drop_input(raw: dict) -> None:
    del raw["graphs"]["decoder"]["inputs"][2]


def rename_input(raw: dict) -> None:
    raw["graphs"]["decoder"]["inputs"][0]["name"] = "embeddings"


def retype_input(raw: dict) -> None:
    raw["graphs"]["decoder"]["inputs"][3]["dtype"] = "int64"


def escape(raw: dict) -> None:
    raw["files"]["../secret"] = raw["files"]["tokenizer.json"]


def forget_file(raw: dict) -> None:
    del raw["files"]["decoder.onnx"]


def other_version(raw: dict) -> None:
    raw["deepstitch_version"] = "9.9"
    raw["graphs"]["vision_encoder"]["inputs"][1]["name"] = "grid"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), r"not a bundle \(no manifest.json\)"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest.json: not valid JSON"),
        (
            lambda folder: (folder / "decoder.onnx").unlink(),
            r"decoder.onnx: missing, .* copy the bundle again",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            r"tokenizer.json: 2 bytes, the manifest says",
        ),
        (
            lambda folder: flip_last_byte(folder / "weights.safetensors"),
            r"weights.safetensors: its contents changed",
        ),
        (
            lambda folder: edit(folder, drop_input),
            r"decoder.onnx: input 'deepstack_embeds' is missing; .*export",
        ),
        (lambda folder: edit(folder, rename_input), r"input 'embeddings' is unknown here"),
        (lambda folder: edit(folder, retype_input), r"input 'deepstack_index' is int64, int32 is expected"),
        (
            lambda folder: edit(folder, other_version),
            r"'grid' is unknown here; the graph comes from deepstitch 9.9",
        ),
        (lambda folder: edit(folder, escape), r"'../secret' lies outside the bundle"),
        (lambda folder: edit(folder, forget_file), r"'decoder.onnx' is used but has no entry in 'files'"),
        (
            lambda folder: edit(folder, lambda raw: raw["graphs"].pop("decoder")),
            r"no graph 'decoder', only vision",
        ),
    ],
)
def test_damage_found_on_opening(bundle, damage, message):
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def set_shape(raw: dict) -> None:
    raw["graphs"]["decoder"]["inputs"][0]["shape"][2] = 64


def drop_cache_output(raw: dict) -> None:
    raw["graphs"]["decoder"]["outputs"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_shape,
            r"input 'inputs_embeds' is float32 \['B', 'S', 32\] in the graph, .* 64\] in the manifest",
        ),
        (drop_cache_output, r"output 'present.1.value' is not in the manifest"),
    ],
)
def test_graph_and_manifest_differ(bundle, change, message):
    edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        OrtEngine(Bundle.open(bundle))


def resave(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change the decoder and make the manifest agree again, as another exporter would."""
    model = onnx.load(folder / "decoder.onnx")
    change(model)
    onnx.save(model, folder / "decoder.onnx")
    write_manifest(folder, Manifest.read(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: setattr(model, "ir_version", 99),
            r"decoder.onnx: onnxruntime .*IR version.* install a newer onnxruntime than \d",
        ),
        (lambda model: setattr(model.opset_import[0], "version", 99), r"opset.* install a newer onnxruntime"),
        (
            lambda model: setattr(model.graph.node[0], "op_type", "Nonsense"),
            r"Nonsense.*export the checkpoint again",
        ),
    ],
)
def test_graphs_onnxruntime_refuses(bundle, change, message):
    resave(bundle, change)
    with pytest.raises(BundleError, match=message) as caught:
        OrtEngine(Bundle.open(bundle))
    assert "\n" not in str(caught.value)


def test_an_embedding_of_another_shape(bundle):
    table = {"embed_tokens.weight": weights()["embedding"][: VOCAB - 1]}
    safetensors.numpy.save_file(table, bundle / "weights.safetensors")
    write_manifest(bundle, Manifest.read(bundle))
    with pytest.raises(
        BundleError, match=r"embedding 'embed_tokens.weight' is F32 \[1023, 32\], expected \[1024, 32\]"
    ):
        EmbeddingTable.open(Bundle.open(bundle))


@pytest.fixture
def hashed(monkeypatch, tmp_path) -> list[str]:
    """Names of the files hashed, with a private stamp folder; every file over 10 kB counts as large."""
    names: list[str] = []
    real = verify.file_sha256

    def spy(path, progress=None):
        names.append(Path(path).name)
        return real(path, progress)

    monkeypatch.setattr(verify, "file_sha256", spy)
    monkeypatch.setattr(verify, "LARGE_FILE_BYTES", 10_000)
    monkeypatch.setenv("DEEPSTITCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DEEPSTITCH_VERIFY", raising=False)
    return names


def test_large_files_are_hashed_once(bundle, hashed):
    Bundle.open(bundle)
    assert "weights.safetensors" in hashed and "chat_template.jinja" in hashed
    hashed.clear()
    Bundle.open(bundle)
    assert "weights.safetensors" not in hashed and "chat_template.jinja" in hashed
    Bundle.open(bundle, verify="full")
    assert "weights.safetensors" in hashed


def test_a_touched_large_file_is_hashed_again(bundle, hashed):
    Bundle.open(bundle)
    flip_last_byte(bundle / "weights.safetensors")
    with pytest.raises(BundleError, match="its contents changed"):
        Bundle.open(bundle)


def test_a_stamp_of_other_contents_is_not_believed(bundle, hashed):
    """The bundle was exported again: the manifest names another hash."""
    Bundle.open(bundle)
    manifest = Manifest.read(bundle)
    record = manifest.files["weights.safetensors"]
    files = manifest.files | {"weights.safetensors": dataclasses.replace(record, sha256="0" * 64)}
    (bundle / "manifest.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(BundleError, match="its contents changed"):
        Bundle.open(bundle)


def test_the_level_can_be_set_from_outside(bundle, hashed, monkeypatch):
    monkeypatch.setenv("DEEPSTITCH_VERIFY", "size")
    Bundle.open(bundle)
    assert hashed == []
    with pytest.raises(InputError, match=r"verify='ful' .did you mean 'full'"):
        Bundle.open(bundle, verify="ful")
    monkeypatch.setenv("DEEPSTITCH_VERIFY", "never")
    with pytest.raises(InputError, match="DEEPSTITCH_VERIFY='never'"):
        Bundle.open(bundle)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_embeddings(bundle, dtype):
    table = weights()["embedding"]
    bits = (table.view(np.uint32) >> 16).astype(np.uint16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else table.astype(np.float16)
    data = bits if dtype == "BF16" else exact
    entry = {"dtype": dtype, "shape": list(table.shape), "data_offsets": [0, data.nbytes]}
    header = json.dumps({"embed_tokens.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + data.tobytes()
    (bundle / "weights.safetensors").write_bytes(content)
    write_manifest(bundle, Manifest.read(bundle))
    ids = np.array([3, 1023, 3])
    found = EmbeddingTable.open(Bundle.open(bundle))(ids)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, exact[ids].astype(np.float32))
