"""Fused operators of ONNX Runtime beside the nodes they would replace, for :mod:`benchmarks.fusions`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from deepstitch.export.functions import OPSET

__all__ = ["operator_pairs"]

Feeds = dict[str, np.ndarray]
_REPEATS = 8  # so that a call is more than its own overhead
_MS = "com.microsoft"


def _normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng([len(shape), *shape]).standard_normal(shape, dtype=np.float32) * np.float32(scale)


def _model(
    nodes: list[onnx.NodeProto], feeds: Feeds, weights: dict[str, np.ndarray], *outputs: str, repeats: int = _REPEATS
) -> bytes:
    """``nodes`` repeated; each copy feeds its first output to the next as ``x``."""
    copies = []
    for turn in range(repeats):
        made = {name for node in nodes for name in node.output if name}
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for names in (copy.input, copy.output):
                names[:] = [f"{name}.{turn}" if name in made else name for name in names]
            if turn:
                copy.input[:] = [f"{outputs[0]}.{turn - 1}" if name == "x" else name for name in copy.input]
            copies.append(copy)
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    graph = helper.make_graph(
        copies,
        "pair",
        [helper.make_tensor_value_info(name, types[name], [None] * array.ndim) for name, array in feeds.items()],
        [helper.make_tensor_value_info(f"{name}.{repeats - 1}", onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MS, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11).SerializeToString()


def _norm_pairs(tokens: int) -> Iterator[tuple[str, tuple[bytes, bytes, Feeds]]]:
    feeds = {"x": _normal(1, tokens, 2048), "y": _normal(1, tokens, 2048)}
    add = helper.make_node("Add", ["x", "y"], ["sum"])
    for name, fused, weights in (
        ("RMSNormalization", "SkipSimplifiedLayerNormalization", {"weight": np.ones(2048, np.float32)}),
        (
            "LayerNormalization",
            "SkipLayerNormalization",
            {"weight": np.ones(2048, np.float32), "bias": np.zeros(2048, np.float32)},
        ),
    ):
        norm = helper.make_node(name, ["sum", *weights], ["normed"], axis=-1, epsilon=1e-6)
        skip = helper.make_node(fused, ["x", "y", *weights], ["normed", "", "", "sum"], domain=_MS, epsilon=1e-6)
        pair = _model([add, norm], feeds, weights, "normed"), _model([skip], feeds, weights, "normed"), feeds
        yield f"Add, {name} → {fused}: [{tokens}, 2048]", pair


def _rotary_pair(tokens: int) -> tuple[str, tuple[bytes, bytes, Feeds]]:
    heads, half = 32, 64
    feeds = {
        "x": _normal(1, tokens, heads * 2 * half),
        "cos": _normal(1, tokens, half),
        "sin": _normal(1, tokens, half),
        "rows": np.arange(3 * tokens).reshape(3, 1, tokens),
        "cos_rows": _normal(3 * tokens, half),
        "sin_rows": _normal(3 * tokens, half),
    }
    plain = helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["rotated"], num_heads=heads)
    multimodal = helper.make_node(
        "MRotaryEmbedding",
        ["x", "rows", "cos_rows", "sin_rows"],
        ["rotated"],
        domain=_MS,
        num_heads=heads,
        mrope_section=[24, 20, 20],
        mrope_layout=1,
    )
    name = f"RotaryEmbedding of prepared rows → MRotaryEmbedding: {tokens} tokens"
    return name, (_model([plain], feeds, {}, "rotated"), _model([multimodal], feeds, {}, "rotated"), feeds)


def _linear(
    name: str, source: str, result: str, rows: int, columns: int, bits: int
) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    if bits == 32:
        return helper.make_node("MatMul", [source, name], [result]), {name: _normal(columns, rows, scale=0.02)}
    block, generator = 32, np.random.default_rng(rows)
    shape = (rows, columns // block)
    weights = {
        f"{name}.integers": generator.integers(0, 256, (*shape, block * bits // 8), dtype=np.uint8),
        f"{name}.scales": generator.random(shape, dtype=np.float32) * np.float32(1e-3),
    }
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4}
    return helper.make_node("MatMulNBits", [source, *weights], [result], domain=_MS, **sizes), weights


def _packed_pair(label: str, parts: tuple[int, ...], bits: int, tokens: int) -> tuple[str, tuple[bytes, bytes, Feeds]]:
    width, feeds = 2048, {"x": _normal(1, tokens, 2048)}
    outputs = [f"part{index}" for index in range(len(parts))]
    separate, weights = [], {}
    for output, rows in zip(outputs, parts, strict=True):
        node, tensors = _linear(f"{output}.weight", "x", output, rows, width, bits)
        separate.append(node)
        weights |= tensors
    packed, packed_weights = _linear("weight", "x", "all", sum(parts), width, bits)
    split = helper.make_node("Split", ["all", "sizes"], outputs, axis=-1)
    packed_weights["sizes"] = np.array(parts)
    models = (
        _model(separate, feeds, weights, *outputs, repeats=1),
        _model([packed, split], feeds, packed_weights, *outputs, repeats=1),
    )
    form = "fp32" if bits == 32 else f"int{bits}"
    return f"{label} apart → packed, {form}: {tokens} tokens", (*models, feeds)


def _silu_pairs(tokens: int) -> Iterator[tuple[str, tuple[bytes, bytes, Feeds]]]:
    feeds = {"x": _normal(1, tokens, 6144), "up": _normal(1, tokens, 6144)}
    product = helper.make_node("Mul", ["gate", "up"], ["out"])
    sigmoid = [
        helper.make_node("Sigmoid", ["x"], ["sigmoid"]),
        helper.make_node("Mul", ["x", "sigmoid"], ["gate"]),
        product,
    ]
    for name, node in (
        ("QuickGelu", helper.make_node("QuickGelu", ["x"], ["gate"], domain=_MS, alpha=1.0)),
        ("Swish", helper.make_node("Swish", ["x"], ["gate"])),
    ):
        pair = _model(sigmoid, feeds, {}, "out"), _model([node, product], feeds, {}, "out"), feeds
        yield f"Sigmoid, Mul → {name}: [{tokens}, 6144]", pair


def operator_pairs() -> Iterator[tuple[str, tuple[bytes, bytes, Feeds]]]:
    """Name, and the two graphs with their inputs: first the nodes as they are lowered, then the fused operator."""
    for tokens in (1, 512):
        yield from _norm_pairs(tokens)
        yield _rotary_pair(tokens)
        for bits in (4, 8, 32):
            yield _packed_pair("q, k, v", (4096, 512, 512), bits, tokens)
            yield _packed_pair("gate, up", (6144, 6144), bits, tokens)
        yield from _silu_pairs(tokens)
