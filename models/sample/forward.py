"""Runs the model on packed batches, for training and for scoring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deepstitch.models.sample.packing import PADDING, Batch, VisionGroup, patchify, vision_geometry
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration


@dataclass(slots=True, kw_only=True)
class Output:
    """What a forward pass gives.

    Attributes:
        logits: (A, V), at the positions that predict answers.
        image_embeds: (T, H), in the order of the groups; None without pictures.
    """

    logits: Tensor
    image_embeds: Tensor | None


def gates(model: Qwen3VLMoeForConditionalGeneration) -> list[nn.Module]:
    """Returns the routers, layer by layer."""
    return [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]


def attention_mask(segments: np.ndarray) -> Tensor:
    """Returns the block-diagonal causal mask of packed rows: bool (B, 1, S, S), True where allowed."""
    seg = torch.from_numpy(segments)
    key, query = seg[:, None, :], seg[:, :, None]
    length = seg.shape[1]
    allowed = ((key == query) | (key == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
    padding = (query == PADDING) & torch.eye(length, dtype=torch.bool)  # a row of no keys would be NaN
    return (allowed | padding)[:, None]


def encode_pictures(model: Qwen3VLMoeForConditionalGeneration, group: VisionGroup) -> tuple[Tensor, Tensor]:
    """Encodes pictures of one size: image embeddings (T, H) and DeepStack rows (T, 3 * H)."""
    count, height, width, _ = group.pixels.shape
    indices, weights, cos, sin = (torch.from_numpy(array) for array in vision_geometry(height, width))
    lengths = torch.arange(count + 1, dtype=torch.int32) * cos.shape[0]
    return model.visual(
        torch.from_numpy(patchify(group.pixels)),
        indices.repeat(1, count),
        weights.repeat(1, count),
        cos.repeat(count, 1),
        sin.repeat(count, 1),
        lengths,
    )


def run(
    model: Qwen3VLMoeForConditionalGeneration,
    batch: Batch,
    *,
    use_deepstack: bool = True,
    shuffle: bool = False,
) -> Output:
    """Runs vision encoder, decoder and head on a batch.

    Args:
        model: The model.
        batch: What to run.
        use_deepstack: False feeds zeros for the DeepStack rows, to measure what they contribute.
        shuffle: Deal the image embeddings (not the DeepStack rows) to the wrong tokens.
    """
    ids = torch.from_numpy(batch.input_ids)
    embeds = model.embed_tokens(ids)
    flat = embeds.flatten(0, 1)
    deepstack: Tensor | None = None
    image_embeds: Tensor | None = None
    if batch.vision:
        encoded = [encode_pictures(model, group) for group in batch.vision]
        image_embeds = torch.cat([embed for embed, _ in encoded])
        rows = torch.from_numpy(np.concatenate([group.rows for group in batch.vision]))
        placed = image_embeds[torch.randperm(len(image_embeds))] if shuffle else image_embeds
        flat = flat.index_copy(0, rows, placed)
        if use_deepstack:
            extra = torch.cat([tap for _, tap in encoded])
            deepstack = extra.new_zeros(len(flat), extra.shape[1]).index_copy(0, rows, extra).view(*ids.shape, -1)
    hidden = model.language_model(
        flat.view_as(embeds),
        torch.from_numpy(batch.position_ids),
        input_deepstack_embeds=deepstack,
        attention_mask=attention_mask(batch.segments),
    )
    answers = hidden.flatten(0, 1)[torch.from_numpy(batch.rows)]
    return Output(logits=model.lm_head(answers), image_embeds=image_embeds)
