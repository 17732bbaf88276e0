"""DeepStackAdd against PyTorch's and ONNX's form of it, and what it must not read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepstitch.export.functions import function_proto
from deepstitch.models import ops
from deepstitch.plugins.build.static_checks import compile_and_read
from deepstitch.plugins.common.case import Array
from deepstitch.plugins.deepstack_add.cases import inputs as tensors
from deepstitch.plugins.deepstack_add.reference import reference
from deepstitch.plugins.deepstack_add.roofline import add_work
from deepstitch.plugins.deepstack_add.schema import SCHEMA
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import load

from .definition import run_definition
from .gpu_tools import needs_nvrtc
from .single_node import one_node, run

OP = SCHEMA.name


def three(library: PluginLibrary, attributes: dict[str, Any], inputs: dict[str, Array]) -> list[Array]:
    """The kernel, the reference and the definition."""
    return [
        library.run(OP, attributes, inputs)["output"],
        reference(SCHEMA.resolve(attributes), inputs)["output"],
        run_definition(load("deepstack_add"), attributes, inputs)["output"],
    ]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("width", [64, 13])
def test_it_is_the_operator_of_todays_graphs(host_library: PluginLibrary, layer: int, width: int) -> None:
    inputs = tensors((2, 9), width, 7, 3)(np.random.default_rng(layer))
    today = run(one_node(function_proto("DeepStackAdd"), {"layer": layer}, inputs, ["output"]), inputs)["output"]
    hidden, embeds, index = (torch.from_numpy(each) for each in inputs.values())
    model = ops.deepstack_add(hidden, ops.CompactDeepStack(embeds, index), layer).numpy()
    np.testing.assert_array_equal(today, model)
    for output in three(host_library, {"layer": layer}, inputs):
        np.testing.assert_array_equal(output, today)


@pytest.mark.parametrize("width", [64, 13])
def test_only_the_rows_and_columns_it_needs_are_read(host_library: PluginLibrary, width: int) -> None:
    inputs = tensors((1, 6), width, 9, 3)(np.random.default_rng(0))
    index = np.array([[0, 3, 0, 8, 3, 1]], np.int32)
    table = np.full((9, 3 * width), np.nan, np.float32)
    table[[1, 3, 8], width : 2 * width] = inputs["deepstack_embeds"][[1, 3, 8], width : 2 * width]
    inputs |= {"deepstack_embeds": table, "deepstack_index": index}
    for output in three(host_library, {"layer": 1}, inputs):
        assert np.isfinite(output).all()
        np.testing.assert_array_equal(output[0, [0, 2]], inputs["hidden_states"][0, [0, 2]])


@pytest.mark.parametrize("wrong", [-1, 5, 6, 2**31 - 1, -(2**31)])
def test_an_index_that_is_no_row_adds_nothing(host_library: PluginLibrary, wrong: int) -> None:
    inputs = tensors((1, 4), 64, 5, 1)(np.random.default_rng(0))
    inputs["deepstack_index"][...] = [4, wrong, wrong, 2]
    for output in three(host_library, {"layer": 0}, inputs):
        np.testing.assert_array_equal(output[0, 1:3], inputs["hidden_states"][0, 1:3])
        assert (output[0, [0, 3]] != inputs["hidden_states"][0, [0, 3]]).all()


def test_text_keeps_its_bits(host_library: PluginLibrary) -> None:
    """Also those of numbers that are none, and the sign of zero."""
    inputs = tensors((1, 3), 64, 2, 1)(np.random.default_rng(0))
    inputs["deepstack_index"][...] = 0
    inputs["hidden_states"][0, :, :3] = [-0.0, np.inf, np.nan]
    output = host_library.run(OP, {"layer": 0}, inputs)["output"]
    np.testing.assert_array_equal(output.view(np.uint32), inputs["hidden_states"].view(np.uint32))


def test_fp16_is_rounded_once(host_library: PluginLibrary) -> None:
    """1 + 2^-11 + 2^-20 is above the middle between two fp16 numbers; rounding the entry first would lose it."""
    inputs = {
        "hidden_states": np.ones((1, 64), np.float16),
        "deepstack_embeds": np.array([[0], [2.0**-11 + 2.0**-20]], np.float32).repeat(64, axis=1),
        "deepstack_index": np.array([1], np.int32),
    }
    for output in three(host_library, {"layer": 0}, inputs):
        assert (output == np.float16(1 + 2.0**-10)).all()


def test_vector_loads_in_the_machine_code() -> None:
    """Outside of loops, hence not among what static.py can ask for; the one narrow load is the index."""
    needs_nvrtc()
    for each in compile_and_read("deepstack_add"):
        if not each.kernel.endswith("_scalar"):
            assert each.code.wide_loads >= 2 and each.code.narrow_loads == 1, each.kernel


def test_bytes_of_the_roofline() -> None:
    assert add_work(1, 0, "float32").nbytes == 2 * 2048 * 4 + 4
    assert add_work(2, 1, "float16").nbytes == 2 * (2 * 2048 * 4 + 4) + 2048 * 2
