"""What a plan adds up to, and what it says where it does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import pytest

from deepstitch.errors import InputError
from deepstitch.export.tensorrt import device
from deepstitch.export.tensorrt.advice import advise, levers
from deepstitch.export.tensorrt.device import parse_memory
from deepstitch.export.tensorrt.footprint import footprint, writes_cache_in_place
from deepstitch.export.tensorrt.memory_plan import OVERHEAD_BYTES, Choice, Planner
from deepstitch.export.tensorrt.plugin_nodes import Typed
from deepstitch.export.tensorrt.profiles import CORNERS, Limits, profiles, sizes_of
from deepstitch.export.tensorrt.shapes import Propagation
from deepstitch.export.tensorrt.subject import Subject
from deepstitch.memory_estimate import DecoderShape
from deepstitch.plugins.common.schema import PluginError

from .conftest import ADDRESS, contract_of, model

MIB = 1 << 20
SHAPE = DecoderShape(
    hidden_size=1024,
    vocab_size=2048,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=128,
    mlp_width=4096,
)
# One layer, so to say: a product, its activation, an integer product, and a cache that is read and written.
DECODER = f"""
decoder (float[B, S, 1024] x, int32[B] past_lengths, float[B, 8, C, 128] past_key)
    => (float[B, S, 2048] logits, float[B, 8, C, 128] present_key)
