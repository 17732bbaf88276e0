"""MoEExperts: its definition and reference against PyTorch and against the operator of the canonical graph."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from deepstitch.export.functions import function_proto
from deepstitch.models import ops
from deepstitch.plugins.common.case import nmse
from deepstitch.plugins.common.numerics import dequantize_weights
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.moe_experts.cases import CASES, NMSE, REFUSED
from deepstitch.plugins.moe_experts.reference import activate, reference, select_experts
from deepstitch.plugins.moe_experts.schema import ACTIVATIONS, SCHEMA
from deepstitch.plugins.quantized_linear.cases import stored

from .single_node import one_node, plugin_node, run

EXPERTS, HIDDEN, INTERMEDIATE = 5, 64, 32


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def layer(weight_format: str = "float32", block: int = 0, **given: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attributes and inputs of a small layer over [2, 4] tokens."""
    attributes = {"top_k": 2, "norm_topk_prob": 1, "weight_format": weight_format, "num_experts": EXPERTS}
    attributes |= {"intermediate_size": INTERMEDIATE, "block_size": block, **given}
    inputs = {"x": normal(2, 4, HIDDEN), "router_logits": normal(2, 4, EXPERTS)}
    rows = INTERMEDIATE * (2 if attributes.get("gated", 1) else 1)
    inputs |= stored("gate_up", normal(EXPERTS, rows, HIDDEN) / 8, weight_format, block)
    return attributes, inputs | stored("down", normal(EXPERTS, HIDDEN, INTERMEDIATE) / 6, weight_format, block)


def both(attributes: dict[str, Any], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The reference and the definition."""
    return [
        reference(SCHEMA.resolve(attributes), inputs)["y"],
        run(plugin_node(SCHEMA, attributes, inputs), inputs)["y"],
    ]


def by_torch(attributes: dict[str, Any], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The layer of the PyTorch models, whose expert matrices are transposed; float64."""
    x, logits, gate_up, down = (
        torch.from_numpy(inputs[name]).double() for name in ("x", "router_logits", "gate_up", "down")
    )
    normalize = bool(attributes["norm_topk_prob"])
    return ops.moe_experts(x, logits, gate_up.mT, down.mT, attributes["top_k"], normalize).numpy()


@pytest.mark.parametrize("weight_format", ["float32", "float16"])
@pytest.mark.parametrize(("top_k", "normalize"), [(1, 0), (2, 1), (2, 0), (EXPERTS, 1)])
def test_floats_are_the_layer_of_the_models(weight_format: str, top_k: int, normalize: int) -> None:
    attributes, inputs = layer(weight_format, top_k=top_k, norm_topk_prob=normalize)
    expected = by_torch(attributes, inputs)
    for y in both(attributes, inputs):
        assert y.shape == expected.shape
        assert nmse(y, expected) < 1e-11


def test_floats_are_the_canonical_operator() -> None:
    attributes, inputs = layer()
    feeds = {name: inputs[name] for name in ("x", "router_logits")}
    feeds |= {f"{name}_proj": np.ascontiguousarray(inputs[name].swapaxes(1, 2)) for name in ("gate_up", "down")}
    canonical = one_node(function_proto("MoEExperts"), {"top_k": 2, "norm_topk_prob": 1}, feeds, ["y"])
    expected = run(canonical, feeds)["y"]
    for y in both(attributes, inputs):
        assert nmse(y, expected) < 1e-11


@pytest.mark.parametrize(("weight_format", "block"), [("int8", 32), ("int4", 32)])
def test_integers_are_near_the_layer_of_their_values(weight_format: str, block: int) -> None:
    """What remains is the rounding of x and of the activated numbers to eight bits."""
    attributes, inputs = layer(weight_format, block)
    values = {
        name: dequantize_weights(inputs[name], inputs[f"{name}_scales"], weight_format) for name in ("gate_up", "down")
    }
    expected = by_torch(attributes, inputs | values)
    for y in both(attributes, inputs):
        assert 1e-6 < nmse(y, expected) < 5e-4


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)))
def test_activations_are_those_of_torch(kind: int) -> None:
    projected = normal(7, 2 * INTERMEDIATE).astype(np.float64) * 4
    gate, up = torch.from_numpy(projected).chunk(2, dim=-1)
    expected = {
        "SwiGLU": functional.silu(gate) * up,
        "GeGLU": functional.gelu(gate, approximate="none") * up,
        "ReLU2": functional.relu(gate).square(),
        "SiLU": functional.silu(gate),
    }[ACTIVATIONS[kind]]
    np.testing.assert_allclose(activate(projected, kind, INTERMEDIATE), expected.numpy(), rtol=1e-12, atol=1e-14)


def test_the_lower_expert_wins_a_tie() -> None:
    logits = np.array([[0, 1, 1, 1, 0], [2, 2, 2, 2, 2], [-np.inf, 0, -np.inf, 0, -np.inf]], np.float32)
    weights, chosen = select_experts(logits, 2, normalize=True)
    assert chosen.tolist() == [[1, 2], [0, 1], [1, 3]]
    assert np.allclose(weights, 0.5)
    attributes, inputs = layer()
    inputs |= {"x": normal(3, HIDDEN), "router_logits": logits}
    inputs["down"][[3, 4]] = 0  # of no effect on the first two tokens
    reference_y, definition_y = both(attributes, inputs)
    assert nmse(definition_y, reference_y) < 1e-11
    assert nmse(reference_y, by_torch_of(inputs, chosen)) < 1e-11


