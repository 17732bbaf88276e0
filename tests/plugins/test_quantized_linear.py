"""QuantizedLinear: its definition and reference against PyTorch, ONNX Runtime's own operator, and stored bundles."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from deepstitch import blockwise
from deepstitch.plugins.common.case import nmse
from deepstitch.plugins.common.numerics import pack_int4, pack_int8
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.quantized_linear.cases import CASES, REFUSED, stored
from deepstitch.plugins.quantized_linear.reference import reference
from deepstitch.plugins.quantized_linear.schema import SCHEMA

from .single_node import one_node, plugin_node, run


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def both(attributes: dict[str, Any], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The reference and the definition."""
    return [
        reference(SCHEMA.resolve(attributes), inputs)["y"],
        run(plugin_node(SCHEMA, attributes, inputs), inputs)["y"],
    ]


@pytest.mark.parametrize("weight_format", ["float32", "float16"])
def test_floats_are_a_linear_layer(weight_format: str) -> None:
    attributes = {"weight_format": weight_format, "out_features": 24, "has_bias": 1, "has_residual": 1}
    inputs = {"x": normal(2, 3, 64), **stored("weight", normal(24, 64), weight_format)}
    inputs |= {"bias": normal(24), "residual": normal(2, 3, 24)}
    x, weight, bias = (torch.from_numpy(inputs[name]).double() for name in ("x", "weight", "bias"))
    expected = torch.nn.functional.linear(x, weight, bias).numpy() + inputs["residual"]
    for y in both(attributes, inputs):
        assert y.shape == (2, 3, 24)
        assert nmse(y, expected) < 1e-12


@pytest.mark.parametrize(("weight_format", "bits", "most"), [("int8", 8, 1e-4), ("int4", 4, 2e-2)])
@pytest.mark.parametrize("block", [32, 128])
def test_integers_are_near_the_matrix_they_came_from(weight_format: str, bits: int, most: float, block: int) -> None:
    x, weight = normal(5, 256), normal(48, 256, seed=1)
    inputs = {"x": x, **stored("weight", weight, weight_format, block)}
    attributes = {"weight_format": weight_format, "block_size": block, "out_features": 48}
    for y in both(attributes, inputs):
        error = nmse(y, x @ weight.T)
        assert most / 100 < error < most, f"{bits} bits: {error}"


def test_every_number_in_its_place() -> None:
    """One weight is 1, one x is 1: y says where the kernel's words put which number."""
    for weight_format, pack in (("int4", pack_int4), ("int8", pack_int8)):
        numbers = np.eye(64, dtype=np.int8)
        inputs = {
            "x": np.eye(64, dtype=np.float32) * 127,
            "weight": pack(numbers),
            "scales": np.ones((64, 2), np.float32),
        }
        attributes = {"weight_format": weight_format, "block_size": 32, "out_features": 64}
        for y in both(attributes, inputs):
            np.testing.assert_array_equal(y, inputs["x"])


def test_halves_are_rounded_to_even() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = 127, 0.5, 1.5, 2.5, -0.5, -1.5
    inputs = {"x": x, "weight": pack_int8(np.eye(32, dtype=np.int8)), "scales": np.ones((32, 1), np.float32)}
    for y in both({"weight_format": "int8", "block_size": 32, "out_features": 32}, inputs):
        assert y[0, :7].tolist() == [127, 0, 2, 2, 0, -2, 0]


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_bundles_hold_these_bytes(bits: int, block: int) -> None:
    """A block-wise matrix of a bundle, viewed as int32, is the input: equal to ONNX Runtime's own operator on it.

    x holds whole numbers and 127 in each block, so that rounding it loses nothing.
    """
    rng = np.random.default_rng(bits + block)
    rows, columns, blocks = 40, 256, 256 // block
    numbers = rng.integers(0, 1 << bits, (rows, blocks, block), dtype=np.uint8)
    values = blockwise.pack(numbers, bits)
    scales = rng.random((rows, blocks), dtype=np.float32)
    x = rng.integers(-127, 128, (3, columns)).astype(np.float32)
    x[:, ::32] = 127

    signed = values if bits == 4 else values ^ np.uint8(0x80)
    words = np.ascontiguousarray(signed).view("<i4").reshape(rows, -1)
    inputs = {"x": x, "weight": words, "scales": scales}
    attributes = {"weight_format": f"int{bits}", "block_size": block, "out_features": rows}
    format_ = blockwise.WeightFormat(bits=bits, block=block)
    dense = x.astype(np.float64) @ blockwise.dequantize(values, scales, None, format_).astype(np.float64).T
    for y in (*both(attributes, inputs), mat_mul_n_bits(x, values, scales, bits, block)):
        assert nmse(y, dense) < 1e-11


