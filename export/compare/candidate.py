"""The bundle's side of a comparison: the graphs, driven exactly as the runtime drives them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from deepstitch.export.compare.inputs import CaseInputs
from deepstitch.export.compare.stages import Floats, Stages, gather, vision_stages
from deepstitch.runtime.calls import RowTokens
from deepstitch.runtime.decode import DecoderState
from deepstitch.runtime.embedding import EmbeddingTable, merge
from deepstitch.runtime.encoder_cache import VisionFeatures
from deepstitch.runtime.engine import Engine
from deepstitch.runtime.engine.memory import to_host
from deepstitch.runtime.preprocess import MRopeState, Prompt

__all__ = ["Candidate"]


class Candidate:
    """Runs cases through an engine."""

    def __init__(self, engine: Engine) -> None:
        """Open the embedding table of the engine's bundle.

        Raises:
            BundleError: the table is not one.
        """
        self._engine = engine
        self._model = engine.bundle.manifest.model
        self._vision = engine.bundle.manifest.vision
        self._table = EmbeddingTable.open(engine.bundle)
        ids = (self._model.image_token_id, self._model.video_token_id)
        self._visual_ids = [each for each in ids if each is not None]

    def run(self, inputs: CaseInputs) -> Stages:
        """All stages of one case."""
        features, stages = self._encode(inputs)
        count = len(inputs.rows)
        ropes = [MRopeState.for_model(self._model, self._vision) for _ in inputs.rows]
        total = max(len(row.prompt) + len(row.decode_ids) for row in inputs.rows)
        state = DecoderState(self._engine, rows=count, capacity=total)
        embeddings: list[list[Floats]] = [[] for _ in inputs.rows]
        logits: list[list[Floats]] = [[] for _ in inputs.rows]
        for turn in range(len(inputs.rows[0].turns)):
            tokens = [self._turn(inputs, row, turn, features, ropes[row]) for row in range(count)]
            wanted = [range(len(each)) for each in tokens]
            for row, values in enumerate(state.prefill(tokens, wanted=wanted, chunk=inputs.case.chunk)):
                embeddings[row].append(to_host(tokens[row].embeds[:]))
                logits[row].append(values)
        decode = self._decode(inputs, state, ropes)
        return stages | gather(
            [np.concatenate(each) for each in embeddings], [np.concatenate(each) for each in logits], decode
        )

    def _encode(self, inputs: CaseInputs) -> tuple[list[VisionFeatures], Stages]:
        """All pictures of all rows in one call of the vision encoder; outputs per item and as stages."""
        if inputs.vision is None:
            return [], {}
        image_embeds, deepstack = self._engine.vision(inputs.vision)
        bounds = np.cumsum([0, *inputs.vision.tokens_per_item]).tolist()
        items = [VisionFeatures(image_embeds[low:high], deepstack[low:high]) for low, high in pairwise(bounds)]
        return items, vision_stages(to_host(image_embeds), to_host(deepstack))

    def _turn(
        self, inputs: CaseInputs, row: int, turn: int, features: Sequence[VisionFeatures], rope: MRopeState
    ) -> RowTokens:
        """One turn of one row, placed after what the row holds already."""
        ids, items = inputs.rows[row].turns[turn], inputs.rows[row].items[turn]
        grids = inputs.vision.grid_thw[list(items)] if inputs.vision is not None else None
        positions = rope.extend(ids, grids)
        return merge(
            self._table,
            Prompt(input_ids=ids, position_ids=positions, rope_delta=rope.rope_delta, vision=None, text=""),
            [features[item] for item in items],
            visual_ids=self._visual_ids,
            deepstack_width=self._model.num_deepstack * self._model.hidden_size,
        )

    def _decode(self, inputs: CaseInputs, state: DecoderState, ropes: Sequence[MRopeState]) -> list[Floats]:
        """Feed the case's own tokens one by one; per row ``(n, vocab)``."""
        ids = np.stack([row.decode_ids for row in inputs.rows])  # (B, n)
        logits = np.empty((*ids.shape, self._model.vocab_size), np.float32)
        for step in range(ids.shape[1]):
            positions = np.array([int(rope.step()[0, 0]) for rope in ropes], np.int64)
            logits[:, step] = state.step(self._table(ids[:, step]), positions)
        return list(logits)
