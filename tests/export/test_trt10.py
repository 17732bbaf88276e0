"""The lowering to TensorRT 10: the graphs of ``portable``, and what is another way in them than in those for 8.6."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from deepstitch.errors import UnsupportedError
from deepstitch.export.compare.comparison import compare_bundle
from deepstitch.export.compare.definition_engine import DefinitionEngine
from deepstitch.export.compare.tolerance import Tolerance
from deepstitch.export.exporter import ExportConfig, export_checkpoint
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.plugins.common.schema import DOMAIN
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine.ort import OrtEngine

from .comparing import failures
from .graphs import vision_feeds
from .trt8_models import NARROW, WIDE, attributes, fitting, graphs, held_against, options, plugins

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]

EXACT = Tolerance.for_kinds("fp32")
MODELS = [
    pytest.param("qwen3_vl_moe", WIDE, "fp16", {}, id="vl_moe-fp16"),
    pytest.param("qwen3_vl_moe", WIDE, "int8", {}, id="vl_moe-int8", marks=pytest.mark.slow),
    pytest.param("qwen3_vl", NARROW, "fp32", {}, id="vl-narrow", marks=pytest.mark.slow),
    pytest.param("qwen3_vl", WIDE, "int4", {"tied": True}, id="vl-int4-tied", marks=pytest.mark.slow),
    pytest.param("qwen3", NARROW, "fp16", {"tied": True}, id="text-fp16-tied-narrow"),
]


@pytest.mark.parametrize(("family", "head_dim", "weights", "text"), MODELS)
def test_every_case_is_that_of_portable(
    family: str, head_dim: int, weights: str, text: dict[str, Any], checkpoints: Checkpoints, export: Export
) -> None:
    """Where the inputs of a layer are not rounded: the graphs say the same."""
    checkpoint = fitting(checkpoints, family, head_dim, **text)
    flags = options(checkpoint, weights)
    bundles = (export(checkpoint, target=target, **flags).bundle for target in ("portable", "trt10"))
    assert failures(held_against(*bundles, EXACT)) == {}


def test_the_product_compares_it(checkpoints: Checkpoints, export: Export) -> None:
    """With the products of fp16 that the graph asks for."""
    checkpoint = fitting(checkpoints, "qwen3_vl_moe")
    bundle = export(checkpoint, target="trt10", **options(checkpoint, "fp16")).bundle
    comparison = compare_bundle(Bundle.open(bundle), checkpoint=checkpoint.folder, progress=False)
    assert comparison.passed
    portable = export(checkpoint, target="portable", weights="fp16").bundle
    feeds = vision_feeds(checkpoint.config, [(1, 4, 6), (2, 2, 4)])
    rounded, exact = (
        engine(Bundle.open(folder), threads=1).graph("vision_encoder").run(feeds)["image_embeds"]
        for engine, folder in ((DefinitionEngine, bundle), (OrtEngine, portable))
    )
    assert 1e-4 < np.abs(rounded - exact).max() / np.abs(exact).max() < 5e-3, "inputs and products are rounded"


@pytest.fixture
def fp16(checkpoints: Checkpoints, export: Export) -> Path:
    checkpoint = fitting(checkpoints, "qwen3_vl_moe")
    return export(checkpoint, target="trt10", **options(checkpoint, "fp16")).bundle


def test_the_oldest_parser_could_read_it(fp16: Path) -> None:
    for model in graphs(fp16).values():
        assert {each.domain: each.version for each in model.opset_import} == {"": 20, DOMAIN: 1}
        assert model.ir_version == 9 and not model.functions
        assert all(all(node.input) for node in model.graph.node), "no input is left out"
        for node in plugins(model):
            found = attributes(node)
            assert (found["plugin_version"], found["plugin_namespace"]) == ("1", DOMAIN)


def test_halves_are_multiplied_and_summed_in_fp32(fp16: Path) -> None:
    """Factors are fp16, cast right in front of the product, which is rounded; nothing else is fp16 but experts."""
    for name, model in graphs(fp16).items():
        makers = {output: node for node in model.graph.node for output in node.output}
        stored = {each.name: each.data_type for each in model.graph.initializer}

        def is_half(value: str, makers: Any = makers, stored: Any = stored) -> bool:
            node = makers.get(value)
            if node is not None and node.op_type == "Transpose":
                return is_half(node.input[0])
            if node is None:
                return stored.get(value) == TensorProto.FLOAT16
            return node.op_type == "Cast" and attributes(node)["to"] == TensorProto.FLOAT16

        products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
        halves = 0
        for node in products:
            casts = [makers.get(each) for each in node.input]
            if any(cast is None or cast.op_type != "Cast" for cast in casts):
                assert "mlp.gate" in node.name or "patch_embed" in node.name, node.name
                continue
            assert len(casts) == 2 and all(is_half(cast.input[0]) for cast in casts), node.name
            (reader,) = [each for each in model.graph.node if node.output[0] in each.input]
            assert is_half(reader.output[0])
            halves += 1
        assert halves >= 8 and "QuantizedLinear" not in {node.op_type for node in plugins(model)}
        readers = {node.op_type for node in model.graph.node if any(map(is_half, node.input))}
        assert readers == ({"Cast", "MoEExperts"} if name == "decoder" else {"Cast"})


def test_what_the_parser_has_is_left_to_it(fp16: Path) -> None:
    vision = graphs(fp16)["vision_encoder"]
    operators = {node.op_type for node in vision.graph.node}
    assert {"Gelu", "LayerNormalization"} <= operators and not operators & {"Tanh", "Erf", "RotaryEmbedding"}


def test_flags_without_a_kernel(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = fitting(checkpoints, "qwen3_vl_moe")
    config = ExportConfig(
        checkpoint=checkpoint.folder, output=tmp_path / "out", target="trt10", progress=False, by_reference=True
    )
    with pytest.raises(UnsupportedError, match="--by-reference: --target trt10 stores weights in another order"):
        export_checkpoint(config)
    assert not (tmp_path / "out").exists()
