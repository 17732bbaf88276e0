"""What a loaded model consists of."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepstitch.runtime.embedding import EmbeddingTable
from deepstitch.runtime.encoder_cache import EncoderCache
from deepstitch.runtime.engine import Engine
from deepstitch.runtime.preprocess import Processor
from deepstitch.runtime.speculative import StepCosts

__all__ = ["ModelParts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """Everything a generation needs, loaded once and shared.

    Attributes:
        engine: runs the graphs.
        table: the token embedding.
        encoder: the vision encoder behind its cache.
        processor: messages and pictures to prompts.
        costs: what decoder calls were measured to cost, for speculation.
    """

    engine: Engine
    table: EmbeddingTable
    encoder: EncoderCache
    processor: Processor
    costs: StepCosts = field(default_factory=StepCosts)

    @property
    def visual_ids(self) -> list[int]:
        """Ids of the placeholder tokens of images and videos."""
        model = self.engine.bundle.manifest.model
        return [each for each in (model.image_token_id, model.video_token_id) if each is not None]
