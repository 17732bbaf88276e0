"""What the manifest tells the runtime about a model, read from config.json and generation_config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

from deepstitch.errors import CheckpointError
from deepstitch.manifest import ModelFacts, VisionFacts
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.models.config import ModelConfig, TextConfig

__all__ = ["active_parameters", "embedding_name", "eos_token_ids", "model_facts", "vision_facts"]


def embedding_name(config: ModelConfig) -> str:
    """Parameter name of the token embedding."""
    return "model.language_model.embed_tokens.weight" if config.vision else "model.embed_tokens.weight"


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json, else config.json.

    Raises:
        CheckpointError: neither file names one, or a file cannot be read.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            raw = json.loads(path.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        found = raw.get("eos_token_id")
        if found is None:
            found = raw.get("text_config", {}).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not ids or any(type(token) is not int for token in ids):
                raise CheckpointError(f"{path}: eos_token_id is {found!r}, expected a token id or a list of them")
            return tuple(ids)
    raise CheckpointError(
        f"{folder}: no eos_token_id in generation_config.json or config.json; generation would not stop"
    )


def active_parameters(text: TextConfig, total: int) -> int:
    """Parameters that take part in one token: all but the experts that were not chosen."""
    per_expert = 3 * text.hidden_size * text.moe_intermediate_size
    moe_layers = sum(text.is_moe_layer(index) for index in range(text.num_hidden_layers))
    return total - moe_layers * (text.num_experts - text.num_experts_per_tok) * per_expert


def model_facts(checkpoint: Checkpoint, *, batched_continuation: bool, kv_cache_in_place: bool = True) -> ModelFacts:
    """The manifest's ``model`` section."""
    config, text = checkpoint.config, checkpoint.config.text
    total = sum(math.prod(source.shape) for source in checkpoint.sources().values())
    return ModelFacts(
        model_type=config.model_type,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        max_position_embeddings=text.max_position_embeddings,
        num_deepstack=config.num_deepstack,
        num_parameters=total,
        num_active_parameters=active_parameters(text, total),
        kv_cache_in_place=kv_cache_in_place,
        batched_continuation=batched_continuation,
        rope_theta=text.rope_theta,
        mrope_section=text.mrope_section,
        eos_token_ids=eos_token_ids(checkpoint.folder),
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
    )


def vision_facts(config: ModelConfig) -> VisionFacts | None:
    """The manifest's ``vision`` section; None for a text-only model."""
    vision = config.vision
    if vision is None:
        return None
    return VisionFacts(
        in_channels=vision.in_channels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        spatial_merge_size=vision.spatial_merge_size,
        num_grid_per_side=round(vision.num_position_embeddings**0.5),
        head_dim=vision.head_dim,
        rope_theta=vision.rope_theta,
        out_hidden_size=vision.out_hidden_size,
    )
