"""GGUF files from a checkpoint folder: the text part and the vision part (mmproj), as llama.cpp names their tensors.

    python -m benchmarks.peers.gguf_writer CHECKPOINT OUTPUT_FOLDER

Needs numpy and ``gguf``; runs in the Python that has llama.cpp. Names and metadata are those that llama.cpp's loaders
for ``qwen3vl``, ``qwen3vlmoe`` and the ``qwen3vl_merger`` projector ask for. Matrices keep the checkpoint's dtype;
one-dimensional tensors and the router are fp32, as in the converter that comes with llama.cpp.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deepstitch.tensorfile import TensorEntry, TensorFile, to_float32

if TYPE_CHECKING:
    import gguf

__all__ = ["GgufTensor", "text_tensors", "vision_tensors", "write_text", "write_vision"]

VISION_DTYPES = ("f32", "bf16", "f16", "q8_0")
_LAYER = "model.language_model.layers."
_ATTENTION = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
_BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
_TOP = {
    "model.language_model.embed_tokens.weight": "token_embd.weight",
    "model.language_model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.visual.pos_embed.weight": "v.position_embd.weight",
    "model.visual.patch_embed.proj.bias": "v.patch_embd.bias",
}
_MERGER = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
_TAP = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: in the GGUF.
        shape: slowest axis first.
        read: its values; bfloat16 as uint16 bits.
        dtype: safetensors name of what ``read`` returns: ``F32``, ``F16`` or ``BF16``.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]
    dtype: str


def _as_is(name: str, entry: TensorEntry) -> GgufTensor:
    if len(entry.shape) == 1 or name.endswith(("ffn_gate_inp.weight", "position_embd.weight")):
        return GgufTensor(name=name, shape=entry.shape, read=lambda: to_float32(entry.read(), entry.dtype), dtype="F32")
    return GgufTensor(name=name, shape=entry.shape, read=entry.read, dtype=entry.dtype)


def _half(name: str, entry: TensorEntry, half: int) -> GgufTensor:
    """Gate (0) or up (1) rows of ``[E, 2I, H]``."""
    experts, rows, width = entry.shape
    start = half * rows // 2
    return GgufTensor(
        name=name,
        shape=(experts, rows // 2, width),
        read=lambda: np.ascontiguousarray(entry.read()[:, start : start + rows // 2]),
        dtype=entry.dtype,
    )


def text_tensors(files: TensorFile) -> Iterator[GgufTensor]:
    """The text part of a checkpoint whose experts are ``[E, 2I, H]`` and ``[E, H, I]``."""
    for entry in files.values():
        if entry.name.startswith("model.visual."):
            continue
        if entry.name in _TOP:
            yield _as_is(_TOP[entry.name], entry)
            continue
        index, _, rest = entry.name.removeprefix(_LAYER).partition(".")
        if rest == "mlp.experts.gate_up_proj":
            yield _half(f"blk.{index}.ffn_gate_exps.weight", entry, 0)
            yield _half(f"blk.{index}.ffn_up_exps.weight", entry, 1)
        else:
            yield _as_is(f"blk.{index}.{_ATTENTION[rest]}", entry)


def vision_tensors(files: TensorFile, taps: list[int]) -> Iterator[GgufTensor]:
    """The vision part; ``taps`` are the blocks after which DeepStack features are taken."""
    for entry in files.values():
        if not entry.name.startswith("model.visual."):
            continue
        rest = entry.name.removeprefix("model.visual.")
        if rest == "patch_embed.proj.weight":  # two frames, which a still picture fills with itself
            for frame, suffix in enumerate(("", ".1")):
                yield _frame(f"v.patch_embd.weight{suffix}", entry, frame)
        elif entry.name in _TOP:
            yield _as_is(_TOP[entry.name], entry)
        else:
            yield _as_is(_vision_name(rest, taps), entry)


def _vision_name(rest: str, taps: list[int]) -> str:
    stem, _, kind = rest.rpartition(".")
    group, _, inner = stem.partition(".")
    if group == "merger":
        return f"{_MERGER[inner]}.{kind}"
    index, _, inner = inner.partition(".")
    if group == "deepstack_merger_list":
        return f"v.deepstack.{taps[int(index)]}.{_TAP[inner]}.{kind}"
    return f"v.blk.{index}.{_BLOCK[inner]}.{kind}"


def _frame(name: str, entry: TensorEntry, frame: int) -> GgufTensor:
    rows, channels, _, height, width = entry.shape

    def read() -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(to_float32(entry.read()[:, :, frame], entry.dtype))

    return GgufTensor(name=name, shape=(rows, channels, height, width), read=read, dtype="F32")


def write_text(checkpoint: Path, output: Path) -> None:
    """Write the text GGUF in the checkpoint's own dtype."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    text = config["text_config"]
    writer = gguf.GGUFWriter(output, "qwen3vlmoe" if "num_experts" in text else "qwen3vl")
    tensors = list(text_tensors(TensorFile.open(checkpoint / "model.safetensors")))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if _dtype(tensors) == "BF16" else gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_sections([*text["rope_parameters"]["mrope_section"], 0])
    writer.add_num_deepstack_layers(len(config["vision_config"]["deepstack_visual_indexes"]))
    if "num_experts" in text:
        writer.add_expert_count(text["num_experts"])
        writer.add_expert_used_count(text["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    _add_tokenizer(writer, checkpoint, text["vocab_size"])
    _write(writer, tensors, None)


def write_vision(checkpoint: Path, output: Path, dtype: str) -> None:
    """Write the mmproj GGUF with matrices of ``dtype``, one of :data:`VISION_DTYPES`."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    pixels = json.loads((checkpoint / "preprocessor_config.json").read_text("utf-8"))
    vision = config["vision_config"]
    writer = gguf.GGUFWriter(output, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
    writer.add_vision_use_gelu(True)
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(round(vision["num_position_embeddings"] ** 0.5) * vision["patch_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_image_mean(pixels["image_mean"])
    writer.add_vision_image_std(pixels["image_std"])
    writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    writer.add_vision_attention_layernorm_eps(1e-6)
    taps = vision["deepstack_visual_indexes"]
    writer.add_vision_is_deepstack_layers([index in taps for index in range(vision["depth"])])
    _write(writer, list(vision_tensors(TensorFile.open(checkpoint / "model.safetensors"), taps)), dtype)


def _dtype(tensors: list[GgufTensor]) -> str:
    return next(each.dtype for each in tensors if each.name == "token_embd.weight")


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, vocab: int) -> None:
    """The checkpoint's byte-level BPE; ids above its own vocabulary get names nothing is tokenised into."""
    import gguf

    described = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    tokens = [f"[UNUSED{index}]" for index in range(vocab)]
    types = [int(gguf.TokenType.UNUSED)] * vocab
    for token, index in described["model"]["vocab"].items():
        tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
    for added in described["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], int(gguf.TokenType.CONTROL)
    merges = described["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)


def _write(writer: gguf.GGUFWriter, tensors: list[GgufTensor], matrices: str | None) -> None:
    """Write metadata, then the tensors one by one; ``matrices`` converts all but the one-dimensional ones."""
    import gguf

    kinds = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in VISION_DTYPES}
    plan: list[tuple[GgufTensor, gguf.GGMLQuantizationType]] = []
    for tensor in tensors:
        keep = matrices is None or len(tensor.shape) == 1 or tensor.name.startswith(("v.position", "v.patch"))
        kind = kinds[(tensor.dtype if keep or matrices is None else matrices).lower()]
        nbytes = _nbytes(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        plan.append((tensor, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in plan:
        values = tensor.read()
        if kinds[tensor.dtype.lower()] != kind:
            values = gguf.quants.quantize(to_float32(values, tensor.dtype), kind)
        writer.write_tensor_data(np.ascontiguousarray(values))
    writer.close()


def _nbytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // values * size


def main() -> None:
    """Write the text GGUF and one mmproj per dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    write_text(given.checkpoint, given.output / "text.gguf")
    for dtype in VISION_DTYPES:
        write_vision(given.checkpoint, given.output / f"mmproj-{dtype}.gguf", dtype)


if __name__ == "__main__":
    main()
