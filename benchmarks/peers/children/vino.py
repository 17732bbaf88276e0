"""OpenVINO on the graphs of our own ``ort-cpu`` bundle, which it reads as far as it knows the operators.

The cache's memory is bound to the inputs and to the outputs, two buffers in turn. Token embeddings come from the
checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from benchmarks.peers.children.base import NotSupported, main
from deepstitch.manifest import Manifest
from deepstitch.tensorfile import TensorFile, to_float32

_BLOCK = 64  # the cache's capacity is rounded up to this


class OpenVINO:
    """The decoder of a bundle, compiled for the CPU."""

    def __init__(self, request: dict[str, Any]) -> None:
        folder = Path(request["files"]["bundle"])
        manifest = Manifest.read(folder)
        self._model, self._manifest = manifest.model, manifest
        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": request["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": request["open"].get("precision", "f32"),
        }
        self._text: Any = self._compiled(core, folder / "decoder.onnx", options)
        self._vision: Any = None
        if request["runs"][0]["figure"].startswith(("image", "first_token")):
            self._vision = self._compiled(core, folder / "vision_encoder.onnx", options)
        checkpoint = TensorFile.open(Path(request["files"]["checkpoint"], "model.safetensors"))
        entry = checkpoint["model.language_model.embed_tokens.weight"]
        self._embedding, self._dtype = entry.read(), entry.dtype
        self._spare: dict[str, Any] = {}

    @staticmethod
    def _compiled(core: Any, path: Path, options: dict[str, Any]) -> Any:
        return core.compile_model(core.read_model(path), "CPU", options).create_infer_request()

    def _inputs(self, ids: npt.NDArray[np.int64], past: int, wanted: npt.NDArray[np.int64]) -> dict[str, Any]:
        count = len(ids)
        inputs = {
            "inputs_embeds": to_float32(self._embedding[ids], self._dtype)[None],
            "position_ids": np.tile(np.arange(past, past + count, dtype=np.int64), (3, 1))[:, None],
            "past_lengths": np.array([past], np.int32),
            "query_lengths": np.array([count], np.int32),
            "logit_index": wanted[None],
        }
        if self._model.num_deepstack:
            width = self._model.num_deepstack * self._model.hidden_size
            inputs["deepstack_embeds"] = np.zeros((1, width), np.float32)
            inputs["deepstack_index"] = np.zeros((1, count), np.int32)
        return inputs

    def _empty(self, capacity: int) -> dict[str, Any]:
        """Zeroed cache tensors; a second set waits for what the first call puts out."""
        specs = [each for each in self._manifest.graphs["decoder"].inputs if each.name.startswith("past_key_values.")]
        cache, self._spare = (
            {
                spec.name: openvino.Tensor(
                    np.zeros((1, int(spec.shape[1]), -(-capacity // _BLOCK) * _BLOCK, int(spec.shape[3])), spec.dtype)
                )
                for spec in specs
            }
            for _ in range(2)
        )
        return cache

    def _run(
        self, ids: npt.NDArray[np.int64], past: int, cache: dict[str, Any], wanted: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Append tokens; the entries of ``cache`` are replaced by what comes out."""
        picks = np.array([len(ids) - 1]) if wanted is None else wanted
        for name, tensor in self._spare.items():
            self._text.set_tensor(name.replace("past_key_values.", "present."), tensor)
        self._text.infer({**self._inputs(ids, past, picks), **cache}, share_inputs=True)
        for name in cache:
            cache[name], self._spare[name] = self._spare[name], cache[name]
        return self._text.get_tensor("logits").data[0]

    def prefill(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        cache = self._empty(len(ids))
        start = time.perf_counter()
        self._run(ids, 0, cache).argmax()
        return time.perf_counter() - start

    def decode(self, ids: npt.NDArray[np.int64], steps: int, settings: dict[str, Any]) -> list[float]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        cache = self._empty(len(ids) + steps)
        token = self._run(ids, 0, cache)[0].argmax()
        seconds = []
        for step in range(steps):
            start = time.perf_counter()
            token = self._run(np.array([token]), len(ids) + step, cache)[0].argmax()
            seconds.append(time.perf_counter() - start)
        return seconds

    def logits(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> npt.NDArray[np.float32]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        return self._run(ids, 0, self._empty(len(ids)), np.arange(len(ids))).copy()

    def encode(self, pixels: npt.NDArray[np.uint8], settings: dict[str, Any]) -> float:
        """Not reached: the encoder's graph is refused before."""
        raise NotSupported("pictures are not measured with OpenVINO")

    def first_token(self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """Not reached: the encoder's graph is refused before."""
        raise NotSupported("pictures are not measured with OpenVINO")

    def notes(self) -> dict[str, Any]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        return {}


if __name__ == "__main__":
    main(OpenVINO)
