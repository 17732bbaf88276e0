"""A checkpoint's text files without weights, and the facts of a small model that goes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepstitch.manifest import ModelFacts, VisionFacts
from deepstitch.models.sample.tokenizer import special_id, write_text_files
from deepstitch.runtime.preprocess import Processor


@pytest.fixture(scope="session")
def vision() -> VisionFacts:
    return VisionFacts(
        in_channels=3,
        patch_size=16,
        temporal_patch_size=2,
        spatial_merge_size=2,
        num_grid_per_side=8,
        head_dim=32,
        rope_theta=10000.0,
        out_hidden_size=128,
    )


@pytest.fixture(scope="session")
def model() -> ModelFacts:
    return ModelFacts(
        model_type="qwen3_vl_moe",
        hidden_size=128,
        vocab_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=32768,
        num_deepstack=3,
        num_parameters=1,
        num_active_parameters=1,
        kv_cache_in_place=True,
        batched_continuation=False,
        rope_theta=100000.0,
        mrope_section=(6, 5, 5),
        eos_token_ids=(special_id("<|im_end|>"),),
        image_token_id=special_id("<|image_pad|>"),
        video_token_id=special_id("<|video_pad|>"),
        vision_start_token_id=special_id("<|vision_start|>"),
        vision_end_token_id=special_id("<|vision_end|>"),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fresh folder with the tokenizer, template and processor files of the sample model."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    write_text_files(path)
    return path


@pytest.fixture
def edit(folder: Path) -> Callable[..., None]:
    """``edit("preprocessor_config.json", size={...}, do_resize=None)`` changes entries of a JSON file."""

    def change(name: str, **entries: Any) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


@pytest.fixture
def processor(folder: Path, model: ModelFacts, vision: VisionFacts) -> Processor:
    return Processor.from_folder(folder, model, vision)