def mat_mul_n_bits(x: np.ndarray, values: np.ndarray, scales: np.ndarray, bits: int, block: int) -> np.ndarray:
    """ONNX Runtime's operator, computing in fp32."""
    sizes = {"K": x.shape[-1], "N": len(scales), "bits": bits, "block_size": block}
    node = helper.make_node(
        "MatMulNBits", ["x", "values", "scales"], ["y"], domain="com.microsoft", accuracy_level=1, **sizes
    )
    function = helper.make_function(
        "test", "Wrapped", ["x", "values", "scales"], ["y"], [node], [helper.make_opsetid("com.microsoft", 1)]
    )
    feeds = {"x": x, "values": values, "scales": scales}
    return run(one_node(function, {}, feeds, ["y"]), feeds)["y"]


@pytest.mark.parametrize("weight_format", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(
    host_library: PluginLibrary, weight_format: str, tokens: int, value: float
) -> None:
    """And it shows there: rounding to eight bits does not turn it into a number."""
    block = 32 if weight_format.startswith("int") else 0
    attributes = {"weight_format": weight_format, "block_size": block, "out_features": 40}
    inputs = {"x": normal(tokens, 96), **stored("weight", normal(40, 96), weight_format, block)}
    clean = host_library.run("QuantizedLinear", attributes, inputs)["y"]
    inputs["x"][1, 50] = value
    with np.errstate(invalid="ignore"):
        results = [host_library.run("QuantizedLinear", attributes, inputs)["y"], *both(attributes, inputs)]
    others = np.arange(tokens) != 1
    np.testing.assert_array_equal(results[0][others], clean[others])
    for y in results:
        assert not np.isfinite(y[1]).any()
        assert np.isfinite(y[others]).all()


@pytest.mark.parametrize("tokens", [0, 2, 3, 100])
@pytest.mark.parametrize("weight_format", ["float32", "int4"])
def test_workspace_is_what_the_readme_says(host_library: PluginLibrary, weight_format: str, tokens: int) -> None:
    block = 32 if weight_format == "int4" else 0
    attributes = {"weight_format": weight_format, "block_size": block, "out_features": 8}
    inputs = {"x": normal(tokens, 64), **stored("weight", normal(8, 64), weight_format, block)}
    stated = tokens * (64 + 64 // 32 * 8) if block and tokens > 2 else 0
    with host_library.create("QuantizedLinear", attributes) as instance, instance.prepare(inputs) as call:
        assert stated <= call.workspace_bytes <= (stated and stated + 2 * 256)


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_rows_and_one_optimized_graph(tokens: int) -> None:
    """ONNX Runtime's fusions divide by the number of rows when a Transpose stands before MatMul."""
    attributes = {"weight_format": "int4", "block_size": 32, "out_features": 8}
    inputs = {"x": normal(tokens, 64), **stored("weight", normal(8, 64), "int4", 32)}
    for y in both(attributes, inputs):
        assert y.shape == (tokens, 8)


def test_the_table_has_every_format() -> None:
    seen = set()
    for case in CASES:
        resolved = SCHEMA.resolve(case.attributes)
        scale = "scales" in (inputs := case.make()) and inputs["scales"].dtype.name
        seen.add((resolved["weight_format"], resolved["block_size"], scale))
    integer = product(("int4", "int8"), (32, 64, 128), ("float32", "float16"))
    assert {*integer, ("float32", 0, False), ("float16", 0, False)} <= seen
    assert len(CASES) >= 40
    for table in (CASES, REFUSED):
        assert len({case.name for case in table}) == len(table)


def test_the_definition_is_standard_onnx() -> None:
    for case in CASES[:3]:
        model = plugin_node(SCHEMA, case.attributes, case.make())
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.functions[0].node} == {""}
