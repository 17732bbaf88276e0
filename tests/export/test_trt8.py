"""The lowering to TensorRT 8.6: graphs of the plugins' definitions are the graphs of ``portable``, number by number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from deepstitch.errors import BundleError, InputError
from deepstitch.export.compare.cases import select_cases
from deepstitch.export.compare.comparison import compare_bundle
from deepstitch.export.compare.tolerance import Tolerance
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.bundle import Bundle

from .comparing import edit_decoder, failures, spoiled
from .trt8_models import NARROW, WIDE, fitting, graphs, held_against, options, plugins

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]

EXACT = Tolerance.for_kinds("fp32")
MODELS = [
    pytest.param("qwen3_vl_moe", WIDE, "fp32", {}, id="vl_moe"),
    pytest.param("qwen3_vl_moe", WIDE, "fp16", {}, id="vl_moe-fp16", marks=pytest.mark.slow),
    pytest.param("qwen3_vl_moe", WIDE, "int8", {}, id="vl_moe-int8", marks=pytest.mark.slow),
    pytest.param("qwen3_vl_moe", WIDE, "int4", {}, id="vl_moe-int4"),
    pytest.param("qwen3_vl", NARROW, "fp32", {}, id="vl-narrow"),
    pytest.param("qwen3_vl", WIDE, "int4", {"tied": True}, id="vl-int4-tied"),
    pytest.param("qwen3_moe", NARROW, "int8", {}, id="moe-int8-narrow", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", WIDE, "fp32", {"norm_topk_prob": False}, id="moe-probabilities"),
    pytest.param("qwen3", WIDE, "int8", {"tied": True}, id="text-int8-tied"),
    pytest.param("qwen3", WIDE, "fp16", {"tied": True, "num_attention_heads": 8}, id="text-fp16-tied"),
]


@pytest.mark.parametrize(("family", "head_dim", "weights", "text"), MODELS)
def test_every_case_is_that_of_portable(
    family: str, head_dim: int, weights: str, text: dict[str, Any], checkpoints: Checkpoints, export: Export
) -> None:
    """Prefill of several sizes, in pieces and over a filled cache, decode, batches, pictures and clips."""
    checkpoint = fitting(checkpoints, family, head_dim, **text)
    flags = options(checkpoint, weights)
    bundles = (export(checkpoint, target=target, **flags).bundle for target in ("portable", "trt8"))
    assert failures(held_against(*bundles, EXACT)) == {}


@pytest.mark.parametrize("head_dim", [WIDE, pytest.param(NARROW, marks=pytest.mark.slow)])
def test_a_cache_of_fp16(head_dim: int, checkpoints: Checkpoints, export: Export) -> None:
    checkpoint = fitting(checkpoints, "qwen3", head_dim)
    portable, bundle = (export(checkpoint, target=target, kv_cache="fp16").bundle for target in ("portable", "trt8"))
    manifest = Bundle.open(bundle).manifest
    # a key between two halves may go to either
    assert failures(held_against(portable, bundle, Tolerance.for_bundles(manifest))) == {}
    caches = {each.dtype for each in manifest.graphs["decoder"].inputs if "past_key" in each.name}
    assert caches == {"float16"}
    assert len(plugins(graphs(bundle)["decoder"])) == 21 + (4 if head_dim == WIDE else 0)


def test_the_product_compares_it(checkpoints: Checkpoints, export: Export) -> None:
    """With inputs rounded to 8 bits, as the kernels do, and the stored integers held against the checkpoint."""
    checkpoint = fitting(checkpoints, "qwen3_vl_moe")
    bundle = export(checkpoint, target="trt8", **options(checkpoint, "int4")).bundle
    comparison = compare_bundle(Bundle.open(bundle), checkpoint=checkpoint.folder, progress=False)
    assert comparison.passed
    weights = [result for result in comparison.results if result.stage == "weights"]
    assert len(weights) == 2 and max(result.max_rel for result in weights) < 0.2
    rounded = max(result.max_rel for result in comparison.results if result.stage == "logits")
    assert rounded > 1e-3, "the definitions round the inputs of a layer"


def test_a_graph_of_unknown_plugins_is_refused(checkpoints: Checkpoints, export: Export, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "SparseAttention").op_type = "SparseAttenton"

    checkpoint = fitting(checkpoints, "qwen3")
    folder = spoiled(export(checkpoint, target="trt8", weights="fp16").bundle, tmp_path / "b", edit_decoder(rename))
    with pytest.raises(BundleError, match=r"decoder\.onnx: .* no plugin SparseAttenton .*SparseAttention.*export"):
        compare_bundle(Bundle.open(folder), checkpoint=checkpoint.folder, progress=False)


def test_against_portable_through_polygraphy(checkpoints: Checkpoints, export: Export, tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    checkpoint = fitting(checkpoints, "qwen3")
    bundle = Bundle.open(export(checkpoint, target="trt8", weights="fp16").bundle)
    reference = export(checkpoint, target="portable", weights="fp16").bundle
    cases = select_cases(["text"])
    comparison = compare_bundle(bundle, against="portable", reference=reference, cases=cases, progress=False)
    assert comparison.passed and comparison.polygraphy == {"text": True}
    with pytest.raises(InputError, match="there are no engines yet"):
        compare_bundle(bundle, checkpoint=checkpoint.folder, script=tmp_path / "script.py", progress=False)
