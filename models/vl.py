"""Vision and language in one process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deepstitch.models.config import ModelConfig
from deepstitch.models.text import Qwen3MoeLLMModel
from deepstitch.models.vision import VisionEncoder

__all__ = ["Qwen3VLMoeForConditionalGeneration"]


class _VisionLanguage(nn.Module):
    """Holds the two halves under the names the checkpoints use (``model.visual``, ``model.language_model``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vision is not None
        self.visual = VisionEncoder(config.vision)
        self.language_model = Qwen3MoeLLMModel(config.text, config.num_deepstack)


class Qwen3VLMoeForConditionalGeneration(nn.Module):
    """Qwen3-VL-MoE and, without experts, Qwen3-VL."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _VisionLanguage(config)
        assert config.image_token_id is not None and config.video_token_id is not None
        self._image_token_id = config.image_token_id
        self._video_token_id = config.video_token_id
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if config.text.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def visual(self) -> VisionEncoder:
        """The vision encoder."""
        return self.model.visual

    @property
    def language_model(self) -> Qwen3MoeLLMModel:
        """The decoder."""
        return self.model.language_model

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The token embedding."""
        return self.language_model.embed_tokens

    def get_image_feature(self, vision_inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Encode packed patches; keys and shapes are the arguments of :meth:`VisionEncoder.forward`."""
        return self.visual(**vision_inputs)

    def merge(self, input_ids: Tensor, image_embeds: Tensor, deepstack_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Put visual rows where the image and video placeholders stand.

        Args:
            input_ids: ``[B, S]``.
            image_embeds: ``[T, H]``, in reading order of the placeholders, row after row of the batch.
            deepstack_embeds: ``[T, taps * H]``.

        Returns:
            inputs_embeds ``[B, S, H]`` and input_deepstack_embeds ``[B, S, taps * H]`` (zeros at text
            positions).

        Raises:
            ValueError: the number of placeholders is not T.
        """
        visual = input_ids.eq(self._image_token_id) | input_ids.eq(self._video_token_id)
        if int(visual.sum()) != image_embeds.shape[0]:
            raise ValueError(f"{int(visual.sum())} placeholders for {image_embeds.shape[0]} visual rows")
        inputs_embeds = self.embed_tokens(input_ids)
        mask = visual[..., None]
        dense = deepstack_embeds.new_zeros(*input_ids.shape, deepstack_embeds.shape[-1])
        return (
            inputs_embeds.masked_scatter(mask, image_embeds),
            dense.masked_scatter(mask, deepstack_embeds),
        )

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, vision_inputs: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits ``[B, S, V]``.

        Args:
            input_ids: ``[B, S]``.
            position_ids: ``[3, B, S]``.
            vision_inputs: arguments of :meth:`VisionEncoder.forward`; None for text only.
        """
        deepstack: Tensor | None = None
        if vision_inputs is None:
            inputs_embeds = self.embed_tokens(input_ids)
        else:
            inputs_embeds, deepstack = self.merge(input_ids, *self.get_image_feature(vision_inputs))
        hidden = self.language_model(inputs_embeds, position_ids, input_deepstack_embeds=deepstack)
        return self.lm_head(hidden)


def vision_tensors(arrays: Mapping[str, object]) -> dict[str, Tensor]:
    """Turn the numpy arrays of ``deepstitch.runtime.preprocess`` into the arguments of the encoder."""
    return {name: torch.as_tensor(array) for name, array in arrays.items()}