<float16[1024, 4096] wide, int32[2048, 512] packed, float[2048, 128] scales, float[8, 1, 1] ones>
{{
    wide32 = Cast <to = 1> (wide)
    product = MatMul (x, wide32)
    active = Sigmoid (product)
    gated = Mul (product, active)
    logits = deepstitch.plugins.QuantizedLinear <weight_format = "int4", block_size = 32, out_features = 2048,
        {ADDRESS}>
        (gated, packed, scales)
    present_key = Mul (past_key, ones)
}}
"""
CACHE = {"past_key": "past_key_values.0.key", "present_key": "present.0.key"}  # the text form knows no dots
LIMITS = Limits(max_context=4096, prefill_chunk=512)


def with_cache(text: str) -> onnx.ModelProto:
    made = model(text)
    for node in made.graph.node:
        for names in (node.input, node.output):
            names[:] = [CACHE.get(name, name) for name in names]
    for value in (*made.graph.input, *made.graph.output):
        value.name = CACHE.get(value.name, value.name)
    return made


@pytest.fixture
def subject() -> Subject:
    made = with_cache(DECODER)
    return Subject(
        name="small",
        target="trt8",
        graphs={"decoder": made},
        contracts={"decoder": contract_of(made)},
        shape=SHAPE,
        cache_dtype="float32",
        context=8192,
        merge_size=None,
        weights="int4",
        vision_weights=None,
    )


@pytest.fixture
def planner(subject: Subject) -> Planner:
    return Planner(subject, {"decoder": Propagation(subject.graphs["decoder"])})


def test_an_engine_is_added_up(planner: Planner) -> None:
    found = planner.footprints(LIMITS)["prefill"]
    folded, packed, scales = 4 * 1024 * 4096, 4 * 2048 * 512, 4 * 2048 * 128
    assert found.weights == folded + packed + scales + 4 * 8  # the fp16 matrix is multiplied as fp32
    assert found.matrices.values == 1024 * 4096 + 2048 * 4096
    assert found.matrices.nbytes == folded + packed + scales
    assert found.activations == 3 * 4 * 512 * 4096  # product, active and gated
    assert found.workspace == 512 * 4096 + 512 * 4096 // 32 * 8
    assert found.edges == 4 * 512 * 1024 + 4 + 4 * 512 * 2048  # not the cache


def test_views_and_shapes_take_nothing() -> None:
    made = model(
        """decoder (float[S, 64] x) => (float[S, 64] y) <int64[2] flat = {-1, 32}, int64[2] back = {-1, 64}>
        { doubled = Add (x, x)\n halves = Reshape (doubled, flat)\n kept = Relu (halves)\n y = Reshape (kept, back) }"""
    )
    propagation = Propagation(made)
    tensors = propagation.run({"x": Typed("float32", (10, 64))})
    assert footprint(propagation, tensors).activations == 4 * 10 * 64  # doubled; what is kept is the output's memory


def test_the_parts_of_a_plan(planner: Planner) -> None:
    items = {item.name: item for item in planner.items(Choice(limits=LIMITS, cache_dtype="float32"))}
    once = 4 * 2 * 8 * 128 * 4096
    assert items["KV cache"].nbytes == 2 * once and "twice" in items["KV cache"].basis
    assert items["activations"].nbytes == 24 * MIB and "in prefill" in items["activations"].basis
    assert items["workspace"].nbytes == 64 * MIB
    assert items["CUDA and TensorRT"].nbytes == OVERHEAD_BYTES
    half = planner.items(Choice(limits=replace(LIMITS, batch=2), cache_dtype="float16"))
    assert next(item.nbytes for item in half if item.name == "KV cache") == 2 * once


def test_a_cache_that_a_plugin_writes_is_there_once() -> None:
    assert not writes_cache_in_place(with_cache(DECODER).graph)
    plugin = DECODER.replace("= Mul (past_key, ones)", "= deepstitch.plugins.Append (past_key)")
    assert writes_cache_in_place(with_cache(plugin).graph)
    seen = plugin.replace("present_key = deep", "new = deep").replace("\n}", "\n    present_key = Identity (new)\n}")
    assert writes_cache_in_place(with_cache(seen).graph)


def test_other_weights_are_planned_without_another_export(planner: Planner) -> None:
    before, after = (
        planner.total_bytes(Choice(limits=LIMITS, cache_dtype="float32", weights=kind)) for kind in (None, "int4")
    )
    found = planner.footprints(LIMITS)["decode"].matrices
    assert before - after == found.nbytes - int(found.values * 0.625)


def applied(planner: Planner, choice: Choice, said: str) -> Choice:
    """The choice after what an advice says."""
    every = {name: change for lever in levers(planner, choice) for name, change in lever}
    for name in said.split(" (")[0].split(" together with "):
        choice = every[name](choice)
    return choice


@pytest.mark.parametrize("spare", [5, 20, 40])
def test_every_advice_is_enough(planner: Planner, spare: int) -> None:
    """And of the contexts that suffice it is the longest."""
    choice = Choice(limits=LIMITS, cache_dtype="float32")
    available = planner.total_bytes(choice) - spare * MIB
    said = advise(planner, choice, available)
    assert said and all(planner.total_bytes(applied(planner, choice, each)) <= available for each in said)
    contexts = [applied(planner, choice, each).limits.max_context for each in said if each.startswith("--max-context")]
    assert len(contexts) == 1
    longer = replace(LIMITS, max_context=contexts[0] + 256)
    assert planner.total_bytes(replace(choice, limits=longer)) > available


@pytest.mark.parametrize("spare", [1, 30])
def test_changes_that_are_enough_only_together(planner: Planner, spare: int) -> None:
    choice = Choice(limits=LIMITS, cache_dtype="float32")
    single = [change(choice) for lever in levers(planner, choice) for _, change in lever]
    available = min(map(planner.total_bytes, single)) - spare * MIB
    (said,) = advise(planner, choice, available)
    assert " together with " in said
    assert planner.total_bytes(applied(planner, choice, said)) <= available


def test_nothing_helps(planner: Planner) -> None:
    (said,) = advise(planner, Choice(limits=LIMITS, cache_dtype="float32"), 100 * MIB)
    assert said.startswith("nothing: even with ") and "a card with more memory" in said


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GB", 2 << 30), ("2 GiB", 2 << 30), ("1.5g", 3 << 29), ("1900MB", 1900 << 20)]
)
def test_sizes_of_cards(text: str, nbytes: int) -> None:
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["2", "0GB", "2TB", "two", "-1GB", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        parse_memory(text)


class Driver:
    """A card with 1.5 GiB free of 2."""

    name = "GeForce MX350"

    def call(self, function: str, free: Any, total: Any) -> None:
        assert function == "cuMemGetInfo_v2"
        free._obj.value, total._obj.value = 3 << 29, 2 << 30


def no_driver() -> Driver:
    raise PluginError("there is no NVIDIA driver on this machine")


def test_the_card_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CudaDriver", Driver)
    assert device.memory_of_card() == (3 << 29, "GeForce MX350")
    monkeypatch.setattr(device, "CudaDriver", no_driver)
    assert device.memory_of_card() is None


def test_profiles_cover_their_limits() -> None:
    limits = Limits(images=2, image_patches=64, max_context=128, batch=3, prefill_chunk=16)
    vision, prefill, decode = profiles(limits, merge_size=2)
    assert [vision.corners[corner]["P"] for corner in CORNERS] == [4, 64, 128]
    assert vision.corners["max"] == {"P": 128, "N+1": 33, "T": 32}
    assert prefill.corners["max"] == {"B": 3, "S": 16, "R": 49, "L": 1, "C": 128}
    assert decode.corners["opt"] == {"B": 1, "S": 1, "R": 1, "L": 1, "C": 128}
    for profile in (vision, prefill, decode):
        for axis in profile.corners["min"]:
            sizes = [profile.corners[corner][axis] for corner in CORNERS]
            assert sizes == sorted(sizes) and sizes[0] >= 1


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(max_context=9000), "--max-context 9000 is more than the 8192"),
        (Limits(max_context=100, prefill_chunk=101), "--prefill-chunk 101 is more than --max-context 100"),
        (Limits(image_patches=66), "--image-patches 66: 4 patches become one token"),
    ],
)
def test_limits_no_model_has(limits: Limits, text: str) -> None:
    with pytest.raises(InputError, match=text):
        limits.check(merge_size=2, context=8192)


def test_an_axis_of_no_profile_is_refused() -> None:
    inputs, _ = contract_of(model("decoder (float[Z] x) => (float[Z] y) { y = Identity (x) }"))
    with pytest.raises(InputError, match="axis Z"):
        sizes_of(inputs, {"S": 1})