def by_torch_of(inputs: dict[str, np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """Two SwiGLU experts a token at half the weight each."""
    x, gate_up, down = (torch.from_numpy(inputs[name]).double() for name in ("x", "gate_up", "down"))
    rows = [
        sum(down[expert] @ ops.swiglu(gate_up[expert] @ token) for expert in experts) / 2
        for token, experts in zip(x, chosen.tolist(), strict=True)
    ]
    return torch.stack(rows).numpy()


def test_experts_nobody_chose_are_not_read(host_library: PluginLibrary) -> None:
    attributes, inputs = layer()
    inputs["router_logits"][..., 3:] = -100
    before = [*both(attributes, inputs), host_library.run("MoEExperts", attributes, inputs)["y"]]
    inputs["gate_up"][3:] = inputs["down"][3:] = np.nan
    after = [*both(attributes, inputs), host_library.run("MoEExperts", attributes, inputs)["y"]]
    for clean, poisoned in zip(before, after, strict=True):
        np.testing.assert_array_equal(clean, poisoned)


@pytest.mark.parametrize(("weight_format", "block"), [("float32", 0), ("int4", 32)])
@pytest.mark.parametrize("tokens", [3, 40])
def test_what_is_not_finite_stays_with_its_token(
    host_library: PluginLibrary, weight_format: str, block: int, tokens: int
) -> None:
    attributes, inputs = layer(weight_format, block)
    inputs |= {"x": normal(tokens, HIDDEN), "router_logits": normal(tokens, EXPERTS)}
    clean = host_library.run("MoEExperts", attributes, inputs)["y"]
    inputs["x"][1, 40] = np.nan
    with np.errstate(invalid="ignore"):
        results = [host_library.run("MoEExperts", attributes, inputs)["y"], *both(attributes, inputs)]
    others = np.arange(tokens) != 1
    np.testing.assert_array_equal(results[0][others], clean[others])
    for y in results:
        assert np.isnan(y[1]).all()
        assert np.isfinite(y[others]).all()


def test_a_token_does_not_depend_on_its_neighbours(host_library: PluginLibrary) -> None:
    """Alone it takes other kernels; the numbers are the same up to the order of sums and a flipped rounding."""
    attributes, inputs = layer("int4", 32)
    inputs |= {"x": normal(40, HIDDEN), "router_logits": normal(40, EXPERTS)}
    together = host_library.run("MoEExperts", attributes, inputs)["y"]
    for token in (0, 17, 39):
        alone = inputs | {name: inputs[name][token : token + 1] for name in ("x", "router_logits")}
        assert nmse(host_library.run("MoEExperts", attributes, alone)["y"][0], together[token]) < 1e-4


@pytest.mark.parametrize(("weight_format", "block"), [("float16", 0), ("int8", 32)])
@pytest.mark.parametrize("tokens", [0, 1, 300, 5000])
def test_workspace_is_what_the_readme_says(
    host_library: PluginLibrary, weight_format: str, block: int, tokens: int
) -> None:
    attributes, inputs = layer(weight_format, block)
    inputs |= {"x": np.zeros((tokens, HIDDEN), np.float32), "router_logits": np.zeros((tokens, EXPERTS), np.float32)}
    at_once = min(tokens, 2048)
    slots = 2 * at_once
    stated = slots * (28 + 4 * INTERMEDIATE + 4 * HIDDEN)
    stated += int(slots * 1.25 * INTERMEDIATE + at_once * 1.25 * HIDDEN) if block else 0
    with host_library.create("MoEExperts", attributes) as instance, instance.prepare(inputs) as call:
        assert stated <= call.workspace_bytes <= stated + 16 * 256  # each piece begins at a multiple of 256 bytes


def test_flipped_roundings_are_rare() -> None:
    """The tolerance of a case with two roundings is that of one flipped step; nearly all are far below it."""
    cases = [case for case in CASES if case.nmse > NMSE and "tokens" in case.tags]
    assert len(cases) >= 20
    above = []
    for case in cases:
        inputs = case.make()
        expected, y = both(dict(case.attributes), inputs)
        above += [case.name] if nmse(y, expected) > NMSE else []
    assert len(above) <= len(cases) // 20, above


def test_the_table_has_every_format() -> None:
    seen, kinds, sizes = set(), set(), set()
    for case in CASES:
        resolved = SCHEMA.resolve(case.attributes)
        inputs = case.make()
        scale = inputs["down_scales"].dtype.name if "down_scales" in inputs else None
        seen.add((resolved["weight_format"], resolved["block_size"], scale))
        kinds |= {(kind, resolved["gated"]) for kind in resolved["activations"]}
        sizes.add((resolved["num_experts"], resolved["top_k"]))
    integer = product(("int4", "int8"), (32, 64, 128), ("float32", "float16"))
    assert {*integer, ("float32", 0, None), ("float16", 0, None)} <= seen
    assert kinds == {(0, 1), (1, 1), (2, 1), (3, 1), (2, 0), (3, 0)}
    assert {(1, 1), (2, 2), (3, 2), (4, 2), (4, 4), (128, 8), (256, 16), (256, 1)} <= sizes
    assert len(CASES) >= 40
    for table in (CASES, REFUSED):
        assert len({case.name for case in table}) == len(table)


def test_the_definition_is_standard_onnx() -> None:
    for case in CASES[:6]:
        model = plugin_node(SCHEMA, case.attributes, case.make())
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.functions[0].node} == {""}
