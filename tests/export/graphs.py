"""Runs graphs in ONNX Runtime, beside the PyTorch models, on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from deepstitch.export.facts import embedding_name
from deepstitch.export.weights import WeightPlan
from deepstitch.models import ModelConfig
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.models.ops import CompactDeepStack
from deepstitch.models.text import KVCache
from deepstitch.models.vl import vision_tensors
from deepstitch.runtime.preprocess.vision_inputs import vision_inputs

Arrays = dict[str, np.ndarray]
STALE = 7.0  # what unused cache slots hold; reading one shows


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a decoder graph: tokens in the cache and new tokens of each row."""

    past: tuple[int, ...]
    new: tuple[int, ...]

    @property
    def needs_batched_continuation(self) -> bool:
        return len(self.past) > 1 and max(self.new) > 1 and max(self.past) > 0


CALLS = {
    "ragged prefill": Call(past=(0, 0), new=(5, 3)),
    "chunk": Call(past=(3,), new=(4,)),
    "decode": Call(past=(6, 2), new=(1, 1)),
    "first token alone": Call(past=(0,), new=(1,)),
    "batched chunk": Call(past=(4, 1), new=(2, 3)),
}


def decoder_feeds(config: ModelConfig, call: Call, seed: int = 0) -> Arrays:
    """Random inputs of the decoder contract."""
    rng = np.random.default_rng(seed)
    text, rows, longest = config.text, len(call.past), max(call.new)
    capacity = max(call.past) + longest + 2
    feeds: Arrays = {
        "inputs_embeds": rng.standard_normal((rows, longest, text.hidden_size), dtype=np.float32),
        "position_ids": rng.integers(0, 300, (3, rows, longest)),
        "past_lengths": np.array(call.past, np.int32),
        "query_lengths": np.array(call.new, np.int32),
        "logit_index": np.stack([rng.integers(0, new, 2) for new in call.new]),
    }
    if config.num_deepstack:
        embeds = rng.standard_normal((4, config.num_deepstack * text.hidden_size), dtype=np.float32)
        embeds[0] = 0
        feeds |= {"deepstack_embeds": embeds}
        feeds |= {"deepstack_index": rng.integers(0, 4, (rows, longest)).astype(np.int32)}
    for layer in range(text.num_hidden_layers):
        for part in ("key", "value"):
            past = np.full((rows, text.num_key_value_heads, capacity, text.head_dim), STALE, np.float32)
            for row, length in enumerate(call.past):
                past[row, :, :length] = rng.standard_normal(past[row, :, :length].shape)
            feeds[f"past_key_values.{layer}.{part}"] = past
    return feeds


def vision_feeds(config: ModelConfig, grids: list[tuple[int, int, int]], seed: int = 0) -> Arrays:
    """Random inputs of the vision contract."""
    from deepstitch.export.facts import vision_facts

    assert config.vision is not None
    facts = vision_facts(config)
    assert facts is not None
    patches = sum(steps * height * width for steps, height, width in grids)
    pixels = np.random.default_rng(seed).standard_normal((patches, config.vision.patch_width), dtype=np.float32)
    return {"pixel_values": pixels, **vision_inputs(grids, facts)._asdict()}


@torch.no_grad()
def decoder_reference(model: Any, feeds: Arrays) -> Arrays:
    """What the PyTorch model makes of the same inputs."""
    given = {name: torch.from_numpy(array) for name, array in feeds.items()}
    layers = range(model.config.text.num_hidden_layers)
    past = [[given[f"past_key_values.{i}.{part}"] for i in layers] for part in ("key", "value")]
    cache = KVCache(*past, given["past_lengths"], given["query_lengths"])
    deepstack = None
    if "deepstack_embeds" in given:
        deepstack = CompactDeepStack(given["deepstack_embeds"], given["deepstack_index"])
    hidden = model.language_model(
        given["inputs_embeds"],
        given["position_ids"],
        input_deepstack_embeds=deepstack,
        cache=cache,
        final_rows=given["logit_index"],
    )
    results = {"logits": model.lm_head(hidden)}
    results |= {f"present.{i}.key": cache.keys[i] for i in layers}
    results |= {f"present.{i}.value": cache.values[i] for i in layers}
    return {name: tensor.numpy() for name, tensor in results.items()}


@torch.no_grad()
def vision_reference(model: Any, feeds: Arrays) -> Arrays:
    image_embeds, deepstack_embeds = model.visual(**vision_tensors(feeds))
    return {"image_embeds": image_embeds.numpy(), "deepstack_embeds": deepstack_embeds.numpy()}


def session(source: Path | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = str(source) if isinstance(source, Path) else source
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(source: Path | ir.Model, feeds: Arrays) -> Arrays:
    """All outputs by name, of a graph file or of a graph whose weights are in memory."""
    loaded = session(ir.serde.serialize_model(source).SerializeToString() if isinstance(source, ir.Model) else source)
    names = [output.name for output in loaded.get_outputs()]
    return dict(zip(names, loaded.run(names, feeds), strict=True))


def weight_plan(checkpoint: Checkpoint, *, weights: str = "fp32", by_reference: bool = False) -> WeightPlan:
    tied = embedding_name(checkpoint.config) if checkpoint.config.text.tie_word_embeddings else None
    return WeightPlan(checkpoint.sources(), weights=weights, by_reference=by_reference, tied=tied)


def with_weights(model: ir.Model, plan: WeightPlan) -> ir.Model:
    """A runnable copy: initializers hold what the plan would write."""
    model = model.clone()
    plan.bind(model)
    for name, value in model.graph.initializers.items():
        if name in plan.tensors:
            planned = plan.tensors[name]
            stored = np.concatenate([block.reshape(-1) for block in planned.blocks()]).reshape(planned.shape)
            value.const_value = ir.tensor(stored, name=name)
    return model


def valid_parts(results: Arrays, feeds: Arrays) -> Arrays:
    """Drops what the contract leaves open: cache slots behind a row's last token."""
    if "past_lengths" not in feeds:
        return results
    parts = {}
    used = feeds["past_lengths"] + feeds["query_lengths"]
    for name, array in results.items():
        if name.startswith("present."):
            parts |= {f"{name}[{row}]": array[row, :, :length] for row, length in enumerate(used)}
        else:
            parts[name] = array
    return parts


def errors(actual: Arrays, expected: Arrays, feeds: Arrays) -> dict[str, float]:
    """Max abs difference of every defined part, relative to the largest magnitude expected there."""
    assert actual.keys() == expected.keys()
    actual, expected = valid_parts(actual, feeds), valid_parts(expected, feeds)
    for name, array in expected.items():
        assert actual[name].shape == array.shape, name
    return {name: float(np.abs(actual[name] - array).max() / np.abs(array).max()) for name, array in expected.items()}


def assert_close(actual: Arrays, expected: Arrays, feeds: Arrays, tolerance: float = 1e-5) -> None:
    found = errors(actual, expected, feeds)
    assert {name: error for name, error in found.items() if not error <= tolerance} == {}


def op_counts(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs, subgraphs included; functions excluded."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        counts[name] = counts.get(name, 0) + 1
    return counts
