"""onnxruntime-genai: its model builder's text decoder, its runtime."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime_genai as og

from benchmarks.peers.children.base import NotSupported, main


class GenAI:
    """One built folder; text only, as the builder leaves DeepStack out."""

    def __init__(self, request: dict[str, Any]) -> None:
        config = og.Config(request["files"]["model"])
        options = {"intra_op_num_threads": request["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)

    def _generator(self, capacity: int) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=capacity, min_length=capacity, do_sample=False)
        return og.Generator(self._model, params)

    def prefill(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        generator = self._generator(len(ids) + 8)
        start = time.perf_counter()
        generator.append_tokens(ids.astype(np.int32))
        generator.generate_next_token()
        return time.perf_counter() - start

    def decode(self, ids: npt.NDArray[np.int64], steps: int, settings: dict[str, Any]) -> list[float]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        generator = self._generator(len(ids) + steps + 8)
        generator.append_tokens(ids.astype(np.int32))
        generator.generate_next_token()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - start)
        return seconds

    def logits(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> npt.NDArray[np.float32]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        generator = self._generator(len(ids) + 8)
        generator.append_tokens(ids.astype(np.int32))
        return np.asarray(generator.get_output("logits"), np.float32)[0]

    def encode(self, pixels: npt.NDArray[np.uint8], settings: dict[str, Any]) -> float:
        """Not offered."""
        raise NotSupported("the model builder exports the text decoder only, without DeepStack")

    def first_token(self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """Not offered."""
        raise NotSupported("the model builder exports the text decoder only, without DeepStack")

    def notes(self) -> dict[str, Any]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        return {}


if __name__ == "__main__":
    main(GenAI)
