"""KVCacheAppend in place and out of place, in pieces, against today's graphs, and as what SparseAttention reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from deepstitch.export.functions import function_proto
from deepstitch.plugins.common.case import Array, Case, nmse
from deepstitch.plugins.common.schema import PluginError
from deepstitch.plugins.kv_cache_append.cases import CASES, inputs
from deepstitch.plugins.kv_cache_append.reference import reference
from deepstitch.plugins.kv_cache_append.roofline import append_work
from deepstitch.plugins.kv_cache_append.schema import KV_FORMATS, SCHEMA
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import load

from .definition import run_definition
from .single_node import one_node, run

OP = SCHEMA.name
Arrays = dict[str, Array]


def cache_names(kv_format: str) -> dict[str, str]:
    """Tensors of the new cache, and the old ones they may be written over."""
    outputs = [spec.name for spec in SCHEMA.outputs({"kv_format": kv_format})]
    return {name: name.replace("present", "past") for name in outputs}


def junk(made: Arrays) -> Arrays:
    """The same call, with every bit pattern in the old cache, NaN of all kinds among them."""
    rng = np.random.default_rng(0)
    past = {name: each for name, each in made.items() if name.startswith("past_") and name != "past_lengths"}
    noise = {name: rng.integers(0, 256, each.nbytes, np.uint8) for name, each in past.items()}
    return made | {name: bits.view(past[name].dtype).reshape(past[name].shape) for name, bits in noise.items()}


def bits(arrays: Arrays) -> dict[str, bytes]:
    return {name: each.tobytes() for name, each in arrays.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda each: each.name)
def test_in_place_gives_the_same_bits(host_library: PluginLibrary, case: Case) -> None:
    """Over the old keys and values, or over one of them alone; slots that get no token keep every bit."""
    attributes = SCHEMA.resolve(case.attributes)
    made, names = junk(case.make()), cache_names(attributes["kv_format"])
    apart = host_library.run(OP, attributes, made)
    assert bits(apart) == bits(reference(attributes, made))
    with host_library.create(OP, attributes) as instance:
        for shared in (names, {"present_value": "past_value"}):
            with instance.prepare(made, shared=shared) as call:
                for order in (0, 1):
                    call.enqueue(order)
                    assert bits(call.outputs()) == bits(apart)


@pytest.mark.parametrize(
    ("shared", "text"),
    [
        ({"present_key": "past_value"}, "present_key overlaps past_value in memory; only the same address for"),
        ({"present_key": "past_key", "present_value": "past_key"}, "present_value overlaps past_key in memory"),
        ({"present_key": "key"}, "present_key is no tensor like the input"),
        ({"present": "past_key"}, "there is no tensor present "),
        ({"present_key": "past"}, "there is no tensor past "),
    ],
)
def test_other_memory_is_refused(host_library: PluginLibrary, shared: dict[str, str], text: str) -> None:
    made = inputs([1], [1], tokens=1, capacity=4)(np.random.default_rng(0))
    with host_library.create(OP, {}) as instance, pytest.raises(PluginError, match=text):
        instance.prepare(made, shared=shared).enqueue()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_pieces_are_the_whole(host_library: PluginLibrary, kv_format: str) -> None:
    """A prompt in pieces of several sizes, padded behind their valid tokens, leaves the cache of the prompt at once."""
    attributes = {"kv_format": kv_format}
    whole = inputs([0, 0], [9, 6], tokens=9, capacity=12, kv_format=kv_format)(np.random.default_rng(0))
    expected = host_library.run(OP, attributes, whole)
    names, past = cache_names(kv_format), np.zeros(2, np.int32)
    state = dict(whole)
    for sizes in ((4, 2), (1, 1), (0, 3), (4, 0)):
        tokens = max(sizes)
        for part in ("key", "value"):
            piece = np.full((2, tokens, whole[part].shape[-1]), np.nan, np.float32)
            for row, size in enumerate(sizes):
                piece[row, :size] = whole[part][row, past[row] : past[row] + size]
            state[part] = piece
        state |= {"past_lengths": past.copy(), "query_lengths": np.array(sizes, np.int32)}
        found = host_library.run(OP, attributes, state)
        state |= {names[name]: value for name, value in found.items()}
        past += sizes
    assert past.tolist() == [9, 6]
    assert bits(found) == bits(expected)


def test_it_is_what_todays_graphs_write(host_library: PluginLibrary) -> None:
    """The standard operators of ``portable`` write the padding too, which nobody reads."""
    made = inputs([2, 5], [3, 4], tokens=4, capacity=9, heads=2, width=64)(np.random.default_rng(0))
    order = ("query", "key", "value", "past_key", "past_value", "past_lengths", "query_lengths")
    given = {name: (made | {"query": made["key"]})[name] for name in order}
    attributes: dict[str, Any] = {"num_heads": 2, "kv_num_heads": 2, "scale": 0.125}
    names = ["output", "present_key", "present_value"]
    model = one_node(function_proto("CachedAttention"), attributes, given, names)
    for output in model.graph.output[1:]:
        output.type.tensor_type.shape.dim.add()
    today, found = run(model, given), host_library.run(OP, {}, made)
    for name in names[1:]:
        for row, end in enumerate(made["past_lengths"] + made["query_lengths"]):
            np.testing.assert_array_equal(found[name][row, :, :end], today[name][row, :, :end])


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_attention_reads_what_was_written(host_library: PluginLibrary, kv_format: str) -> None:
    """A cache that this operator filled, under SparseAttention, is PyTorch's attention over the same keys."""
    heads, width, tokens = 2, 64, 10
    made = inputs([0], [tokens], tokens=tokens, capacity=16, heads=heads, width=width, kv_format=kv_format)(
        np.random.default_rng(0)
    )
    attributes = {"kv_format": kv_format}
    cache = host_library.run(OP, attributes, made)
    query = np.random.default_rng(1).standard_normal((1, tokens, heads * width), np.float32)
    read = {
        "query": query, "key_cache": cache["present_key"], "value_cache": cache["present_value"],
        **{f"{part}_scales": cache[f"present_{part}_scales"] for part in ("key", "value") if kv_format == "int8"},
        "past_lengths": made["past_lengths"], "query_lengths": made["query_lengths"],
    }  # fmt: skip
    attention = {"num_heads": heads, "kv_num_heads": heads, "head_dim": width, "scale": width**-0.5, **attributes}
    found = host_library.run("SparseAttention", attention, read)["output"]
    given = (torch.from_numpy(each) for each in (query, made["key"], made["value"]))
    parts = [each.unflatten(-1, (heads, width)).transpose(1, 2) for each in given]
    wanted = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(-2)
    assert nmse(found, wanted.numpy()) < {"float32": 1e-11, "float16": 1e-6, "int8": 1e-3}[kv_format]


