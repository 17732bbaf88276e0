"""deepstitch's own runtime on an exported bundle."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

import deepstitch
from benchmarks.peers.children.base import main
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.calls import RowTokens
from deepstitch.runtime.decode import DecoderState
from deepstitch.runtime.embedding import EmbeddingTable, PromptRows
from deepstitch.runtime.engine.ort import OrtEngine
from deepstitch.runtime.generate import Generation
from deepstitch.runtime.preprocess import Prompt
from deepstitch.runtime.sampling import GenerationOptions


class Watch:
    """Seconds spent inside an engine's calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, on the clock."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return run(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


class WatchedGraph:
    """A graph whose runs are timed."""

    def __init__(self, graph: Any, watch: Watch) -> None:
        self._graph, self._watch = graph, watch
        self.run = watch.timed(graph.run)

    def bind(self, *arguments: Any, **named: Any) -> Callable[[], None]:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.bind`."""
        return self._watch.timed(self._graph.bind(*arguments, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


class WatchedEngine:
    """An engine whose decoder runs are timed."""

    def __init__(self, engine: Any, watch: Watch) -> None:
        self._engine = engine
        self.decoder = WatchedGraph(engine.decoder, watch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class Deepstitch:
    """The decoder alone, or the whole pipeline where a picture is asked for."""

    def __init__(self, request: dict[str, Any]) -> None:
        folder, threads = request["files"]["bundle"], request["threads"]
        self._pipeline: Any = None
        if "vision" in request["parts"]:
            self._pipeline = deepstitch.load(folder, threads=threads, encoder_cache_bytes=0, progress=False)
            self.engine, self._table = self._pipeline.engine, self._pipeline.parts.table
        else:
            bundle = Bundle.open(folder, progress=False)
            self.engine = OrtEngine(bundle, threads=threads, graphs=["decoder"])
            self._table = EmbeddingTable.open(bundle)
        self._model = self.engine.bundle.manifest.model
        self._notes: dict[str, Any] = {}

    def _row(self, ids: npt.NDArray[np.int64], start: int = 0) -> RowTokens:
        count = len(ids)
        return RowTokens(
            embeds=PromptRows(self._table, ids, ids[:0], ()),
            position_ids=np.tile(np.arange(start, start + count, dtype=np.int64), (3, 1)),
            deepstack=np.zeros((0, self._model.num_deepstack * self._model.hidden_size), np.float32),
            deepstack_index=np.zeros(count, np.int32),
        )

    def prefill(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        state = DecoderState(self.engine, capacity=len(ids) + 64)
        start = time.perf_counter()
        state.prefill([self._row(ids)], chunk=settings.get("chunk"))[0].argmax()
        return time.perf_counter() - start

    def decode(self, ids: npt.NDArray[np.int64], steps: int, settings: dict[str, Any]) -> list[float]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        watch = Watch()
        state = DecoderState(WatchedEngine(self.engine, watch), capacity=len(ids) + steps + 1)
        token = int(state.prefill([self._row(ids)], chunk=settings.get("chunk", 512))[0][0].argmax())
        seconds, outside = [], []
        for step in range(steps):
            start, inside = time.perf_counter(), watch.seconds
            logits = state.step(self._table(np.array([token])), np.array([len(ids) + step]))
            token = int(logits[0].argmax())
            seconds.append(time.perf_counter() - start)
            outside.append(seconds[-1] - (watch.seconds - inside))
        self._notes["cache_bytes"] = state.cache_bytes
        self._notes["outside_engine_share"] = sum(outside[4:]) / sum(seconds[4:])
        return seconds

    def logits(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> npt.NDArray[np.float32]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        state = DecoderState(self.engine, capacity=len(ids))
        return state.prefill([self._row(ids)], wanted=[range(len(ids))])[0]

    def _prompt(self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64]) -> Prompt:
        """The picture between its start and end tokens, then ``ids``."""
        processor, model = self._pipeline.parts.processor, self._model
        tokens = (model.vision_start_token_id, model.image_token_id, model.vision_end_token_id)
        text = "".join(processor.tokenizer.token(each) for each in tokens)
        prompt = processor.from_text(text, images=[Image.fromarray(pixels)])
        first = len(prompt.input_ids) + prompt.rope_delta
        positions = np.tile(np.arange(first, first + len(ids), dtype=np.int64), (3, 1))
        return dataclasses.replace(
            prompt,
            input_ids=np.concatenate([prompt.input_ids, ids]),
            position_ids=np.concatenate([prompt.position_ids, positions], axis=1),
        )

    def encode(self, pixels: npt.NDArray[np.uint8], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        batch = self._prompt(pixels, np.zeros(0, np.int64)).vision
        assert batch is not None
        start = time.perf_counter()
        self.engine.vision(batch)
        return time.perf_counter() - start

    def first_token(self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        start = time.perf_counter()
        options = GenerationOptions(max_tokens=1, ignore_eos=True)
        generation = Generation(self._pipeline.parts, [self._prompt(pixels, ids)], options)
        next(iter(generation))
        return time.perf_counter() - start

    def notes(self) -> dict[str, Any]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        notes, self._notes = self._notes, {}
        return notes


if __name__ == "__main__":
    main(Deepstitch)
