"""Checkpoints to measure on: published shapes as sparse files, and small random models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.models.build import expected_parameters
from deepstitch.models.config import ModelConfig
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.tensorfile import DTYPE_BYTES

__all__ = ["SHAPES", "shape_config", "write_random_checkpoint", "write_sparse_checkpoint"]

_SHARD_BYTES = 5_000_000_000
_BLOCK_VALUES = 1 << 24
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)


def _vl(vision: dict[str, Any], *, tied: bool = False, **text: Any) -> dict[str, Any]:
    family = "qwen3_vl_moe" if "num_experts" in text else "qwen3_vl"
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
        "architectures": [f"Qwen3VL{'Moe' if family.endswith('moe') else ''}ForConditionalGeneration"],
        "model_type": family,
        "tie_word_embeddings": tied,
        **{key: sample[key] for key in ids},
        "text_config": {"model_type": f"{family}_text", **common, **text},
        "vision_config": {
            "model_type": "qwen3_vl_moe_vision" if family == "qwen3_vl_moe" else family,
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

_VIT_8 = {
    "depth": 8,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [1, 3, 5],
}

_VIT_TINY = {
    "depth": 6,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "deepstack_visual_indexes": [1, 3, 5],
}

_TEXT: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
    },
    "30b-a3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "235b-a22b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
    },
    "mid": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
    },
    "slice": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "dense": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
_VISION = {"tiny": _VIT_TINY, "30b-a3b": _VIT_27, "235b-a22b": _VIT_27, "mid": _VIT_12}

SHAPES = tuple(_TEXT)


def shape_config(name: str, *, vision: str | None = None) -> dict[str, Any]:
    """config.json of a shape.

    Args:
        name: ``30b-a3b`` and ``235b-a22b`` have the published sizes; ``mid`` is a 0.77B MoE, ``slice`` four layers of
            30B-A3B, ``dense`` eight layers as wide as those of the 2B model, which ties its embeddings too; ``tiny``
            is for trying things out.
        vision: ``"8x1024"`` puts 8 blocks of width 1024 in the place of the shape's own vision encoder, and is what
            ``slice`` and ``dense`` have anyway.
    """
    own = _VISION.get(name, _VIT_8)
    return _vl(_VIT_8 if vision == "8x1024" else own, tied=name == "dense", head_dim=128, **_TEXT[name])


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
    weight_map: dict[str, str] = {}
    total = 0
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


def write_random_checkpoint(
    config: dict[str, Any], folder: Path, seed: int = 0, *, dtype: str = "F32", max_pixels: int | None = None
) -> None:
    """Write one safetensors file of random weights, block by block.

    Experts are in the layout transformers 5 saves: where 2I == H, as in ``mid``, it takes the published layout for its
    own and computes something else, silently.

    Args:
        config: config.json.
        folder: to create.
        seed: of the weights.
        dtype: ``"F32"`` or ``"BF16"``.
        max_pixels: largest picture the processor leaves at its size; None keeps the sample model's.
    """
    tensors = _prepare(config, folder)
    if max_pixels is not None:
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text("utf-8"))
        settings["size"]["longest_edge"] = max_pixels
        path.write_text(json.dumps(settings, indent=1), "utf-8")
    for name, shape in tensors.items():
        if ".mlp.experts." in name:
            tensors[name] = (shape[0], shape[2], shape[1])
    generator = np.random.default_rng(seed)
    header, _ = _header(tensors, dtype)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(header)
        for name, shape in tensors.items():
            for values in _random_blocks(name, shape, generator):
                out.write(values.tobytes() if dtype == "F32" else _bf16(values).tobytes())


def _random_blocks(
    name: str, shape: tuple[int, ...], generator: np.random.Generator
) -> Iterator[npt.NDArray[np.float32]]:
    if len(shape) == 1:
        yield np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        return
    for start in range(0, math.prod(shape), _BLOCK_VALUES):
        count = min(_BLOCK_VALUES, math.prod(shape) - start)
        yield generator.standard_normal(count, dtype=np.float32) * np.float32(0.02)


def _bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
