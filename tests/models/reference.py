"""The same prompt through Hugging Face transformers and through our models, every stage recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepstitch.export.facts import vision_facts
from deepstitch.models import ModelConfig
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration, vision_tensors
from deepstitch.runtime.preprocess.vision_inputs import vision_inputs

HF_CLASSES = {
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
IMAGE, VIDEO = 1, 2  # the values of mm_token_type_ids


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image (one step of time) or video of ``steps`` x ``height`` x ``width`` patches."""

    kind: int
    steps: int
    height: int
    width: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.steps, self.height, self.width


def image(height: int, width: int) -> Item:
    return Item(kind=IMAGE, steps=1, height=height, width=width)


def video(steps: int, height: int, width: int) -> Item:
    return Item(kind=VIDEO, steps=steps, height=height, width=width)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What both models are fed. ``pixels`` holds the patches of each item, in prompt order."""

    input_ids: Tensor  # (B, S)
    token_types: Tensor  # (B, S)
    items: tuple[Item, ...] = ()
    pixels: tuple[Tensor, ...] = ()

    def of_kind(self, kind: int) -> tuple[Tensor | None, Tensor | None]:
        chosen = [index for index, item in enumerate(self.items) if item.kind == kind]
        if not chosen:
            return None, None
        return torch.cat([self.pixels[i] for i in chosen]), torch.tensor([self.items[i].grid for i in chosen])


@dataclass(kw_only=True)
class Stages:
    """Everything that is compared, by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    position_ids: Tensor | None = None


def make_inputs(config: ModelConfig, rows: tuple[tuple[Item, ...], ...], seed: int = 0) -> Inputs:
    """Random text around the items of each row; rows are filled up with text to one length."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> list[int]:
        return rng.integers(0, 256, length).tolist()  # the special tokens come after the bytes

    ids: list[list[int]] = []
    types: list[list[int]] = []
    for items in rows:
        row, kinds = text(4), [0] * 4
        for item in items:
            placeholder = config.image_token_id if item.kind == IMAGE else config.video_token_id
            for _ in range(item.steps):  # each step of a video stands by itself, behind its time stamp
                visual = item.height * item.width // 4
                row += [
                    *text(1),
                    config.vision_start_token_id,
                    *[placeholder] * visual,
                    config.vision_end_token_id,
                ]
                kinds += [0, 0, *[item.kind] * visual, 0]
        ids.append(row)
        types.append(kinds)
    length = max(map(len, ids)) + 5
    for row, kinds in zip(ids, types, strict=True):
        kinds += [0] * (length - len(row))
        row += text(length - len(row))
    items = tuple(item for row in rows for item in row)
    width = config.vision.patch_width if config.vision else 0
    pixels = [rng.standard_normal((int(np.prod(item.grid)), width), dtype=np.float32) for item in items]
    return Inputs(
        input_ids=torch.tensor(ids),
        token_types=torch.tensor(types, dtype=torch.int32),
        items=items,
        pixels=tuple(map(torch.from_numpy, pixels)),
    )


def packed_vision_inputs(config: ModelConfig, inputs: Inputs) -> dict[str, Tensor]:
    """The arguments of our vision encoder."""
    facts = vision_facts(config)
    assert facts is not None
    arrays = vision_inputs([item.grid for item in inputs.items], facts)._asdict()
    return {"pixel_values": torch.cat(inputs.pixels), **vision_tensors(arrays)}


def load_transformers(folder: Path, model_type: str) -> Any:
    import transformers

    kind = getattr(transformers, HF_CLASSES[model_type])
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def _record_layers(layers: nn.ModuleList, stages: Stages) -> list[Any]:
    def hook(index: int) -> Any:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            stages.tensors[f"layer {index}"] = output[0] if isinstance(output, tuple) else output

        return record

    return [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]


@torch.no_grad()
def run_transformers(model: Any, inputs: Inputs) -> Stages:
    """Every stage of the transformers model; visual rows are put into prompt order."""
    stages = Stages()
    multimodal = hasattr(model.model, "visual")
    arguments: dict[str, Any] = {"input_ids": inputs.input_ids}
    if multimodal:
        pixels, grids = inputs.of_kind(IMAGE)
        clips, clip_grids = inputs.of_kind(VIDEO)
        stages.position_ids, _ = model.model.get_rope_index(
            inputs.input_ids, inputs.token_types, image_grid_thw=grids, video_grid_thw=clip_grids
        )
        arguments |= {
            "mm_token_type_ids": inputs.token_types,
            "pixel_values": pixels,
            "image_grid_thw": grids,
        }
        arguments |= {"pixel_values_videos": clips, "video_grid_thw": clip_grids}
        if inputs.items:
            _record_vision(model, inputs, stages)
    decoder = model.model.language_model if multimodal else model.model
    hooks = _record_layers(decoder.layers, stages)
    stages.tensors["logits"] = model(**arguments, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return stages


def _record_vision(model: Any, inputs: Inputs, stages: Stages) -> None:
    """Item by item: transformers gets one image or clip at a time, we get all of them packed."""
    rows: dict[str, list[Tensor]] = {}
    for item, pixels in zip(inputs.items, inputs.pixels, strict=True):
        output = model.model.visual(pixels, grid_thw=torch.tensor([item.grid]))
        rows.setdefault("vision", []).append(output.pooler_output)
        for tap, features in enumerate(output.deepstack_features):
            rows.setdefault(f"deepstack {tap}", []).append(features)
    stages.tensors |= {name: torch.cat(parts) for name, parts in rows.items()}


@torch.no_grad()
def run_ours(model: Any, inputs: Inputs, position_ids: Tensor | None) -> Stages:
    """Every stage of our model; without ``position_ids`` the text rule."""
    stages = Stages()
    if position_ids is None:
        position_ids = torch.arange(inputs.input_ids.shape[1]).expand(3, *inputs.input_ids.shape)
    hooks = _record_layers(model.language_model.layers, stages)
    if isinstance(model, Qwen3VLMoeForConditionalGeneration):
        vision = packed_vision_inputs(model.config, inputs) if inputs.items else None
        if vision is not None:
            image_embeds, deepstack = model.get_image_feature(vision)
            stages.tensors["vision"] = image_embeds
            chunks = deepstack.split(model.config.text.hidden_size, dim=-1)
            stages.tensors |= {f"deepstack {tap}": chunk for tap, chunk in enumerate(chunks)}
        stages.tensors["logits"] = model(inputs.input_ids, position_ids, vision)
    else:
        stages.tensors["logits"] = model(inputs.input_ids, position_ids)
    for hook in hooks:
        hook.remove()
    return stages


def relative_errors(ours: Stages, theirs: Stages) -> dict[str, float]:
    """Max abs error of every stage, relative to the largest magnitude of the reference tensor."""
    assert ours.tensors.keys() == theirs.tensors.keys()
    errors = {}
    for name, expected in theirs.tensors.items():
        actual = ours.tensors[name]
        assert actual.shape == expected.shape, name
        errors[name] = float((actual - expected).abs().max() / expected.abs().max())
    return errors
