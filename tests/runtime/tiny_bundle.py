"""A hand-made bundle that obeys the graph contract, and its decoder once more in numpy.

The decoder has two attention layers with a DeepStack add after each; position enters as a sum of sines over
the three mRoPE axes. ``in_place=False`` writes the cache with TensorScatter and attends with plain ops;
``in_place=True`` uses GroupQueryAttention, whose refusals the runtime has to work around.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from deepstitch import __version__
from deepstitch.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    EmbeddingTable,
    FileRecord,
    Graph,
    Manifest,
    ModelFacts,
    TensorSpec,
    VisionFacts,
    file_sha256,
)
from deepstitch.models.sample.tokenizer import special_id, write_text_files

HIDDEN, HEADS, WIDTH, LAYERS, VOCAB, DEEPSTACK = 32, 2, 16, 2, 1024, 2
PATCH_WIDTH = 3 * 2 * 16 * 16
CONTEXT = 2048

MODEL = ModelFacts(
    model_type="qwen3_vl_moe",
    hidden_size=HIDDEN,
    vocab_size=VOCAB,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    head_dim=WIDTH,
    max_position_embeddings=CONTEXT,
    num_deepstack=DEEPSTACK,
    num_parameters=1,
    num_active_parameters=1,
    kv_cache_in_place=False,
    batched_continuation=True,
    rope_theta=10000.0,
    mrope_section=(4, 2, 2),
    eos_token_ids=(special_id("<|im_end|>"),),
    image_token_id=special_id("<|image_pad|>"),
    video_token_id=special_id("<|video_pad|>"),
    vision_start_token_id=special_id("<|vision_start|>"),
    vision_end_token_id=special_id("<|vision_end|>"),
)
VISION = VisionFacts(
    in_channels=3,
    patch_size=16,
    temporal_patch_size=2,
    spatial_merge_size=2,
    num_grid_per_side=8,
    head_dim=8,
    rope_theta=10000.0,
    out_hidden_size=HIDDEN,
)


def weights() -> dict[str, np.ndarray]:
    """All weights; the logits they give are well spread, so that argmax is stable."""
    random = np.random.default_rng(7)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (random.standard_normal(shape) * scale).astype(np.float32)

    tensors = {"embedding": draw(VOCAB, HIDDEN), "frequency": draw(3, 1, 1, HIDDEN, scale=0.3)}
    for layer in range(LAYERS):
        for name in ("query", "key", "value", "output"):
            tensors[f"{name}{layer}"] = draw(HIDDEN, HIDDEN, scale=HIDDEN**-0.5)
    tensors["head"] = draw(HIDDEN, VOCAB, scale=0.7)
    tensors["patches"] = draw(PATCH_WIDTH, 8, scale=0.1)
    tensors["image"] = draw(8, HIDDEN)
    tensors["deepstack"] = draw(8, DEEPSTACK * HIDDEN)
    return tensors


def reference_logits(embeds: np.ndarray, positions: np.ndarray, deepstack: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The decoder over one whole row ``(n, H)``, no cache; ``deepstack`` has no zero row. ``(n, V)``."""
    tensors = weights()
    rows = np.concatenate([np.zeros((1, DEEPSTACK * HIDDEN), np.float32), deepstack])[index]
    count = len(embeds)
    hidden = embeds + np.sin(positions[:, :, None] * tensors["frequency"][:, 0]).sum(axis=0)
    for layer in range(LAYERS):
        query, key, value = (
            (hidden @ tensors[f"{name}{layer}"]).reshape(count, HEADS, WIDTH).transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(WIDTH)
        scores = np.where(np.tril(np.ones((count, count), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ value
        hidden = hidden + mixed.transpose(1, 0, 2).reshape(count, HIDDEN) @ tensors[f"output{layer}"]
        hidden = hidden + rows[:, layer * HIDDEN : (layer + 1) * HIDDEN]
    return hidden @ tensors["head"]


def write_tiny_bundle(folder: Path, *, in_place: bool = False, **changes: Any) -> Path:
    """Write a bundle into ``folder``; ``changes`` replace entries of the manifest's ModelFacts."""
    folder.mkdir(parents=True)
    write_text_files(folder)
    tensors = weights()
    safetensors.numpy.save_file({"embed_tokens.weight": tensors["embedding"]}, folder / "weights.safetensors")
    graphs = {"decoder": _decoder(tensors, in_place), "vision_encoder": _vision_encoder(tensors)}
    for name, model in graphs.items():
        onnx.save(model, folder / f"{name}.onnx")
    facts = {"kv_cache_in_place": in_place, "batched_continuation": not in_place} | changes
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        deepstitch_version=__version__,
        target="ort-cpu" if in_place else "portable",
        weights="fp32",
        command="tests",
        versions={"onnx": onnx.__version__},
        model=dataclasses.replace(MODEL, **facts),
        vision=VISION,
        embedding=EmbeddingTable(file="weights.safetensors", tensor="embed_tokens.weight"),
        graphs={name: _declare(f"{name}.onnx", model) for name, model in graphs.items()},
    )
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with fresh records of every file."""
    files = {
        path.relative_to(folder).as_posix(): FileRecord(sha256=file_sha256(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=files).to_json(), "utf-8")


def copy_bundle(source: Path, target: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(source, target))


class _Builder:
    """Collects nodes; every call returns the name of its output."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]

    def add(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        out = out or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def constant(self, value: Any, dtype: str = "int64") -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def model(self, name: str, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def _decoder(tensors: dict[str, np.ndarray], in_place: bool) -> onnx.ModelProto:
    used = ["frequency", "head"] + [n for n in tensors if n[-1].isdigit()]
    b = _Builder({name: tensors[name] for name in used})
    positions = b.add("Cast", "position_ids", to=TensorProto.FLOAT)
    angles = b.add("Mul", b.add("Unsqueeze", positions, b.constant([-1])), "frequency")
    signal = b.add("ReduceSum", b.add("Sin", angles), b.constant([0]), keepdims=0)
    hidden = b.add("Add", "inputs_embeds", signal)
    rows = b.add("Gather", "deepstack_embeds", "deepstack_index", axis=0)
    attend = _group_query_attention if in_place else _plain_attention
    for layer in range(LAYERS):
        parts = [b.add("MatMul", hidden, f"{name}{layer}") for name in ("query", "key", "value")]
        mixed = attend(b, layer, *parts)
        hidden = b.add("Add", hidden, b.add("MatMul", mixed, f"output{layer}"))
        bounds = [b.constant([layer * HIDDEN]), b.constant([(layer + 1) * HIDDEN]), b.constant([2])]
        hidden = b.add("Add", hidden, b.add("Slice", rows, *bounds))
    index = b.add("Unsqueeze", "logit_index", b.constant([-1]))
    b.add("MatMul", b.add("GatherND", hidden, index, batch_dims=1), "head", out="logits")
    cache = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    kv = ["B", HEADS, "C", WIDTH]
    value = helper.make_tensor_value_info
    inputs = [
        value("inputs_embeds", TensorProto.FLOAT, ["B", "S", HIDDEN]),
        value("position_ids", TensorProto.INT64, [3, "B", "S"]),
        value("deepstack_embeds", TensorProto.FLOAT, ["R", DEEPSTACK * HIDDEN]),
        value("deepstack_index", TensorProto.INT32, ["B", "S"]),
        value("past_lengths", TensorProto.INT32, ["B"]),
        value("query_lengths", TensorProto.INT32, ["B"]),
        value("logit_index", TensorProto.INT64, ["B", "L"]),
        *(value(f"past_key_values.{name}", TensorProto.FLOAT, kv) for name in cache),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["B", "L", VOCAB]),
        *(value(f"present.{name}", TensorProto.FLOAT, kv) for name in cache),
    ]
    return b.model("decoder", inputs, outputs)


def _group_query_attention(b: _Builder, layer: int, query: str, key: str, value: str) -> str:
    filled = b.add("Add", "past_lengths", "query_lengths")
    last = b.add("Sub", filled, b.constant([1], "int32"))
    total = b.add("ReduceMax", filled, keepdims=1)
    past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
    outputs = [f"mixed{layer}", f"present.{layer}.key", f"present.{layer}.value"]
    b.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            [query, key, value, *past, last, total],
            outputs,
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=HEADS,
            do_rotary=0,
        )
    )
    return outputs[0]


def _plain_attention(b: _Builder, layer: int, query: str, key: str, value: str) -> str:
    split = b.constant([0, 0, HEADS, WIDTH])
    heads = [b.add("Transpose", b.add("Reshape", each, split), perm=[0, 2, 1, 3]) for each in (query, key, value)]
    start = b.add("Cast", "past_lengths", to=TensorProto.INT64)
    for part, new in zip(("key", "value"), heads[1:], strict=True):
        names = [f"past_key_values.{layer}.{part}", new, start]
        b.add("TensorScatter", *names, out=f"present.{layer}.{part}", axis=2)
    zero, one = b.constant(0), b.constant(1)
    capacity = b.add("Squeeze", b.add("Shape", f"present.{layer}.key", start=2, end=3))
    width = b.add("Squeeze", b.add("Shape", "inputs_embeds", start=1, end=2))
    keys, queries = b.add("Range", zero, capacity, one), b.add("Range", zero, width, one)
    places = b.add("Add", b.add("Unsqueeze", start, b.constant([1])), queries)  # (B, S)
    visible = b.add("LessOrEqual", keys, b.add("Unsqueeze", places, b.constant([1, 3])))  # (B, 1, S, C)
    scores = b.add("MatMul", heads[0], b.add("Transpose", f"present.{layer}.key", perm=[0, 1, 3, 2]))
    scores = b.add("Mul", scores, b.constant(WIDTH**-0.5, "float32"))
    masked = b.add("Where", visible, scores, b.constant(-1e30, "float32"))
    mixed = b.add("MatMul", b.add("Softmax", masked), f"present.{layer}.value")
    return b.add("Reshape", b.add("Transpose", mixed, perm=[0, 2, 1, 3]), b.constant([0, 0, HIDDEN]))


def _vision_encoder(tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Each visual token depends on its own four patches alone: on pixels, position taps and rotary angle."""
    b = _Builder({name: tensors[name] for name in ("patches", "image", "deepstack")})
    pixels = b.add("MatMul", "pixel_values", "patches")
    indices = b.add("Cast", "position_indices", to=TensorProto.FLOAT)
    taps = b.add("ReduceSum", b.add("Mul", indices, "position_weights"), b.constant([0]), keepdims=0)
    angles = b.add("ReduceSum", b.add("Add", "rotary_cos", "rotary_sin"), b.constant([1]), keepdims=1)
    place = b.add("Sin", b.add("Add", b.add("Unsqueeze", taps, b.constant([1])), angles))
    groups = b.add("Reshape", b.add("Tanh", b.add("Add", pixels, place)), b.constant([-1, 4, 8]))
    merged = b.add("ReduceMean", groups, b.constant([1]), keepdims=0)
    b.add("MatMul", merged, "image", out="image_embeds")
    b.add("MatMul", merged, "deepstack", out="deepstack_embeds")
    value, half = helper.make_tensor_value_info, VISION.head_dim // 2
    inputs = [
        value("pixel_values", TensorProto.FLOAT, ["P", PATCH_WIDTH]),
        value("position_indices", TensorProto.INT64, [4, "P"]),
        value("position_weights", TensorProto.FLOAT, [4, "P"]),
        value("rotary_cos", TensorProto.FLOAT, ["P", half]),
        value("rotary_sin", TensorProto.FLOAT, ["P", half]),
        value("cu_seqlens", TensorProto.INT32, ["N+1"]),
    ]
    outputs = [
        value("image_embeds", TensorProto.FLOAT, ["T", HIDDEN]),
        value("deepstack_embeds", TensorProto.FLOAT, ["T", DEEPSTACK * HIDDEN]),
    ]
    return b.model("vision_encoder", inputs, outputs)


def _declare(file: str, model: onnx.ModelProto) -> Graph:
    return Graph(
        file=file,
        opset=24,
        nodes=len(model.graph.node),
        inputs=tuple(map(_spec, model.graph.input)),
        outputs=tuple(map(_spec, model.graph.output)),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(each.dim_param or each.dim_value for each in kind.shape.dim)
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)
