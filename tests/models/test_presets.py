"""The preset of the source documents' small-hardware configuration."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepstitch.errors import ConfigError
from deepstitch.export.contract import decoder_contract, vision_contract
from deepstitch.export.trace import trace_decoder, trace_vision_encoder
from deepstitch.models import ModelConfig, build_model
from deepstitch.models.presets import PRESETS, preset_config


def test_vl_sm61_is_the_documents_configuration() -> None:
    config = ModelConfig.from_dict(preset_config("vl-sm61"))
    text = config.text
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_experts, text.num_experts_per_tok) == (
        32,
        32,
        4,
        2,
    )
    assert config.num_deepstack == 3


@pytest.mark.parametrize("name", PRESETS)
def test_builds_without_memory(name: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig.from_dict(preset_config(name)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.language_model.layers) == 32


def test_traces_with_fewer_layers() -> None:
    """The widths of the preset, four layers and blocks of it."""
    full = ModelConfig.from_dict(preset_config("vl-sm61"))
    assert full.vision is not None
    vision = dataclasses.replace(full.vision, depth=4, deepstack_visual_indexes=(1, 2, 3))
    config = dataclasses.replace(full, text=dataclasses.replace(full.text, num_hidden_layers=4), vision=vision)
    for model, (inputs, outputs) in (
        (trace_decoder(config), decoder_contract(config)),
        (trace_vision_encoder(config), vision_contract(vision)),
    ):
        assert [value.name for value in model.graph.inputs] == [spec.name for spec in inputs]
        assert [value.name for value in model.graph.outputs] == [spec.name for spec in outputs]
        shapes = {value.name: tuple(value.shape) for value in model.graph.initializers.values()}
        assert all(size > 0 for shape in shapes.values() for size in shape)
    assert shapes["model.visual.pos_embed.weight"] == (2304, 1024)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'vl-sm16' \(did you mean 'vl-sm61'\?\)"):
        preset_config("vl-sm16")
