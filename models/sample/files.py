"""Writes the checkpoint folder that ships, and the state a training run resumes from."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deepstitch.models.build import build_model
from deepstitch.models.config import ModelConfig
from deepstitch.models.sample.tokenizer import model_config, write_text_files
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration

CHECKPOINT = Path(__file__).parent / "checkpoint"


def new_model() -> Qwen3VLMoeForConditionalGeneration:
    """Returns the sample model with torch's default weights."""
    model = build_model(ModelConfig.from_dict(model_config()))
    assert isinstance(model, Qwen3VLMoeForConditionalGeneration)
    return model


def write_checkpoint(model: Qwen3VLMoeForConditionalGeneration, folder: Path) -> None:
    """Writes a complete Hugging Face folder with bf16 weights; existing files are replaced one by one, whole.

    Args:
        model: The trained model.
        folder: Where to write; created if missing, other files in it are left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        path = Path(scratch)
        save_file(weights, str(path / "model.safetensors"), metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(model_config(), indent=2) + "\n", encoding="utf-8")
        write_text_files(path)
        for file in sorted(path.iterdir()):
            file.chmod(0o644)
            file.replace(folder / file.name)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Saves a training state atomically."""
    scratch = path.with_suffix(".partial")
    torch.save(state, scratch)
    shutil.move(str(scratch), str(path))


def round_to_bfloat16(model: Qwen3VLMoeForConditionalGeneration) -> None:
    """Rounds the weights in place to what the shipped file holds; they stay float32 in memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
