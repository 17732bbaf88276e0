"""RMSNormRope against PyTorch and against the operators that the graphs use today."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from deepstitch.export.functions import function_proto
from deepstitch.models import ops
from deepstitch.plugins.build.static_checks import compile_and_read
from deepstitch.plugins.common.case import Array, Case, nmse
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import load
from deepstitch.plugins.rms_norm_rope.cases import CASES, norm_inputs, rope_inputs, section_of
from deepstitch.plugins.rms_norm_rope.reference import pair_axes, reference
from deepstitch.plugins.rms_norm_rope.roofline import rope_work, rows_work
from deepstitch.plugins.rms_norm_rope.schema import SCHEMA

from .definition import run_definition
from .gpu_tools import needs_nvrtc
from .single_node import plugin_node, run

OP = SCHEMA.name


def three(library: PluginLibrary, attributes: dict[str, Any], inputs: dict[str, Array]) -> list[dict[str, Array]]:
    """The kernel, the reference and the definition."""
    return [
        library.run(OP, attributes, inputs),
        reference(SCHEMA.resolve(attributes), inputs),
        run_definition(load("rms_norm_rope"), attributes, inputs),
    ]


def rope(num_heads: int, head_dim: int, **more: Any) -> dict[str, Any]:
    return {"mode": "norm_rope", "num_heads": num_heads, "mrope_section": section_of(head_dim)} | more


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("width", [64, 131])
def test_norm_is_pytorchs(host_library: PluginLibrary, width: int, residual: bool) -> None:
    inputs = norm_inputs((2, 5), width, residual=residual)(np.random.default_rng(width))
    rows = torch.from_numpy(inputs["x"] + (inputs["residual"] if residual else 0)).double()
    wanted = torch.nn.functional.rms_norm(rows, (width,), torch.from_numpy(inputs["weight"]).double(), 1e-5).numpy()
    attributes = {"mode": "norm", "epsilon": 1e-5, "has_residual": int(residual)}
    for outputs in three(host_library, attributes, inputs):
        assert nmse(outputs["y"], wanted) < 1e-13
        if residual:
            np.testing.assert_array_equal(outputs["sum"], inputs["x"] + inputs["residual"])


def test_the_stored_sum_is_normed(host_library: PluginLibrary) -> None:
    """fp16 loses half of what is added here; the sum and its norm lose the same."""
    inputs = norm_inputs((3,), 64, residual=True, dtype="float16")(np.random.default_rng(0))
    inputs["residual"] = (inputs["residual"] * np.float16(1e-3)).astype(np.float16)
    attributes = {"mode": "norm", "has_residual": 1}
    for outputs in three(host_library, attributes, inputs):
        stored = (inputs["x"].astype(np.float32) + inputs["residual"].astype(np.float32)).astype(np.float16)
        np.testing.assert_array_equal(outputs["sum"], stored)
        alone = host_library.run(OP, {"mode": "norm"}, {"x": stored, "weight": inputs["weight"]})
        assert nmse(outputs["y"], alone["y"]) < 5e-8


def todays_graph(num_heads: int, section: list[int], inputs: dict[str, Array]) -> onnx.ModelProto:
    """RMSNormalization, MRotaryCosSin and RotaryEmbedding, as the portable graphs have them."""
    function = function_proto("MRotaryCosSin")
    by_head = np.array([0, 0, num_heads, -1], np.int64)
    merged = np.array([0, 0, -1], np.int64)
    nodes = [
        helper.make_node("Reshape", ["x", "by_head"], ["heads"]),
        helper.make_node("RMSNormalization", ["heads", "weight"], ["normed"], axis=-1, epsilon=1e-6),
        helper.make_node("Reshape", ["normed", "merged"], ["rows"]),
        helper.make_node("Cast", ["position_ids"], ["positions"], to=onnx.TensorProto.INT64),
        helper.make_node("MRotaryCosSin", ["positions", "inv_freq"], ["cos", "sin"], domain=function.domain,
                         mrope_section=section),
        helper.make_node("RotaryEmbedding", ["rows", "cos", "sin"], ["y"], num_heads=num_heads),
    ]  # fmt: skip
    taken = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    given = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, inputs["x"].shape)]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in
                 (("by_head", by_head), ("merged", merged))]  # fmt: skip
    graph = helper.make_graph(nodes, "today", taken, given, constants)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(function.domain, 1)]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=11)


def in_todays_graphs() -> list[Case]:
    """The rotations that a graph of today can hold: float32, some token, the usual epsilon."""
    return [
        case
        for case in CASES
        if "rope" in case.tags and case.attributes["epsilon"] == 1e-6
        and case.make()["x"].dtype == np.float32 and case.make()["x"].size
    ]  # fmt: skip


@pytest.mark.parametrize("case", in_todays_graphs(), ids=lambda case: case.name)
def test_norm_and_rotation_of_todays_graphs(host_library: PluginLibrary, case: Case) -> None:
    attributes, inputs = SCHEMA.resolve(case.attributes), case.make()
    wanted = run(todays_graph(attributes["num_heads"], attributes["mrope_section"], inputs), inputs)["y"]
    for outputs in three(host_library, attributes, inputs):
        assert nmse(outputs["y"], wanted) < 1e-12


@pytest.mark.parametrize("section", [(24, 20, 20), (11, 11, 10), (32, 0, 0), (0, 16, 16), (1, 1, 30)])
def test_pairs_take_the_axes_of_the_model(section: tuple[int, int, int]) -> None:
    """A position of 2, 3 or 5 on the axes, and frequency 1: the cosine of a pair tells its axis."""
    pairs = sum(section)
    positions = torch.tensor([2, 3, 5]).reshape(3, 1, 1)
    cos, _ = ops.mrope_cos_sin(positions, torch.ones(pairs), section)
    found = np.array([2, 3, 5])[pair_axes(list(section), pairs)]
    np.testing.assert_allclose(np.cos(found), cos[0, 0].numpy(), atol=1e-6)


def sines(library: PluginLibrary, positions: Array, inv_freq: float) -> tuple[Array, Array, Array]:
    """The kernel's cosine and sine, and the angles: a head of (1, 1) with weights (1, 0) is turned to them."""
    inputs = {
        "x": np.ones((1, positions.size, 2), np.float32),
        "weight": np.array([1, 0], np.float32),
        "position_ids": np.broadcast_to(positions.astype(np.int32), (3, 1, positions.size)).copy(),
        "inv_freq": np.array([inv_freq], np.float32),
    }
    attributes = {"mode": "norm_rope", "epsilon": 0.0, "num_heads": 1, "mrope_section": [1, 0, 0]}
    y = library.run(OP, attributes, inputs)["y"][0]
    angles = (positions.astype(np.int32).astype(np.float32) * np.float32(inv_freq)).astype(np.float64)
    return y[:, 0], y[:, 1], angles


