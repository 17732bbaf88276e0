"""Bytes one decoding step has to read: the weights it uses and the KV cache; and what that makes of the bandwidth."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.peers.figures import FIGURES
from benchmarks.peers.peers import Candidate, Variant
from deepstitch.manifest import Manifest
from deepstitch.tensorfile import TensorFile

__all__ = ["annotate", "cache_bytes", "step_bytes", "tensor_bytes", "text_bytes"]

_CACHE_BYTES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "float32": 4.0,
    "float16": 2.0,
    "int8": 1.0,
    "uint8": 0.5,
}
_EXPERTS = re.compile(r"\.experts\.|_exps\.")
_VISION = re.compile(r"visual|vision|^v\.|^mm\.")
_EMBEDDING = re.compile(r"embed_tokens|^token_embd")


def tensor_bytes(peer: str, variant: str, files: Mapping[str, str]) -> dict[str, int]:
    """Bytes of every stored tensor of what a peer runs; as it computes with them, for transformers."""
    if peer == "llama.cpp":
        return json.loads(Path(files["text"]).with_suffix(".json").read_text("utf-8"))
    if "bundle" in files:
        paths = sorted(Path(files["bundle"]).rglob("*.safetensors"))  # by reference, the checkpoint's
        return {entry.name: entry.nbytes for path in paths for entry in TensorFile.open(path).values()}
    path = Path(files["checkpoint"], "model.safetensors")
    factor = 2 if variant == "fp32" else 1  # stored as bfloat16
    return {entry.name: entry.nbytes * factor for entry in TensorFile.open(path).values()}


def text_bytes(tensors: Mapping[str, int]) -> int:
    """All tensors but those of the vision encoder: the decoder and its embedding."""
    return sum(nbytes for name, nbytes in tensors.items() if not _VISION.search(name))


def step_bytes(tensors: Mapping[str, int], text: Mapping[str, Any], *, tied: bool) -> float:
    """Weights that one token of the decoder touches: of the experts, those that are chosen."""
    share = text["num_experts_per_tok"] / text["num_experts"] if "num_experts" in text else 1.0
    head = any(re.search(r"lm_head|^output\.weight", name) for name in tensors)
    total = 0.0
    for name, nbytes in tensors.items():
        if _VISION.search(name) or (_EMBEDDING.search(name) and (head or not tied)):
            continue
        total += nbytes * (share if _EXPERTS.search(name) else 1.0)
    return total


def cache_bytes(text: Mapping[str, Any], tokens: int, dtype: str) -> float:
    """Keys and values of ``tokens`` tokens in ``dtype``."""
    per_token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"]
    return per_token * tokens * _CACHE_BYTES[dtype]


class Measured(Protocol):
    """What :func:`annotate` needs of a case."""

    peer: str
    variant: Variant
    text: dict[str, Any]
    tied: bool
    files: dict[str, str]
    chosen: dict[str, Candidate]


def annotate(case: Measured, figures: dict[str, dict[str, Any]], bandwidth: float | None) -> dict[str, Any]:
    """Add to each ``decode`` figure its bytes per step and the share of the bandwidth they make; to ``memory``, what a
    step and its cache would need at least.

    Returns:
        ``text_bytes`` and ``vision_bytes`` as stored, and ``step_bytes`` of the weights.
    """
    if "model" in case.files:  # the tensors of a graph made by another exporter are not told apart
        return {"file_bytes": _file_bytes(case)}
    tensors = tensor_bytes(case.peer, case.variant.name, case.files)
    weights = step_bytes(tensors, case.text, tied=case.tied)
    text = text_bytes(tensors)
    for name, figure in figures.items():
        kind = FIGURES[name].kind
        if kind not in ("decode", "memory"):
            continue
        cache = cache_bytes(case.text, FIGURES[name].tokens, _cache_dtype(case, name))
        if kind == "decode":
            figure["bytes_per_step"] = weights + cache
            if bandwidth:
                figure["bandwidth_share"] = (weights + cache) * figure["median"] / bandwidth
        else:
            needed = (text + cache) / 2**20
            figure["over_weights_and_cache"] = figure["median"] / needed
            figure["over_without_interpreter"] = (figure["median"] - figure["base_mib"]) / needed
    return {"text_bytes": text, "file_bytes": _file_bytes(case), "step_weight_bytes": weights}


def _cache_dtype(case: Measured, figure: str) -> str:
    if case.peer == "llama.cpp":
        return str(case.chosen[figure].settings.get("kv", "f16"))
    if "bundle" in case.files:
        graph = Manifest.read(case.files["bundle"]).graphs["decoder"]
        return next(spec.dtype for spec in graph.inputs if spec.name.startswith("past_key_values."))
    return "bf16" if case.variant.name == "bf16" else "f32"


def _file_bytes(case: Measured) -> int:
    """Everything on disk that the runtime reads: a folder, or a GGUF and the projector in half precision."""
    for key in ("bundle", "model"):
        if key in case.files:
            return sum(path.stat().st_size for path in Path(case.files[key]).rglob("*") if path.is_file())
    if "text" in case.files:
        text = Path(case.files["text"])
        return text.stat().st_size + (text.parent / "mmproj-f16.gguf").stat().st_size
    return Path(case.files["checkpoint"], "model.safetensors").stat().st_size
