"""Random text for a decoder: what benchmarks of the bare decoder feed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.decode import RowTokens
from deepstitch.runtime.embedding import EmbeddingTable, PromptRows
from deepstitch.runtime.engine.ort import OrtEngine

__all__ = ["TextDecoder"]


class TextDecoder:
    """The decoder of a bundle and its token embedding."""

    def __init__(self, folder: Path, threads: int, *, packed_cache: bool = False) -> None:
        bundle = Bundle.open(folder)
        model = bundle.manifest.model
        self.engine = OrtEngine(bundle, threads=threads, graphs=["decoder"], packed_cache=packed_cache)
        self.table = EmbeddingTable.open(bundle)
        self._no_rows = np.zeros((0, model.num_deepstack * model.hidden_size), np.float32)

    def random_ids(self, *shape: int, seed: int = 0) -> np.ndarray:
        """Token ids, int64."""
        return np.random.default_rng(seed).integers(0, len(self.table), shape)

    def text(self, ids: np.ndarray, start: int = 0) -> RowTokens:
        """``(n,)`` ids as tokens of a text, the first of them at position ``start``."""
        return RowTokens(
            embeds=PromptRows(self.table, ids, ids[:0], ()),
            position_ids=np.tile(np.arange(start, start + len(ids)), (3, 1)),
            deepstack=self._no_rows,
            deepstack_index=np.zeros(len(ids), np.int32),
        )