@pytest.mark.parametrize("inv_freq", [1.0, 0.7310586, 1e-3, 2e-7, 3.14159274, 1.57079637])
@pytest.mark.parametrize("most", [2000, 1 << 18, (1 << 31) - 1])
def test_sine_and_cosine(host_library: PluginLibrary, most: int, inv_freq: float) -> None:
    """Within two units in the last place, at every size of angle, close to their zeros as well."""
    rng = np.random.default_rng(most)
    positions = rng.integers(-most, most + 1, 4000)
    cos, sin, angles = sines(host_library, positions, inv_freq)
    for found, exact in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        unit = np.spacing(np.abs(exact.astype(np.float32))).astype(np.float64)
        assert np.max(np.abs(found - exact) / unit) < 2.0


@pytest.mark.parametrize("name", ["norm-one-token", "norm-no-token-residual", "rope-no-token", "rope-picture-batch"])
def test_the_definition_optimized_and_without_defaults(name: str) -> None:
    """As ONNX Runtime runs it by default, from a node that says no more than it has to."""
    case = next(each for each in CASES if each.name == name)
    inputs, attributes = case.make(), {key: value for key, value in case.attributes.items() if key != "epsilon"}
    outputs = run(plugin_node(SCHEMA, attributes, inputs), inputs)
    for key, wanted in reference(SCHEMA.resolve(attributes), inputs).items():
        assert nmse(outputs[key], wanted) <= case.nmse
        assert outputs[key].shape == wanted.shape


