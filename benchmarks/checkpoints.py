"""Checkpoints to measure on: published shapes as sparse files, and small random models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from deepstitch.models.build import expected_parameters
from deepstitch.models.config import ModelConfig
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.tensorfile import DTYPE_BYTES

__all__ = ["SHAPES", "shape_config", "write_random_checkpoint", "write_sparse_checkpoint"]

_SHARD_BYTES = 5_000_000_000
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)


def _vl_moe(vision: dict[str, Any], **text: Any) -> dict[str, Any]:
    sample = json.loads((CHECKPOINT / "config.json").read_text("utf-8"))
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    head_dim = text["head_dim"]
    section = [24, 20, 20] if head_dim == 128 else sample["text_config"]["rope_parameters"]["mrope_section"]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": section, "mrope_interleaved": True}
    common = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "rope_parameters": rope,
    }
    vision = {"in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision}
    return {
        "model_type": "qwen3_vl_moe",
        "tie_word_embeddings": False,
        **{key: sample[key] for key in ids},
        "text_config": {"model_type": "qwen3_vl_moe_text", **common, **text},
        "vision_config": {
            "model_type": "qwen3_vl_moe_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            **vision,
        },
    }


_VIT_27 = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}
_VIT_12 = {
    "depth": 12,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_heads": 6,
    "deepstack_visual_indexes": [3, 6, 9],
}

SHAPES = ("30b-a3b", "235b-a22b", "mid")


def shape_config(name: str) -> dict[str, Any]:
    """config.json of a shape. ``30b-a3b`` and ``235b-a22b`` have the published sizes; ``mid`` is a 0.77B MoE."""
    if name == "30b-a3b":
        return _vl_moe(
            _VIT_27,
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        )
    if name == "235b-a22b":
        return _vl_moe(
            _VIT_27,
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1536,
        )
    return _vl_moe(
        _VIT_12,
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
    )


def _prepare(config: dict[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}), "utf-8")
    for name in _TOKENIZER_FILES:
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return expected_parameters(ModelConfig.from_dict(config))


def _header(tensors: dict[str, tuple[int, ...]], dtype: str) -> tuple[bytes, int]:
    entries, position = {}, 0
    for name, shape in tensors.items():
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(entries).encode()
    return len(encoded).to_bytes(8, "little") + encoded, position


def write_sparse_checkpoint(config: dict[str, Any], folder: Path) -> int:
    """Write bf16 shards whose data are holes: full size to every reader, kilobytes on disk.

    Returns:
        Bytes of all shards together.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in _prepare(config, folder).items():
        nbytes = 2 * math.prod(shape)
        if filled and filled + nbytes > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, data_bytes = _header(tensors, "BF16")
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + data_bytes)
        weight_map |= dict.fromkeys(tensors, file)
        total += len(header) + data_bytes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return total


def write_random_checkpoint(config: dict[str, Any], folder: Path, seed: int = 0) -> None:
    """Write one fp32 safetensors file of random weights, tensor by tensor.

    Experts are in the layout transformers 5 saves: where 2I == H, as in ``mid``, it takes the published layout for its
    own and computes something else, silently.
    """
    tensors = _prepare(config, folder)
    for name, shape in tensors.items():
        if ".mlp.experts." in name:
            tensors[name] = (shape[0], shape[2], shape[1])
    generator = np.random.default_rng(seed)
    header, _ = _header(tensors, "F32")
    with (folder / "model.safetensors").open("wb") as out:
        out.write(header)
        for name, shape in tensors.items():
            if len(shape) == 1:
                values = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
            else:
                values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            out.write(values.tobytes())
