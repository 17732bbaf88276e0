"""A checkpoint's tensors under the names and in the shapes llama.cpp's loaders ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.gguf_writer import text_tensors, vision_tensors, write_text, write_vision
from deepstitch.tensorfile import TensorFile

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, WIDTH, LAYERS = 64, 4, 2, 32, 6, 48, 4


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(layout="transformers")


@pytest.fixture
def files(checkpoint: Path) -> TensorFile:
    return TensorFile.open(checkpoint / "model.safetensors")


def test_text_names_and_shapes(files: TensorFile) -> None:
    shapes = {tensor.name: tensor.shape for tensor in text_tensors(files)}
    layer = {
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "attn_q_norm": (HEAD_DIM,),
        "attn_k_norm": (HEAD_DIM,),
        "ffn_gate_inp": (EXPERTS, HIDDEN),
        "ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN),
        "ffn_up_exps": (EXPERTS, WIDTH, HIDDEN),
        "ffn_down_exps": (EXPERTS, HIDDEN, WIDTH),
    }
    vocab = files["lm_head.weight"].shape[0]
    expected = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    expected |= {
        "token_embd.weight": (vocab, HIDDEN),
        "output.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    assert shapes == expected


def test_gate_and_up_are_the_halves_of_their_tensor(files: TensorFile) -> None:
    tensors = {tensor.name: tensor for tensor in text_tensors(files)}
    joined = files["model.language_model.layers.2.mlp.experts.gate_up_proj"].read()
    np.testing.assert_array_equal(tensors["blk.2.ffn_gate_exps.weight"].read(), joined[:, :WIDTH])
    np.testing.assert_array_equal(tensors["blk.2.ffn_up_exps.weight"].read(), joined[:, WIDTH:])


def test_dense_and_tied(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen3_vl", tied=True)
    names = {tensor.name for tensor in text_tensors(TensorFile.open(folder / "model.safetensors"))}
    assert {f"blk.3.ffn_{part}.weight" for part in ("gate", "up", "down")} <= names
    assert "output.weight" not in names


def test_vision_names(files: TensorFile) -> None:
    tensors = {tensor.name: tensor for tensor in vision_tensors(files, [0, 2, 3])}
    taps = {name for name in tensors if name.startswith("v.deepstack.")}
    parts = ("norm", "fc1", "fc2")
    assert taps == {
        f"v.deepstack.{tap}.{part}.{kind}" for tap in (0, 2, 3) for part in parts for kind in ("weight", "bias")
    }
    assert {"v.post_ln.weight", "mm.0.weight", "mm.2.bias", "v.blk.3.ffn_down.weight"} <= tensors.keys()
    patch = files["model.visual.patch_embed.proj.weight"].read()
    np.testing.assert_array_equal(tensors["v.patch_embd.weight"].read(), patch[:, :, 0])
    np.testing.assert_array_equal(tensors["v.patch_embd.weight.1"].read(), patch[:, :, 1])


def test_files_read_back(checkpoint: Path, files: TensorFile, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_text(checkpoint, tmp_path / "text.gguf")
    write_vision(checkpoint, tmp_path / "vision.gguf", "f16")
    reader = gguf.GGUFReader(tmp_path / "text.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    for expected in text_tensors(files):
        tensor = found[expected.name]
        assert tuple(reversed(tensor.shape.tolist())) == expected.shape
        np.testing.assert_array_equal(tensor.data.reshape(expected.shape), expected.read())
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))["text_config"]
    assert reader.get_field("general.architecture").contents() == "qwen3vlmoe"
    assert reader.get_field("qwen3vlmoe.n_deepstack_layers").contents() == 3
    assert reader.get_field("qwen3vlmoe.rope.dimension_sections").contents() == [6, 5, 5, 0]
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == config["vocab_size"]
    vision = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "vision.gguf").tensors}
    assert vision["v.blk.0.attn_qkv.weight"] == "F16"
    assert vision["v.blk.0.attn_qkv.bias"] == vision["v.patch_embd.weight"] == "F32"
