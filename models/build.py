"""From a config or a checkpoint folder to a PyTorch model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from deepstitch.models.config import ModelConfig
from deepstitch.models.text import Qwen3MoeForCausalLM, Qwen3MoeForCausalLMWithDeepStack
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration

__all__ = ["AnyModel", "build_model", "expected_parameters", "load_model"]

AnyModel = Qwen3VLMoeForConditionalGeneration | Qwen3MoeForCausalLM


def build_model(config: ModelConfig, *, language_only: bool = False) -> AnyModel:
    """Build the model of a config with random weights.

    Args:
        config: which model.
        language_only: build the language side of a disaggregated pair (no vision weights).
    """
    if config.vision is None:
        model: AnyModel = Qwen3MoeForCausalLM(config)
    elif language_only:
        model = Qwen3MoeForCausalLMWithDeepStack(config)
    else:
        model = Qwen3VLMoeForConditionalGeneration(config)
    if not any(parameter.is_meta for parameter in model.parameters()):
        for name, parameter in model.named_parameters():
            if "experts" in name:  # nn.Parameter(torch.empty) is the only thing torch does not initialise itself
                nn.init.normal_(parameter, std=0.02)
    return model


def expected_parameters(config: ModelConfig, *, language_only: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of a model; a tied ``lm_head.weight`` is not among them."""
    with torch.device("meta"):
        model = build_model(config, language_only=language_only)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def load_model(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    language_only: bool = False,
    expert_layout: str | None = None,
) -> AnyModel:
    """Load a checkpoint folder with strict accounting of its tensors.

    Args:
        checkpoint: folder with config.json and safetensors files.
        dtype: dtype of the parameters in memory.
        language_only: load the language side alone; vision tensors are ignored by name.
        expert_layout: ``"hub"`` or ``"transformers"`` where the shapes cannot tell (square experts).

    Raises:
        CheckpointError: a tensor is missing, left over, misshapen or damaged.
    """
    from deepstitch.models.checkpoint import Checkpoint

    opened = Checkpoint.open(checkpoint)
    with torch.device("meta"):
        model = build_model(opened.config, language_only=language_only)
    sources = opened.sources(language_only=language_only, expert_layout=expert_layout)
    model.to_empty(device="cpu")
    if opened.config.text.tie_word_embeddings:  # to_empty gives each module its own tensor
        model.lm_head.weight = model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(sources[name].read_float32()))
    return model.to(dtype).eval()
