"""What the parsers of TensorRT 8.6 and 10.0 take, node by node."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deepstitch.export.tensorrt.check import GraphCheck
from deepstitch.export.tensorrt.operators import ParserTable
from deepstitch.plugins.registry import OPS

from .conftest import ADDRESS, HEADER

Check = Callable[..., GraphCheck]

GOOD = """
decoder (float[S, 64] x, int64[S] places, int32[S] index) => (float[S, 64] y, float[S] total)
<float[64, 64] weight, float[64] bias, int64[1] last = {-1}, int64[2] flat = {-1, 64}, float[3, 128] taps>
{
    product = MatMul (x, weight)
    normed = LayerNormalization <axis = -1> (product, bias, bias)
    half = Constant <value = float {0.5}> ()
    scaled = Mul (normed, half)
    picked = Gather <axis = 0> (scaled, places)
    deep = deepstitch.plugins.DeepStackAdd <layer = 1, ADDRESS> (picked, taps, index)
    y = Reshape (deep, flat)
    total = ReduceSum <keepdims = 0> (y, last)
}
""".replace("ADDRESS", ADDRESS)


def test_a_good_graph_has_no_problem(check: Check) -> None:
    found = check(GOOD, S=5)
    assert found.problems == () and found.followed
    assert found.plugins == {"DeepStackAdd": 1} and found.operators["MatMul"] == 1
    assert found.corners == ("only/min", "only/opt", "only/max")


# A node from x [S, 64], i int64 [S], j int32 [S] to y; what is said of it
BAD = {
    "missing": ("y = Mish (x)", "has no Mish"),
    "listed as missing": ("y = Hardmax (x)", "has no Hardmax"),
    "types": ("y = Sqrt (j)", "input 0 is int32; Sqrt takes float32, float16"),
    "narrowed types": ("y = Exp (i)", "input 0 is int64"),
    "data is not the first input": ("c = Cast <to = 9> (i)\n y = Where (c, b, b)\n b = Cast <to = 2> (i)", "uint8"),
    "cast": ("y = Cast <to = 16> (x)", "output 0 is bfloat16"),
    "part of a shape": ("y = Shape <start = 1> (x)", "attribute start is passed over"),
    "reduction": ('y = ScatterND <reduction = "add"> (x, k, x)', "attribute reduction is passed over"),
    "constant ints": ("y = Constant <value_ints = [1, 2]> ()", "attribute value_ints is passed over"),
    "axes that are computed": ("a = Identity (last)\n y = Slice (x, last, last, a)", "input 3 (axes) must be an init"),
    "axes of a later opset": ("y = ReduceMean (x, last)", "2 inputs; opset 17 has 1"),
    "attribute of a later opset": ("y, z = Split <num_outputs = 2> (x)", "opset 17 has no attribute num_outputs"),
    "left out": ("y = Clip (x, , top)", "input 1 is left out"),
    "zero point": ("y = QuantizeLinear (x, top, point)", "input 2 (y_zero_point) must be zero"),
    "another domain": ("y = com.microsoft.FusedGelu (x)", "domain com.microsoft is neither ONNX nor"),
    "two outputs": ("y, z = LayerNormalization (x, row)", "2 outputs are asked for"),
    "mode": ('y = Resize <mode = "cubic"> (x, none, sizes)', "attribute mode is 'cubic'"),
    "mixed types": ("h = Cast <to = 10> (x)\n y = MatMul (h, x)", "input 1 is float32 where the others are float16"),
    "mixed types, any number": ("h = Cast <to = 10> (x)\n y = Concat <axis = 0> (x, x, h)", "input 2 is float16 where"),
}
# What 8.6 does not take and 10.0 does: newer attributes, integers of 64 bits, parts of a shape
GOOD_10 = {
    "opset 20": ('y = Gelu <approximate = "tanh"> (x)', "has no Gelu"),
    "parts of a shape": ("y = Shape <start = 1> (x)", "attribute start is passed over"),
    "constant ints": ("y = Constant <value_ints = [1, 2]> ()", "attribute value_ints is passed over"),
    "number of outputs": ("y, z = Split <num_outputs = 2> (x)", ""),
    "axes as an input": ("y = ReduceMean (x, last)", ""),
    "integers of 64 bits": ("one = Squeeze (last, first)\n y = Range (one, one, one)", ""),
}
BAD_10 = {
    "missing": ("y = Compress (x, x)", "10.0-GA has no Compress"),
    "later": ("y = RMSNormalization (x, row)", "10.0-GA has no RMSNormalization; 10.15 has"),
    "types": ("y = Gelu (x64)\n x64 = Cast <to = 7> (x)", "input 0 is int64; Gelu takes float32, float16, bfloat16"),
    "refused": ('y = ScatterND <reduction = "none"> (x, k, x)', "attribute reduction is refused by the parser"),
    "axes that are computed": ("a = Identity (last)\n y = ReduceSum (x, a)", "input 1 (axes) must be an init"),
    "types of a product": ("h = Cast <to = 10> (x)\n y = MatMul (h, x)", "input 1 is float32 where the others are"),
}
FRAME = """
decoder (float[S, 64] x, int64[S] i, int32[S] j, int64[S, 1] k) => (float[S, 64] out)
<int64[1] last = {-1}, float top = {1.0}, int8 point = {3}, float[64] row, float[0] none, float[2] sizes = {1.0, 2.0}>
{
    NODES
    out = Identity (x)
}
"""


@pytest.mark.parametrize("name", BAD)
def test_what_the_parser_gets_wrong(check: Check, name: str) -> None:
    nodes, text = BAD[name]
    header = HEADER.replace('"deepstitch', '"com.microsoft" : 1, "deepstitch')
    said = [each.message for each in check(FRAME.replace("NODES", nodes), header, S=5).problems]
    assert any(text in message for message in said), said


HEADER_10 = HEADER.replace('"" : 17', '"" : 20')


@pytest.mark.parametrize("name", GOOD_10)
def test_what_a_later_parser_takes(check: Check, name: str) -> None:
    nodes, text = GOOD_10[name]
    graph = FRAME.replace("NODES", nodes).replace("int8 point = {3}", "int64[1] first = {0}")
    assert check(graph, HEADER_10, "10.0", S=5).problems == ()
    said = [each.message for each in check(graph, HEADER_10, S=5).problems]
    assert any(text in message for message in said) or not text, said


@pytest.mark.parametrize("name", BAD_10)
def test_what_a_later_parser_does_not_take(check: Check, name: str) -> None:
    nodes, text = BAD_10[name]
    header = HEADER.replace('"" : 17', '"" : 24') if name == "later" else HEADER_10
    said = [each.message for each in check(FRAME.replace("NODES", nodes), header, "10.0", S=5).problems]
    assert any(text in message for message in said), said


PLUGINS = {
    "unknown attribute": ("layr = 1, layer = 1", "x, taps, index", "no attribute layr (did you mean 'layer'?)"),
    "attribute of another type": ("layer = 1.5", "x, taps, index", "attribute layer is 1.5"),
    "missing attribute": ("", "x, taps, index", "needs the attributes layer"),
    "inputs": ("layer = 1", "x, taps", "2 inputs; these attributes need 3: hidden_states"),
    "type": ("layer = 1", "x, taps, i64", "deepstack_index is int64; it must be int32"),
    "size": ("layer = 1", "x, taps, short", "deepstack_index has shape [2]; it must be [...] with ... = [5]"),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_plugin_nodes_are_those_of_the_schema(check: Check, name: str) -> None:
    attributes, inputs, text = PLUGINS[name]
    address = f"{attributes}, {ADDRESS}" if attributes else ADDRESS
    graph = f"""
    decoder (float[S, 64] x, int32[S] index, int64[S] i64, int32[T] short) => (float[S, 64] y)
    <float[3, 128] taps> {{ y = deepstitch.plugins.DeepStackAdd <{address}> ({inputs}) }}
    """
    said = [each.message for each in check(graph, S=5, T=2).problems]
    assert any(text in message for message in said), said


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ('plugin_version = "1"', "attribute plugin_namespace is None"),
        ('plugin_version = "2", plugin_namespace = "deepstitch.plugins"', "attribute plugin_version is '2'"),
    ],
)
def test_plugins_are_found(check: Check, address: str, text: str) -> None:
    said = [each.message for each in check(GOOD.replace(ADDRESS, address), S=5).problems]
    assert len(said) == 1 and text in said[0]


def test_a_number_where_a_fraction_is_taken(check: Check) -> None:
    graph = f"""
    decoder (float[S, 64] x) => (float[S, 64] y)
    <float[64] weight> {{ y = deepstitch.plugins.RMSNormRope <mode = "norm", epsilon = 1, {ADDRESS}> (x, weight) }}
    """
    assert [each.message for each in check(graph, S=5).problems] == [
        "attribute epsilon is INT; the plugin's creator takes float"
    ]


def test_the_model_as_a_whole(check: Check) -> None:
    newer = check(GOOD, HEADER.replace('"" : 17', '"" : 18'), S=5)
    assert "opset 18; onnx-tensorrt 8.6-GA knows up to 17" in {each.message for each in newer.problems}
    bytes_stored = check(GOOD.replace("<float[64, 64] weight", "<uint8[4] raw, float[64, 64] weight"), S=5)
    assert [(each.operator, each.node) for each in bytes_stored.problems] == [("initializer", "raw")]
    function = '<domain: "local", opset_import: ["" : 17]> twice (x) => (y) { y = Add (x, x) }'
    assert any("local functions (twice)" in each.message for each in check(f"{GOOD}\n{function}", S=5).problems)


def test_sizes_at_every_corner(check: Check) -> None:
    """A contradiction, an output of another size, a size that only the run would tell, and too many elements."""
    wrong = check(GOOD.replace("float[64, 64] weight", "float[32, 64] weight"), S=5)
    assert not wrong.followed
    assert [(each.operator, each.count) for each in wrong.problems if each.node == "product at only/min"] == [
        ("MatMul", 3)
    ]
    other = check("decoder (float[S, 64] x) => (float[S, 32] y) { y = Identity (x) }", S=5)
    assert "is float32 [5, 64], the manifest promises float32 [5, 32]" in other.problems[0].message
    nothing = check("decoder (float[S] x) => (float[S] y) { z = Add (x, lost)\n y = Add (z, x) }", S=5)
    assert [(each.message, each.count) for each in nothing.problems] == [("nothing gives its input lost", 3)]
    unknown = check("decoder (float[S] x) => (int64[1, N] y) { y = NonZero (x) }", S=5, N=1)
    assert "depends on values" in unknown.problems[0].message
    large = check("decoder (float[S, S] x) => (float[S, S] y) { y = Identity (x) }", S=1 << 16)
    assert any("4,294,967,296 elements" in each.message for each in large.problems)


def test_shapes_computed_from_shapes_are_followed(check: Check) -> None:
    graph = """
    decoder (float[B, S, 64] x) => (float[B, S, 4, 16] y, float[N, 64] flat, int32[S] counted)
    <int64[1] two = {2}, int64[1] zero = {0}, int64[1] one = {1}, int64[2] tail = {4, 16}, int64 first = {0},
     int64 step = {1}, int64[1] width = {64}>
    {
        shape = Shape (x)
        leading = Slice (shape, zero, two, zero)
        heads = Concat <axis = 0> (leading, tail)
        y = Reshape (x, heads)
        tokens = ReduceProd <axes = [0], keepdims = 1> (leading)
        two_axes = Concat <axis = 0> (tokens, width)
        flat = Reshape (x, two_axes)
        length = Gather <axis = 0> (shape, one)
        scalar = Squeeze (length, zero)
        range = Range (first, scalar, step)
        counted = Cast <to = 6> (range)
    }
    """
    found = check(graph, B=2, S=7, N=14)
    assert found.followed
    # the one thing that is wrong with it: this parser reduces no integers
    assert [each.operator for each in found.problems] == ["ReduceProd"]


def test_the_manifest_is_held_against_the_graph(check: Check) -> None:
    from deepstitch.export.tensorrt.check import check_graph

    from .conftest import contract_of, model, profile

    made = model("decoder (float[S, 64] x) => (float[S, 64] y) { y = Identity (x) }")
    inputs, outputs = contract_of(model("decoder (float[S, 64] z) => (float[S, 64] y) { y = Identity (z) }"))
    found = check_graph("decoder", made, (inputs, outputs), [profile(S=1)], ParserTable.load())
    assert [each.message for each in found.problems] == ["inputs are not those of the manifest: x, z"]


@pytest.mark.parametrize(("version", "opset", "known", "missing"), [("8.6", 17, 145, 36), ("10.0", 20, 149, 52)])
def test_the_tables_and_our_operators(version: str, opset: int, known: int, missing: int) -> None:
    table = ParserTable.load(version)
    assert table.max_opset == opset and table.source.endswith(f"release/{version}-GA/docs/operators.md")
    assert len(table.operators) == known and len(table.unsupported) == missing
    assert not table.operators.keys() & table.unsupported and table.later.keys() <= table.unsupported
    assert not set(OPS.values()) & (table.operators.keys() | table.unsupported)
