"""One table of damaged checkpoints: what is done to a good one, and what the refusal has to say.

Read by the tests of the reader (``tests/models``) and of the command line (``tests/test_bad_input.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
DECODER = "model.language_model."
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One way to spoil a checkpoint.

    Attributes:
        spoil: changes the folder.
        message: regular expression that the error has to match.
        options: of ``tiny_checkpoint``.
    """

    spoil: Callable[[Path], object]
    message: str
    options: Mapping[str, Any] = field(default_factory=dict)


def edit_tensors(edit: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """Rewrite the only weight file."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        edit(tensors)
        save_file(tensors, folder / SINGLE)

    return spoil


def edit_json(name: str, edit: Callable[[Any], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text("utf-8"))
        edit(content)
        (folder / name).write_text(json.dumps(content), "utf-8")

    return spoil


def set_config(section: str | None = None, **values: Any) -> Callable[[Path], None]:
    """Set entries of config.json, or of one section of it."""
    return edit_json("config.json", lambda config: (config[section] if section else config).update(values))


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def _copy_tensor_to_other_shard(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
    name = f"{DECODER}norm.weight"
    tensor = load_file(folder / weight_map[name])[name]
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[name])
    save_file({**load_file(folder / other), name: tensor}, folder / other)


def _swap_two_files(index: dict[str, Any]) -> None:
    files = sorted(set(index["weight_map"].values()))
    name = f"{DECODER}norm.weight"
    index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 61000000000\n"
SHARDED = {"shards": 3}
Q_PROJ = f"{DECODER}layers.1.self_attn.q_proj.weight"
EXPERTS = f"{DECODER}layers.2.mlp.experts"

DAMAGES: Mapping[str, Damage] = MappingProxyType(
    {
        # files
        "truncated": Damage(spoil=truncate(SINGLE), message=r"model\.safetensors: truncated .* download it again"),
        "truncated shard": Damage(spoil=truncate(SHARD), message=rf"{SHARD}: truncated", options=SHARDED),
        "corrupt header": Damage(
            spoil=overwrite(SINGLE, (8).to_bytes(8, "little") + b'{"a": [}'),
            message="damaged safetensors header",
        ),
        "git lfs pointer": Damage(spoil=overwrite(SINGLE, POINTER), message="Git LFS pointer"),
        "no weights": Damage(spoil=remove(SINGLE), message=r"no model\.safetensors"),
        "missing shard": Damage(
            spoil=remove(SHARD), message=rf"1 of 3 shards are missing: {SHARD}; download", options=SHARDED
        ),
        "no config": Damage(spoil=remove("config.json"), message=r"config\.json: not found"),
        "config is not json": Damage(spoil=overwrite("config.json", b"{"), message=r"config\.json: not valid JSON"),
        "config is a list": Damage(
            spoil=overwrite("config.json", b"[]"), message=r"config\.json: expected a JSON object"
        ),
        # index
        "index is not json": Damage(
            spoil=overwrite(INDEX, b"\xff"), message="not a safetensors index", options=SHARDED
        ),
        "index without map": Damage(spoil=overwrite(INDEX, b"{}"), message="not a safetensors index", options=SHARDED),
        "index leaves the folder": Damage(
            spoil=edit_json(INDEX, lambda index: index["weight_map"].update({"lm_head.weight": "../x.safetensors"})),
            message="must map tensor names to file names in this folder",
            options=SHARDED,
        ),
        "index names another file": Damage(
            spoil=edit_json(INDEX, _swap_two_files),
            message=r"'model\.language_model\.norm\.weight' should be in \S+ but is in",
            options=SHARDED,
        ),
        "index names a tensor that is not there": Damage(
            spoil=edit_json(INDEX, lambda index: index["weight_map"].update({"ghost.weight": SHARD})),
            message=r"'ghost\.weight' should be in \S+ but is not there",
            options=SHARDED,
        ),
        "tensor in two files": Damage(
            spoil=_copy_tensor_to_other_shard,
            message=r"'model\.language_model\.norm\.weight' is in two files",
            options=SHARDED,
        ),
        # accounting
        "missing tensor": Damage(
            spoil=edit_tensors(drop(Q_PROJ)), message=rf"1 tensors are missing: {Q_PROJ} \(did you mean"
        ),
        "missing expert tensor": Damage(
            spoil=edit_tensors(drop(f"{EXPERTS}.down_proj")),
            message=r"missing .*layers\.2\.mlp\.experts\.down_proj",
        ),
        "missing separate expert": Damage(
            spoil=edit_tensors(drop("model.layers.1.mlp.experts.4.up_proj.weight")),
            message=r"missing .*layers\.1\.mlp\.experts",
            options={"family": "qwen3_moe"},
        ),
        "extra tensor": Damage(
            spoil=edit_tensors(lambda tensors: tensors.update({"lora_A.weight": np.zeros(3, np.float32)})),
            message=r"1 tensors are not part of a qwen3_vl_moe model with this config: lora_A\.weight",
        ),
        "weights of another config": Damage(
            spoil=set_config("text_config", mlp_only_layers=[1]),
            message=r"tensors are missing \(.*\) and .* are not part .* do not belong together",
        ),
        "integer weights": Damage(
            spoil=edit_tensors(put(Q_PROJ, lambda q: q.astype(np.int32))),
            message=rf"{Q_PROJ}' has dtype I32; weights must",
        ),
        "double weights": Damage(
            spoil=edit_tensors(put(Q_PROJ, lambda q: q.astype(np.float64))),
            message=rf"{Q_PROJ}' has dtype F64; weights must",
        ),
        "integer experts": Damage(
            spoil=edit_tensors(put(f"{EXPERTS}.down_proj", lambda d: d.astype(np.int8))),
            message=r"experts\.down_proj' has dtype I8",
        ),
        "wrong shape": Damage(
            spoil=edit_tensors(put(Q_PROJ, lambda q: q[:-1])),
            message=rf"{Q_PROJ}' is \[127, 64\], config.json asks for \[128, 64\]",
        ),
        "transposed matrix": Damage(
            spoil=edit_tensors(put(Q_PROJ, np.transpose)),
            message=r"is \[64, 128\], config.json asks for \[128, 64\]",
        ),
        "one expert tensor transposed": Damage(
            spoil=edit_tensors(put(f"{EXPERTS}.down_proj", lambda d: d.swapaxes(1, 2))),
            message="fit neither layout of E=6, H=64, I=48",
        ),
        "an expert fewer": Damage(
            spoil=edit_tensors(put(f"{EXPERTS}.gate_up_proj", lambda g: g[:-1])), message="fit neither layout"
        ),
        "separate expert of another width": Damage(
            spoil=edit_tensors(put("model.layers.1.mlp.experts.4.up_proj.weight", lambda up: up[:-1])),
            message=r"experts\.4\.up_proj\.weight' is \[47, 64\], config.json asks for \[48, 64\]",
            options={"family": "qwen3_moe"},
        ),
    }
)
CONFIG_DAMAGES: Mapping[str, Damage] = MappingProxyType(
    {
        "unknown model type": Damage(
            spoil=set_config(model_type="qwen4_vl"),
            message="'qwen4_vl' is not supported; supported are qwen3_vl_moe, qwen3_vl, qwen3_moe, qwen3",
        ),
        "no model type": Damage(spoil=set_config(model_type=None), message="model_type None is not supported"),
        "unknown key": Damage(
            spoil=set_config("text_config", num_expert=6),
            message=r"unknown key num_expert \(did you mean 'num_experts'\?\)",
        ),
        "unknown top-level key": Damage(spoil=set_config(audio_config={}), message="unknown key audio_config"),
        "quantized": Damage(
            spoil=set_config(quantization_config={"quant_method": "fp8"}),
            message="quantization_config is .*, only None is supported",
        ),
        "missing key": Damage(
            spoil=set_config("text_config", hidden_size=None), message="text_config: missing key hidden_size"
        ),
        "text config is a list": Damage(
            spoil=set_config(text_config=[1]), message=r"text_config is \[1\], expected an object"
        ),
        "text for a number": Damage(
            spoil=set_config("text_config", num_hidden_layers="4"),
            message="num_hidden_layers is '4', expected a positive whole",
        ),
        "no layers": Damage(
            spoil=set_config("text_config", num_hidden_layers=0),
            message="num_hidden_layers is 0, expected a positive whole",
        ),
        "negative size": Damage(
            spoil=set_config("vision_config", hidden_size=-32),
            message="vision_config: hidden_size is -32, expected a positive",
        ),
        "image token is text": Damage(
            spoil=set_config(image_token_id="<img>"), message="image_token_id is '<img>', expected"
        ),
        "other activation": Damage(
            spoil=set_config("text_config", hidden_act="gelu"),
            message="hidden_act is 'gelu', only 'silu' is supported",
        ),
        "attention bias": Damage(
            spoil=set_config("text_config", attention_bias=True), message="attention_bias is True, only False"
        ),
        "sliding window": Damage(
            spoil=set_config("text_config", layer_types=["sliding_attention"] * 4),
            message="layer_types has entries other than",
        ),
        "yarn": Damage(
            spoil=set_config("text_config", rope_parameters={"rope_type": "yarn", "factor": 4.0}),
            message="rope type 'yarn' is not supported",
        ),
        "rope factor": Damage(
            spoil=set_config("text_config", rope_parameters={"rope_type": "default", "factor": 4.0}),
            message="rope key factor is not supported",
        ),
        "mrope section": Damage(
            spoil=set_config("text_config", rope_parameters={"mrope_section": [6, 5, 4]}),
            message=r"mrope_section \[6, 5, 4\] must have three entries that sum to head_dim/2 = 16",
        ),
        "mrope section is text": Damage(
            spoil=set_config("text_config", rope_parameters={"mrope_section": "6,5,5"}),
            message="mrope_section is '6,5,5'",
        ),
        "rope is text": Damage(
            spoil=set_config("text_config", rope_parameters="default"),
            message="rope_parameters is 'default', expected an object",
        ),
        "mrope in blocks": Damage(
            spoil=set_config("text_config", rope_parameters={"mrope_section": [6, 5, 5], "mrope_interleaved": False}),
            message="mrope_interleaved is false",
        ),
        "heads": Damage(
            spoil=set_config("text_config", num_key_value_heads=3),
            message="4 attention heads are not a multiple of 3",
        ),
        "too many experts per token": Damage(
            spoil=set_config("text_config", num_experts_per_tok=7),
            message=r"num_experts_per_tok 7 must lie in 1\.\.6",
        ),
        "dense layers without a width": Damage(
            spoil=set_config("text_config", intermediate_size=None, mlp_only_layers=[0]),
            message="missing key intermediate_size",
        ),
        "no experts": Damage(
            spoil=set_config("text_config", num_experts=0),
            message="num_experts is 0, which contradicts the model type",
        ),
        "no DeepStack taps": Damage(
            spoil=set_config("vision_config", deepstack_visual_indexes=[]),
            message=r"deepstack_visual_indexes \[\] must be",
        ),
        "DeepStack tap beyond the last block": Damage(
            spoil=set_config("vision_config", deepstack_visual_indexes=[0, 2, 4]),
            message=r"\[0, 2, 4\] must be .* of the 4 blocks",
        ),
        "more taps than decoder layers": Damage(
            spoil=set_config("text_config", num_hidden_layers=2),
            message="3 DeepStack taps need as many decoder layers, not 2",
        ),
        "vision width": Damage(
            spoil=set_config("vision_config", out_hidden_size=80),
            message="out_hidden_size 80 is not the text hidden_size 64",
        ),
        "position table": Damage(
            spoil=set_config("vision_config", num_position_embeddings=60),
            message="num_position_embeddings 60 is not a square",
        ),
    }
)


def damaged(make: Callable[..., Path], damage: Damage) -> Path:
    """A fresh checkpoint with one damage."""
    folder = make(**damage.options)
    damage.spoil(folder)
    return folder
