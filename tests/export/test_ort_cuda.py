"""Target ort-cuda: the numbers of the model, and nothing that would run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from deepstitch.errors import UnsupportedError
from deepstitch.export import ExportConfig, export_checkpoint
from deepstitch.export.exporter import QuantizationConfig
from deepstitch.export.passes.require_cuda_kernels import CudaKernels, RequireCudaKernels, element_types
from deepstitch.manifest import Manifest
from deepstitch.models.checkpoint import Checkpoint

from .comparing import expected, failures, results

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]

ROUNDED = QuantizationConfig(method="rtn")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "MoE": ("qwen3_vl_moe", {}),
    "MoE, fp16 weights": ("qwen3_vl_moe", {"weights": "fp16"}),
    "MoE, integers over a cache of fp16": (
        "qwen3_vl_moe",
        {"weights": "int4", "quantization": QuantizationConfig(method="rtn", symmetric=False), "kv_cache": "fp16"},
    ),
    "no renormalization": ("qwen3_moe", {}),
    "MoE, int8": ("qwen3_vl_moe", {"weights": "int8", "quantization": ROUNDED}),
    "dense": ("qwen3_vl", {"weights": "fp16"}),
    "text": ("qwen3", {"weights": "int4", "quantization": ROUNDED}),
}
SLOW = ("MoE, int8", "dense")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS]
)
def test_it_computes_what_the_model_does(variant: str, checkpoints: Checkpoints, export: Export) -> None:
    family, options = VARIANTS[variant]
    checkpoint = checkpoints(family, norm_topk_prob=False) if variant == "no renormalization" else checkpoints(family)
    bundle = export(checkpoint, target="ort-cuda", **options).bundle
    made = expected(bundle, checkpoint.folder)
    assert failures(results(bundle, made)) == {}
    assert len(made[0]) >= 5


def graphs(bundle: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in sorted(bundle.glob("*.onnx"))}


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those of branches and loops too."""
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += nodes(attribute.g)
    return found


def test_what_the_graphs_hold(checkpoints: Checkpoints, export: Export) -> None:
    checkpoint = checkpoints()
    bundle = export(checkpoint, target="ort-cuda").bundle
    for name, model in graphs(bundle).items():
        opsets = {each.domain: each.version for each in model.opset_import}
        assert opsets == {"": 17, "com.microsoft": 1} and model.ir_version == 8, name
        assert not model.functions
    decoder = graphs(bundle)["decoder"]
    scatters = [node for node in decoder.graph.node if node.op_type == "ScatterND"]
    outputs = {output.name for output in decoder.graph.output}
    inputs = {each.name for each in decoder.graph.input}
    pairs = {(node.input[0], node.output[0]) for node in scatters}
    assert len(pairs) == 8 and all(past in inputs and present in outputs for past, present in pairs), "in place"
    assert all(present.replace("present", "past_key_values") == past for past, present in pairs)
    readers = {name: [node.op_type for node in decoder.graph.node if name in node.input] for name, _ in pairs}
    assert all(set(each) <= {"ScatterND", "Gather"} for each in readers.values()), "nobody reads what is overwritten"
    assert sum(node.op_type == "Loop" for node in nodes(decoder.graph)) == 4
    model = Manifest.read(bundle).model
    assert model.kv_cache_in_place and model.batched_continuation


def test_a_cache_of_fp16_is_continued_row_by_row(checkpoints: Checkpoints, export: Export) -> None:
    _, options = VARIANTS["MoE, integers over a cache of fp16"]
    bundle = export(checkpoints(), target="ort-cuda", **options).bundle
    assert not Manifest.read(bundle).model.batched_continuation
    found = {node.op_type for node in nodes(graphs(bundle)["decoder"].graph) if node.domain == "com.microsoft"}
    assert {"GroupQueryAttention", "MatMulNBits", "QuickGelu", "RotaryEmbedding"} <= found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "int8", "quantization": QuantizationConfig(calibration=Path("c.jsonl"))}, "as fp32, fp16"),
        ({"by_reference": True}, "--by-reference: --target ort-cuda stores"),
    ],
)
def test_flags_that_no_kernel_serves(options: Any, message: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    config = ExportConfig(checkpoint=checkpoints().folder, output=tmp_path / "b", target="ort-cuda", **options)
    with pytest.raises(UnsupportedError, match=message):
        export_checkpoint(config)


def test_types_are_known_everywhere(checkpoints: Checkpoints, export: Export) -> None:
    for options in (VARIANTS["MoE, fp16 weights"][1], VARIANTS["MoE, integers over a cache of fp16"][1]):
        for path in export(checkpoints(), target="ort-cuda", **options).bundle.glob("*.onnx"):
            model = ir.load(path)
            types = element_types(model.graph)
            unknown = [
                f"{node.op_type} {value.name}"
                for node in model.graph.all_nodes()
                for value in node.inputs
                if value is not None and value.name and value.name not in types
            ]
            assert unknown == [], path


def lacking(text: str) -> str:
    """What a graph in ONNX's textual syntax has no kernel for."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    try:
        RequireCudaKernels()(model)
    except ir.passes.PostconditionError as error:
        return str(error)
    return ""


HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[n] x, int64[n] i) => (float[n] y)'


def test_nodes_without_a_kernel_are_named() -> None:
    assert lacking(f"{HEADER} {{ y = Add (x, x) }}") == ""
    assert "1.20.2" in lacking(f"{HEADER} {{ y = Selu (x) }}") and "Selu" in lacking(f"{HEADER} {{ y = Selu (x) }}")
    assert "com.microsoft.SparseAttention" in lacking(f"{HEADER} {{ y = com.microsoft.SparseAttention (x) }}")
    assert "ReduceMean of int64" in lacking(f"{HEADER} {{ m = ReduceMean (i) z = Cast <to = 1> (m) y = Add (x, z) }}")
    in_branch = "c = Cast <to = 9> (x) y = If (c) <then_branch = a () => (float[n] p) { p = Selu (x) }, "
    in_branch += "else_branch = b () => (float[n] q) { q = Identity (x) }>"
    assert "Selu" in lacking(f"{HEADER} {{ {in_branch} }}")
    folded = "c = Constant <value_floats = [1.0]> () z = Selu (c) y = Add (x, z)"
    assert lacking(f"{HEADER} {{ {folded} }}") == "", "what reads constants alone is computed when it is loaded"
    assert "opset 18" in lacking(f"{HEADER.replace('17', '18')} {{ y = Add (x, x) }}")


def test_the_table_is_of_released_packages() -> None:
    table = CudaKernels.load()
    assert {"1.20.2", "1.22.0"} <= set(table.releases) and table.opset == 17
    assert table.kernels["com.microsoft", "GroupQueryAttention"] == {"float16"}, "why fp32 has attention of its own"
    assert ("", "TensorScatter") not in table.kernels
