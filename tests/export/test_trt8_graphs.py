"""What ``trt8`` graphs are made of, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import TensorProto

from deepstitch.cli import cli
from deepstitch.errors import BundleError, UnsupportedError
from deepstitch.export.exporter import ExportConfig, QuantizationConfig, export_checkpoint
from deepstitch.export.passes.declare_opset import DeclareOpset, Dialect
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.plugins.common.schema import DOMAIN
from deepstitch.plugins.registry import OPS, load
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import open_engine

from .trt8_models import NARROW, WIDE, attributes, decoded, fitting, graphs, options, plugins

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]

LAYERS = 4
SCHEMAS = {schema.name: schema for schema in (load(folder).schema for folder in OPS)}
KINDS = {"int": int, "float": float, "string": str, "ints": list}
NUMBERS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64}
OPERATORS = {
    *("Add", "Cast", "Concat", "Equal", "Erf", "Expand", "Gather", "GatherND", "Gemm", "GreaterOrEqual"),
    *("LayerNormalization", "LessOrEqual", "MatMul", "Mul", "Range", "ReduceSum", "Reshape", "Shape"),
    *("Sigmoid", "Softmax", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where"),
}
BUNDLES = [
    ("qwen3_vl_moe", WIDE, "fp32"),
    ("qwen3_vl_moe", WIDE, "fp16"),
    ("qwen3_vl_moe", WIDE, "int8"),
    ("qwen3_vl_moe", WIDE, "int4"),
    ("qwen3_vl", NARROW, "fp32"),
    ("qwen3_moe", NARROW, "int8"),
]


@pytest.fixture(params=BUNDLES, ids=lambda each: "-".join(map(str, each)))
def bundle(request: pytest.FixtureRequest, checkpoints: Checkpoints, export: Export) -> Path:
    family, head_dim, weights = request.param
    checkpoint = fitting(checkpoints, family, head_dim)
    return export(checkpoint, target="trt8", **options(checkpoint, weights)).bundle


@pytest.fixture
def moe(checkpoints: Checkpoints) -> Checkpoint:
    return fitting(checkpoints, "qwen3_vl_moe")


def counted(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in plugins(model))


def test_the_parser_could_read_it(bundle: Path) -> None:
    for model in graphs(bundle).values():
        imports = {each.domain: each.version for each in model.opset_import}
        assert imports == {"": 17} | ({DOMAIN: 1} if plugins(model) else {})
        assert model.ir_version == 8 and not model.functions
        standard = {node.op_type for node in model.graph.node if node.domain != DOMAIN}
        assert standard <= OPERATORS
        assert all(all(node.input) for node in model.graph.node), "no input is left out"
        assert {each.data_type for each in model.graph.initializer} <= NUMBERS
        large = [each.name for each in model.graph.initializer if each.data_type == TensorProto.INT64 and each.dims]
        assert all(np.prod(each.dims) < 8 for each in model.graph.initializer if each.name in large)


def test_plugin_nodes_are_those_of_the_schemas(bundle: Path) -> None:
    for model in graphs(bundle).values():
        stored = {each.name: each for each in model.graph.initializer}
        for node in plugins(model):
            schema, found = SCHEMAS[node.op_type], attributes(node)
            assert (found.pop("plugin_version"), found.pop("plugin_namespace")) == (schema.version, DOMAIN)
            kinds = {each.name: KINDS[each.kind] for each in schema.attributes}
            assert all(isinstance(value, kinds[name]) for name, value in found.items())
            resolved = schema.resolve(found)
            assert set(resolved) - set(found) <= {"mrope_section"}, "the parser warns of every one it misses"
            specs = schema.inputs(resolved)
            assert len(specs) == len(node.input) and len(schema.outputs(resolved)) == len(node.output)
            for spec, name in zip(specs, node.input, strict=True):
                if name in stored:
                    dtype = onnx.helper.tensor_dtype_to_np_dtype(stored[name].data_type).name
                    assert dtype in spec.dtypes, (node.name, spec.name)


def test_integer_weights_are_words(moe: Checkpoint, export: Export) -> None:
    """Eight numbers of four bits each in an INT32; nothing else of the matrix is left in the bundle."""
    bundle = export(moe, target="trt8", **options(moe, "int4")).bundle
    stored = {each.name: each for each in graphs(bundle)["decoder"].graph.initializer}
    text = moe.config.text
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert stored[name].data_type == TensorProto.INT32
    assert list(stored[name].dims) == [text.num_experts, 2 * text.moe_intermediate_size, text.hidden_size // 8]
    assert not [each for each in stored if each.endswith(".zero_points")]
    words, scales = (
        onnx.numpy_helper.to_array(stored[each], base_dir=str(bundle)) for each in (name, f"{name}.scales")
    )
    source = moe.sources()[name].read_float32().swapaxes(1, 2)
    steps = np.abs(decoded(words, scales, 4) - source) / np.repeat(np.abs(scales), 32, axis=-1)
    assert steps.max() < 1.01 and np.mean(steps > 0.51) < 1 / 32, (
        "8, which one number of a block may want, is not there"
    )


def test_what_becomes_one_node(moe: Checkpoint, export: Export) -> None:
    found = graphs(export(moe, target="trt8", **options(moe, "int4")).bundle)
    decoder, vision = found["decoder"], found["vision_encoder"]
    norms = Counter(
        (attributes(node)["mode"], attributes(node)["has_residual"])
        for node in plugins(decoder)
        if node.op_type == "RMSNormRope"
    )
    # each layer's second norm takes the addition in front of it; the first follows DeepStack, the last a choice of rows
    assert norms == {("norm_rope", 0): 2 * LAYERS, ("norm", 1): LAYERS, ("norm", 0): LAYERS + 1}
    assert counted(decoder) == {
        "RMSNormRope": 4 * LAYERS + 1,
        "QuantizedLinear": 4 * LAYERS + 1,
        "MoEExperts": LAYERS,
        "SparseAttention": LAYERS,
        "KVCacheAppend": LAYERS,
        "DeepStackAdd": 3,
    }
    linear = [attributes(node) for node in plugins(vision) if node.op_type == "QuantizedLinear"]
    assert sum(each["has_residual"] for each in linear) == 2 * LAYERS
    assert all(each["has_bias"] for each in linear)


def test_a_plugin_writes_the_cache_in_place(bundle: Path) -> None:
    """It alone reads a layer's old cache, so that nothing is read after it was overwritten."""
    decoder = graphs(bundle)["decoder"]
    writes = [node for node in plugins(decoder) if node.op_type == "KVCacheAppend"]
    old = [name for node in writes for name in node.input[:2]]
    assert old == [each.name for each in decoder.graph.input if each.name.startswith("past_key_values.")]
    assert [name for node in writes for name in node.output] == [
        each.name for each in decoder.graph.output if each.name.startswith("present.")
    ]
    assert all(sum(name in node.input for node in decoder.graph.node) == 1 for name in old)
    assert Bundle.open(bundle).manifest.model.kv_cache_in_place
    ranges = sum(node.op_type == "Range" for node in decoder.graph.node)
    assert ranges in (0, LAYERS + 1), "heads without a kernel: the slots of each layer, and positions that all share"


