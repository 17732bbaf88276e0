"""Writes random checkpoint folders of every supported family, small enough to build thousands of times.

Tensor names and layouts are spelled out here rather than taken from ``deepstitch.models``, so that a mistake
there does not hide itself. No two axes are equal by accident: hidden 64, heads 4 x 32, experts 6 of width 48.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from deepstitch.models.sample.tokenizer import build_tokenizer, special_id, write_text_files

FAMILIES = ("qwen3_vl_moe", "qwen3_vl", "qwen3_moe", "qwen3")
LAYOUTS = ("hub", "transformers")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2, 3],
}


def write_tiny_checkpoint(
    folder: Path,
    *,
    family: str = "qwen3_vl_moe",
    layout: str = "hub",
    dtype: str = "F32",
    tied: bool = False,
    shards: int = 1,
    rope: str = "parameters",
    seed: int = 0,
    **text: Any,
) -> Path:
    """Write one checkpoint and return ``folder``.

    Tokenizer, chat template and processor files are the sample model's. ``layout`` says how stacked experts
    lie; for Qwen3-MoE ``"hub"`` is one tensor per expert, as published. ``rope`` is ``"parameters"`` or
    ``"scaling"``, the two spellings. ``text`` overrides entries of the text config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, tied=tied, rope=rope, **text)
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    _write_weights(folder, tiny_tensors(config, layout=layout, seed=seed), dtype, shards)
    write_text_files(folder)
    return folder


def tiny_config(family: str, *, tied: bool, rope: str, **text: Any) -> dict[str, Any]:
    """The config.json of a tiny model as a dict."""
    section: dict[str, Any] = {**TEXT, "vocab_size": build_tokenizer().get_vocab_size()}
    if "moe" in family:
        section |= MOE
    if "vl" in family:
        spec: dict[str, Any] = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    else:
        spec = {"rope_type": "default"}
        section |= {"norm_topk_prob": True} if "moe" in family else {}
    if rope == "parameters":
        section["rope_parameters"] = {"rope_theta": 10000.0, **spec}
    else:
        section |= {"rope_theta": 10000.0, "rope_scaling": spec if "vl" in family else None}
    section |= text
    if "vl" not in family:
        return {"model_type": family, "tie_word_embeddings": tied, **section}
    return {
        "model_type": family,
        "tie_word_embeddings": tied,
        "image_token_id": special_id("<|image_pad|>"),
        "video_token_id": special_id("<|video_pad|>"),
        "vision_start_token_id": special_id("<|vision_start|>"),
        "vision_end_token_id": special_id("<|vision_end|>"),
        "text_config": {"model_type": f"{family}_text", **section},
        "vision_config": {"model_type": family if family == "qwen3_vl" else f"{family}_vision", **VISION},
    }