def test_position_zero_turns_nothing(host_library: PluginLibrary) -> None:
    inputs = rope_inputs(1, 3, 2, 64)(np.random.default_rng(0))
    inputs["position_ids"][:] = 0
    heads = {"x": inputs["x"].reshape(1, 3, 2, 64), "weight": inputs["weight"]}
    normed = reference(SCHEMA.resolve({"mode": "norm"}), heads)["y"].reshape(1, 3, 128)
    for outputs in three(host_library, rope(2, 64), inputs):
        assert nmse(outputs["y"], normed) < 1e-13


def test_a_rotation_keeps_lengths_and_differences(host_library: PluginLibrary) -> None:
    """Scores depend on the difference of positions alone."""
    inputs = rope_inputs(1, 2, 1, 64)(np.random.default_rng(3))
    scores = []
    for shift in (0, 5, 700):
        inputs["position_ids"][...] = np.array([3, 11]) + shift
        query, key = host_library.run(OP, rope(1, 64), inputs)["y"][0].astype(np.float64)
        scores.append(query @ key)
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("head_dim", [128, 50])
def test_what_is_not_finite_stays_in_its_head(host_library: PluginLibrary, head_dim: int, value: float) -> None:
    inputs = rope_inputs(1, 3, 9, head_dim)(np.random.default_rng(0))
    clean = host_library.run(OP, rope(9, head_dim), inputs)["y"].reshape(3, 9, head_dim)
    inputs["x"].reshape(3, 9, head_dim)[1, 4, 7] = value
    hit = np.zeros((3, 9), bool)
    hit[1, 4] = True
    with np.errstate(invalid="ignore"):
        outputs = three(host_library, rope(9, head_dim), inputs)
    for index, found in enumerate(outputs):
        heads = found["y"].reshape(3, 9, head_dim)
        assert np.isnan(heads[hit]).any()
        assert np.isfinite(heads[~hit]).all()
        if index == 0:
            np.testing.assert_array_equal(heads[~hit], clean[~hit])


def test_tokens_and_heads_do_not_depend_on_their_neighbours(host_library: PluginLibrary) -> None:
    inputs = rope_inputs(2, 5, 4, 96)(np.random.default_rng(1))
    whole = host_library.run(OP, rope(4, 96), inputs)["y"]
    part = inputs | {"x": np.ascontiguousarray(inputs["x"][1:, 2:4, 96:192])}
    part["position_ids"] = np.ascontiguousarray(inputs["position_ids"][:, 1:, 2:4])
    np.testing.assert_array_equal(host_library.run(OP, rope(1, 96), part)["y"], whole[1:, 2:4, 96:192])


def test_vector_loads_in_the_machine_code() -> None:
    """Outside of loops, hence not among what static.py can ask for."""
    needs_nvrtc()
    found = {each.kernel: each.code for each in compile_and_read("rms_norm_rope")}
    for kernel, code in found.items():
        assert (code.wide_loads >= 2 and code.narrow_loads <= 6) != kernel.endswith("_scalar"), kernel


def test_bytes_of_the_roofline() -> None:
    """By hand: residual, x, y and sum of one row; query heads of one token, three positions, weight, frequencies."""
    assert rows_work(1, 2048, "float32", residual=True).nbytes == 4 * 2048 * 4 + 2048 * 4
    assert rows_work(3, 2048, "float16", residual=False).nbytes == 3 * 2 * 2048 * 2 + 2048 * 4
    assert rope_work(1, 32, 128, "float32").nbytes == 2 * 4096 * 4 + 3 * 4 + 128 * 4 + 64 * 4