def test_node_budget_of_the_30b_decoder(moe: Checkpoint, export: Export) -> None:
    """A layer is a handful of nodes; 48 of them stay under 1,000."""
    nodes = len(graphs(export(moe, target="trt8", **options(moe, "int4")).bundle)["decoder"].graph.node)
    assert nodes < 40 + 20 * LAYERS


def test_another_runtime_is_refused(moe: Checkpoint, export: Export) -> None:
    folder = export(moe, target="trt8", **options(moe, "fp32")).bundle
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match="deepstitch build"):
        open_engine("ort", bundle)
    finished = CliRunner().invoke(cli, ["run", str(folder), "--prompt", "red"])
    assert finished.exit_code == 2 and "deepstitch build" in finished.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kv_cache": "int8"}, "--kv-cache int8: --target trt8 keeps keys and values as fp32, fp16"),
        ({"by_reference": True}, "--by-reference: --target trt8 stores weights in another order"),
        ({"weights": "int4", "quantization": QuantizationConfig(symmetric=False)}, "have no zero points"),
    ],
    ids=["cache", "by reference", "zero points"],
)
def test_flags_without_a_kernel(flags: dict[str, Any], message: str, moe: Checkpoint, tmp_path: Path) -> None:
    if flags.get("kv_cache"):
        flags |= {"quantization": QuantizationConfig(calibration=tmp_path / "prompts.jsonl")}
    config = ExportConfig(checkpoint=moe.folder, output=tmp_path / "out", target="trt8", progress=False, **flags)
    with pytest.raises(UnsupportedError, match=message):
        export_checkpoint(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "text", "flags", "message"),
    [
        ("qwen3_moe", {"moe_intermediate_size": 48}, {}, "experts of this model map 64 to 48 and back"),
        ("qwen3_moe", {"num_experts": 257}, {}, "257 experts, 2 of them per token"),
        (
            "qwen3",
            {"intermediate_size": 80},
            {"weights": "int8"},
            "80 inputs, which take blocks of 16; .* --weights fp16",
        ),
    ],
    ids=["expert width", "experts", "blocks"],
)
def test_sizes_without_a_kernel(
    family: str, text: dict[str, Any], flags: dict[str, Any], message: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoint = fitting(checkpoints, family, **text)
    config = ExportConfig(checkpoint=checkpoint.folder, output=tmp_path / "b", target="trt8", progress=False, **flags)
    with pytest.raises(UnsupportedError, match=message):
        export_checkpoint(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (ir.node("Gelu", [ir.Value(name="x")]), "came later"),
        (ir.node("Clip", [ir.Value(name="x"), None, ir.Value(name="y")]), "leaves an input out"),
        (ir.node("Shape", [ir.Value(name="x")], {"start": 1}), "gives a part of the shape"),
        (ir.node("ReduceMax", [ir.Value(name="x"), ir.Value(name="axes")]), "has 2 inputs"),
        (ir.node("Split", [ir.Value(name="x")], {"num_outputs": 2}), "has the attributes"),
        (ir.node("MatMulNBits", [ir.Value(name="x")], domain="com.microsoft"), "is of domain 'com.microsoft'"),
    ],
    ids=lambda each: each.op_type if isinstance(each, ir.Node) else "",
)
def test_newer_operators_do_not_get_through(node: ir.Node, problem: str) -> None:
    inputs = [value for value in node.inputs if value is not None]
    model = ir.Model(ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=11)
    dialect = Dialect(parser="TensorRT 8.6", opset=17, ir_version=8, has_int64=False, has_shape_parts=False)
    with pytest.raises(ir.passes.PostconditionError, match=f"not for TensorRT 8.6: .*{problem}"):
        DeclareOpset(dialect)(model)
