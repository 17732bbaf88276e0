"""The other side of a comparison.

The two PyTorch references share no shortcut with the bundle: every row by itself, as one sequence without a
cache, padding, chunks or turns. What the bundle computes in pieces has to come out the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deepstitch.export.compare.inputs import CaseInputs, RowInputs
from deepstitch.export.compare.stages import Floats, Stages, gather, vision_stages
from deepstitch.runtime.bundle import Bundle

__all__ = ["PyTorchReference", "Reference", "ReferenceOpener"]


class Reference(Protocol):
    """Something that computes the stages of a case."""

    def run(self, inputs: CaseInputs) -> Stages:
        """All stages of one case."""
        ...


ReferenceOpener = Callable[[], AbstractContextManager[Reference]]
"""Loads a reference; leaving the context gives its memory back."""


class PyTorchReference:
    """Our own PyTorch definition of the model, in float32.

    Weights that the bundle stores as integers are taken as stored: the comparison shows what the graphs do with them.
    Whether they are the checkpoint's is checked by itself (``stored_weights``), and what rounding them cost is another
    question, which ``deepstitch compare --quality`` answers.
    """

    def __init__(self, checkpoint: Path, expert_layout: str | None = None, *, bundle: Bundle | None = None) -> None:
        """Load the weights.

        Args:
            checkpoint: the folder that was exported.
            expert_layout: where the shapes of its experts cannot tell.
            bundle: whose integer weights and rounded keys and values replace those of the model; None replaces nothing.

        Raises:
            CheckpointError: a tensor is missing, left over, misshapen or damaged.
        """
        import torch

        from deepstitch.export.quantize.as_stored import stored_parameters
        from deepstitch.export.quantize.stored_cache import stored_cache
        from deepstitch.models import load_model

        self._model: Any = load_model(checkpoint, expert_layout=expert_layout)
        self._cache = stored_cache(bundle, self._model.config.text) if bundle is not None else None
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, values in stored_parameters(bundle) if bundle is not None else ():
                parameters[name].copy_(torch.from_numpy(values))

    def run(self, inputs: CaseInputs) -> Stages:
        """All stages of one case."""
        import torch

        with torch.inference_mode():
            encoded = [
                self._encode(inputs, item) for item in range(len(inputs.vision.grid_thw) if inputs.vision else 0)
            ]
            rows = [self._row(inputs, row, encoded) for row in inputs.rows]
        embeddings, prefill, decode = (list(column) for column in zip(*rows, strict=True))
        stages = gather(embeddings, prefill, decode)
        if encoded:
            image_embeds, deepstack = (torch.cat(parts).numpy() for parts in zip(*encoded, strict=True))
            stages = vision_stages(image_embeds, deepstack) | stages
        return stages

    def _encode(self, inputs: CaseInputs, item: int) -> tuple[Any, Any]:
        """``(T, H)`` and ``(T, taps*H)`` of one picture or clip."""
        import torch

        assert inputs.vision is not None
        arrays = inputs.vision.take([item]).graph_inputs()
        return self._model.visual(
            **{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        )

    def _row(self, inputs: CaseInputs, row: RowInputs, encoded: list[tuple[Any, Any]]) -> tuple[Floats, Floats, Floats]:
        """Merged embeddings, prefill logits and decode logits of one row."""
        import torch

        model = self._model
        ids = torch.from_numpy(np.concatenate([row.prompt, row.decode_ids]))[None]
        deepstack = None
        if row.all_items:
            visual = [torch.cat(parts) for parts in zip(*(encoded[item] for item in row.all_items), strict=True)]
            embeds, deepstack = model.merge(ids, *visual)
        else:
            embeds = model.embed_tokens(ids)
        positions = torch.from_numpy(self._positions(inputs, row))[:, None]
        hidden = model.language_model(embeds, positions, input_deepstack_embeds=deepstack, cache=self._cache)
        logits = model.lm_head(hidden)[0].numpy()
        prompt = len(row.prompt)
        return embeds[0, :prompt].numpy(), logits[:prompt], logits[prompt:]

    def _positions(self, inputs: CaseInputs, row: RowInputs) -> Any:
        from deepstitch.runtime.preprocess import MRopeState

        config = self._model.config
        if config.vision is None or inputs.vision is None:
            state, grids = MRopeState(), None
        else:
            ids = (config.image_token_id, config.video_token_id)
            state = MRopeState(visual_token_ids=ids, merge_size=config.vision.spatial_merge_size)
            grids = inputs.vision.grid_thw[list(row.all_items)]
        return np.concatenate([state.extend(row.prompt, grids), state.step(len(row.decode_ids))], axis=1)
