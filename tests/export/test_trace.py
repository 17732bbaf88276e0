"""The canonical graphs: contract, operators, size, and that they compute what the PyTorch model computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir
import pytest

from deepstitch.export.contract import decoder_contract, vision_contract
from deepstitch.export.functions import DOMAIN
from deepstitch.export.lower import target
from deepstitch.export.trace import INV_FREQ, trace_decoder
from deepstitch.export.weights import WeightPlan
from deepstitch.manifest import TensorSpec
from deepstitch.models import ModelConfig, load_model
from deepstitch.models.build import expected_parameters
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.engine.ort import ORT_TARGETS

from .graphs import (
    CALLS,
    assert_close,
    decoder_feeds,
    decoder_reference,
    op_counts,
    run,
    vision_feeds,
    vision_reference,
    weight_plan,
    with_weights,
)

Trace = Callable[[ModelConfig], ir.Model]
Checkpoints = Callable[..., Checkpoint]
FAMILIES = ("qwen3_vl_moe", "qwen3_moe", "qwen3_vl", "qwen3")
GRIDS = [(1, 4, 6), (2, 4, 4), (1, 2, 2)]


def specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=value.name or "",
            dtype=value.dtype.numpy().name,
            shape=tuple(size if isinstance(size, int) else size.value for size in value.shape),
        )
        for value in values
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_has_the_contract_and_one_node_per_idea(
    family: str, checkpoints: Checkpoints, traced_decoder: Trace
) -> None:
    config = checkpoints(family).config
    model = traced_decoder(config)
    assert (specs(model.graph.inputs), specs(model.graph.outputs)) == decoder_contract(config)
    counts = op_counts(model)
    layers = config.text.num_hidden_layers
    ours = {name.removeprefix(f"{DOMAIN}."): n for name, n in counts.items() if name.startswith(f"{DOMAIN}.")}
    expected = {"MRotaryCosSin": 1, "CachedAttention": layers}
    expected |= {"MoEExperts": layers} if "moe" in family else {}
    expected |= {"DeepStackAdd": 3} if "vl" in family else {}
    assert ours == expected
    assert {name for _, name, _ in model.functions} == set(expected)
    assert counts["RMSNormalization"] == 4 * layers + 1 and counts["RotaryEmbedding"] == 2 * layers


@pytest.mark.parametrize("family", FAMILIES)
def test_initializers_are_the_parameters_without_data(
    family: str, checkpoints: Checkpoints, traced_decoder: Trace, traced_vision_encoder: Trace
) -> None:
    config = checkpoints(family).config
    models = [traced_decoder(config)] + ([traced_vision_encoder(config)] if config.vision else [])
    shapes: dict[str, tuple[int, ...]] = {}
    for model in models:
        for name, value in model.graph.initializers.items():
            if name == INV_FREQ:
                assert value.const_value is not None
                continue
            if name in expected_parameters(config):
                assert value.const_value is None, "weights are bound later"
                shapes[name] = tuple(value.shape)
    expected = expected_parameters(config)
    unused = {name for name in expected if name.endswith("embed_tokens.weight")}  # looked up by the runtime
    assert shapes == {name: shape for name, shape in expected.items() if name not in unused}


def test_vision_encoder_has_the_contract(checkpoints: Checkpoints, traced_vision_encoder: Trace) -> None:
    config = checkpoints("qwen3_vl_moe").config
    model = traced_vision_encoder(config)
    assert config.vision is not None
    assert (specs(model.graph.inputs), specs(model.graph.outputs)) == vision_contract(config.vision)
    counts = op_counts(model)
    assert counts[f"{DOMAIN}.SegmentAttention"] == config.vision.depth
    assert not {"Loop", "NonZero", "If"} & set(counts), "no loop over images"


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3"])
@pytest.mark.parametrize("call", CALLS)
def test_canonical_decoder_computes_what_the_model_computes(
    family: str, call: str, checkpoints: Checkpoints, traced_decoder: Trace
) -> None:
    checkpoint = checkpoints(family)
    feeds = decoder_feeds(checkpoint.config, CALLS[call])
    model = with_weights(traced_decoder(checkpoint.config), weight_plan(checkpoint))
    assert_close(run(model, feeds), decoder_reference(load_model(checkpoint.folder), feeds), feeds)


def test_canonical_vision_encoder_computes_what_the_model_computes(
    checkpoints: Checkpoints, traced_vision_encoder: Trace
) -> None:
    checkpoint = checkpoints("qwen3_vl_moe")
    feeds = vision_feeds(checkpoint.config, GRIDS)
    model = with_weights(traced_vision_encoder(checkpoint.config), weight_plan(checkpoint))
    assert_close(run(model, feeds), vision_reference(load_model(checkpoint.folder), feeds), feeds)


@pytest.mark.slow
def test_tracing_is_deterministic(checkpoints: Checkpoints) -> None:
    config = checkpoints("qwen3").config
    first, second = (
        ir.serde.serialize_model(trace_decoder(config)).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


@dataclasses.dataclass(frozen=True)
class Shape:
    """Stands for a stored tensor that nobody reads."""

    shape: tuple[int, ...]
    dtype: str = "BF16"
    in_place: None = None


def lowered_nodes(config: ModelConfig, name: str, trace: Trace) -> int:
    sources = {parameter: Shape(shape) for parameter, shape in expected_parameters(config).items()}
    plan = WeightPlan(sources, weights="fp32", by_reference=False, tied=None)
    model = trace(config)
    for each in target(name).passes(plan):
        each(model)
    plan.bind(model)
    return sum(1 for _ in model.graph.all_nodes())  # subgraphs included


@pytest.mark.parametrize("name", ORT_TARGETS)
def test_node_budget_of_the_30b_decoder(name: str, checkpoints: Checkpoints, traced_decoder: Trace) -> None:
    """48 layers and 128 experts stay under 4,000 nodes.

    Derived, not traced: a fourth layer (behind the three DeepStack layers) adds as many nodes as each of the
    44 that follow, because layers differ in nothing but their index. Widths do not matter, and that the
    number of experts does not is checked here.
    """
    four = checkpoints("qwen3_vl_moe").config
    three = dataclasses.replace(four, text=dataclasses.replace(four.text, num_hidden_layers=3))
    experts = dataclasses.replace(four, text=dataclasses.replace(four.text, num_experts=128))
    nodes = lowered_nodes(four, name, traced_decoder)
    per_layer = nodes - lowered_nodes(three, name, traced_decoder)
    assert lowered_nodes(experts, name, traced_decoder) == nodes
    assert 10 < per_layer < 80
    assert nodes + 44 * per_layer < 4000