def tiny_tensors(config: dict[str, Any], *, layout: str, seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors under the names of the published checkpoints."""
    family = config["model_type"]
    multimodal = "vl" in family
    text = config["text_config"] if multimodal else config
    rng = np.random.default_rng(seed)
    stacked = multimodal or layout == "transformers"
    prefix = "model.language_model." if multimodal else "model."
    tensors: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        norm = "norm" in name and name.endswith("weight")
        scale = 0.1 if norm or len(shape) == 1 else 0.5 / math.sqrt(shape[-1])
        tensors[name] = (rng.standard_normal(shape) * scale + (1.0 if norm else 0.0)).astype(np.float32)

    add(f"{prefix}embed_tokens.weight", text["vocab_size"], text["hidden_size"])
    for index in range(text["num_hidden_layers"]):
        _decoder_layer(add, f"{prefix}layers.{index}.", index, text, stacked=stacked, layout=layout)
    add(f"{prefix}norm.weight", text["hidden_size"])
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", text["vocab_size"], text["hidden_size"])
    if multimodal:
        _vision_encoder(add, config["vision_config"])
    return tensors


def _decoder_layer(add: Any, prefix: str, index: int, text: dict[str, Any], *, stacked: bool, layout: str) -> None:
    hidden, head_dim = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim
    for name, width in (("q", queries), ("k", keys), ("v", keys)):
        add(f"{prefix}self_attn.{name}_proj.weight", width, hidden)
    add(f"{prefix}self_attn.o_proj.weight", hidden, queries)
    for name, width in (("self_attn.q_norm", head_dim), ("self_attn.k_norm", head_dim)):
        add(f"{prefix}{name}.weight", width)
    for name in ("input_layernorm", "post_attention_layernorm"):
        add(f"{prefix}{name}.weight", hidden)
    experts = text.get("num_experts", 0)
    dense = index in text.get("mlp_only_layers", ()) or (index + 1) % text.get("decoder_sparse_step", 1) != 0
    if not experts or dense:
        _swiglu(add, f"{prefix}mlp.", hidden, text["intermediate_size"])
        return
    width = text["moe_intermediate_size"]
    add(f"{prefix}mlp.gate.weight", experts, hidden)
    if not stacked:
        for expert in range(experts):
            _swiglu(add, f"{prefix}mlp.experts.{expert}.", hidden, width)
        return
    shapes = {"gate_up_proj": (hidden, 2 * width), "down_proj": (width, hidden)}
    for name, shape in shapes.items():
        add(f"{prefix}mlp.experts.{name}", experts, *(shape if layout == "hub" else shape[::-1]))


def _swiglu(add: Any, prefix: str, hidden: int, width: int) -> None:
    add(f"{prefix}gate_proj.weight", width, hidden)
    add(f"{prefix}up_proj.weight", width, hidden)
    add(f"{prefix}down_proj.weight", hidden, width)


def _vision_encoder(add: Any, vision: dict[str, Any]) -> None:
    hidden, width, out = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]
    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    joined = hidden * vision["spatial_merge_size"] ** 2

    def linear(name: str, rows: int, columns: int) -> None:
        add(f"model.visual.{name}.weight", rows, columns)
        add(f"model.visual.{name}.bias", rows)

    def norm(name: str, size: int) -> None:
        add(f"model.visual.{name}.weight", size)
        add(f"model.visual.{name}.bias", size)

    add("model.visual.patch_embed.proj.weight", hidden, *patch)
    add("model.visual.patch_embed.proj.bias", hidden)
    add("model.visual.pos_embed.weight", vision["num_position_embeddings"], hidden)
    for index in range(vision["depth"]):
        for name in ("norm1", "norm2"):
            norm(f"blocks.{index}.{name}", hidden)
        linear(f"blocks.{index}.attn.qkv", 3 * hidden, hidden)
        linear(f"blocks.{index}.attn.proj", hidden, hidden)
        linear(f"blocks.{index}.mlp.linear_fc1", width, hidden)
        linear(f"blocks.{index}.mlp.linear_fc2", hidden, width)
    taps = range(len(vision["deepstack_visual_indexes"]))
    mergers = {"merger": hidden} | {f"deepstack_merger_list.{tap}": joined for tap in taps}
    for name, norm_width in mergers.items():
        norm(f"{name}.norm", norm_width)
        linear(f"{name}.linear_fc1", joined, joined)
        linear(f"{name}.linear_fc2", out, joined)


def _write_weights(folder: Path, tensors: dict[str, np.ndarray], dtype: str, shards: int) -> None:
    if shards == 1:
        _write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        chosen = names[shard::shards]
        _write_safetensors(folder / file, {name: tensors[name] for name in chosen}, dtype)
        weight_map |= dict.fromkeys(chosen, file)
    total = sum(tensor.size for tensor in tensors.values()) * (4 if dtype == "F32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    kind = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    save_file({name: tensor.astype(kind) for name, tensor in tensors.items()}, path, {"format": "pt"})