def test_fp16_is_rounded_once_to_even(host_library: PluginLibrary) -> None:
    """Also where there is no fp16 number: to infinity, as everywhere."""
    made = inputs([0], [1], tokens=1, capacity=1, heads=1, width=4, kv_format="float16")(np.random.default_rng(0))
    made["key"][0, 0] = [1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-20, 65520, -1e9]
    attributes = {"kv_format": "float16"}
    for found in (host_library.run(OP, attributes, made), run_definition(load("kv_cache_append"), attributes, made)):
        assert found["present_key"].ravel().tolist() == [1, 1 + 2.0**-10, np.inf, -np.inf]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_head_of_no_numbers_stays_one(host_library: PluginLibrary, wrong: float) -> None:
    """Nothing hides that a key was not finite: its scale is not either. The head beside it is as ever."""
    made = inputs([0], [1], tokens=1, capacity=1, kv_format="int8")(np.random.default_rng(0))
    made["key"][0, 0, 5] = wrong
    found = host_library.run(OP, {"kv_format": "int8"}, made)
    assert np.isfinite(found["present_key_scales"]).ravel().tolist() == [False, True]
    largest = np.abs(made["key"][0, 0, 64:]).max()
    assert found["present_key_scales"][0, 1, 0] == largest / np.float32(127)


def test_bytes_of_the_roofline() -> None:
    assert append_work(4, 128, "float16", 1).nbytes == 2 * 4 * 128 * (4 + 2)
    assert append_work(4, 128, "int8", 3).nbytes == 3 * 2 * (4 * 128 * 5 + 4 * 4)
    assert append_work(2, 64, "float32", 1, copied=10).nbytes == 2 * 2 * 64 * (8 + 2 * 10 * 4)
