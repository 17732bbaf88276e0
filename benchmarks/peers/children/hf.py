"""Hugging Face transformers, eager or through torch.compile."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.peers.children.base import main

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Transformers:
    """The checkpoint itself, in the dtype of the variant."""

    def __init__(self, request: dict[str, Any]) -> None:
        import transformers

        torch.set_num_threads(request["threads"])
        torch.set_grad_enabled(False)
        checkpoint, opened = request["files"]["checkpoint"], request["open"]
        config = AutoConfig.from_pretrained(checkpoint)
        family = "Qwen3VLMoe" if config.model_type == "qwen3_vl_moe" else "Qwen3VL"
        options = {"experts_implementation": opened["experts"]} if "experts" in opened else {}
        self.model = getattr(transformers, f"{family}ForConditionalGeneration").from_pretrained(
            checkpoint, dtype=_DTYPES[request["variant"]], **options
        )
        self.model.eval()
        self._config = self.model.config
        self._images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint) if "vision" in request["parts"] else None
        self._compiled = bool(opened.get("compile"))
        self._text, self._visual = self.model.forward, self.model.model.visual.forward
        if self._compiled:
            self._text = torch.compile(self.model.forward, dynamic=False)
            self._visual = torch.compile(self.model.model.visual.forward, dynamic=False)

    def _run(self, ids: torch.Tensor, start: int, cache: Any, keep: int) -> torch.Tensor:
        count = ids.shape[1]
        positions = torch.arange(start, start + count).expand(3, 1, count)
        return self._text(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep
        ).logits

    def _cache(self, capacity: int) -> Any:
        text = self._config.get_text_config()
        return StaticCache(config=text, max_cache_len=capacity) if self._compiled else DynamicCache(config=text)

    def prefill(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        given = torch.from_numpy(ids)[None]
        cache = self._cache(len(ids))
        start = time.perf_counter()
        self._run(given, 0, cache, 1).argmax()
        return time.perf_counter() - start

    def decode(self, ids: npt.NDArray[np.int64], steps: int, settings: dict[str, Any]) -> list[float]:
        """See :class:`benchmarks.peers.children.base.Runtime`; the context before the last id is noise."""
        cache = self._cache(len(ids) + steps)
        self._fill(cache, len(ids) - 1)
        token, seconds = torch.from_numpy(ids[-1:])[None], []
        for step in range(steps):
            start = time.perf_counter()
            token = self._run(token, len(ids) - 1 + step, cache, 1)[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
        return seconds

    def _fill(self, cache: Any, count: int) -> None:
        """Keys and values of an earlier context: their values do not change the time of a step."""
        text = self._config.get_text_config()
        shape = (1, text.num_key_value_heads, count, text.head_dim)
        for layer in range(text.num_hidden_layers):
            cache.update(torch.randn(shape, dtype=self.model.dtype), torch.randn(shape, dtype=self.model.dtype), layer)

    def logits(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> npt.NDArray[np.float32]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        return self._run(torch.from_numpy(ids)[None], 0, self._cache(len(ids)), 0)[0].float().numpy()

    def _pixels(self, pixels: npt.NDArray[np.uint8]) -> Any:
        assert self._images is not None
        return self._images(images=[Image.fromarray(pixels)], return_tensors="pt")

    def encode(self, pixels: npt.NDArray[np.uint8], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        given = self._pixels(pixels)
        values = given["pixel_values"].to(self.model.dtype)
        start = time.perf_counter()
        self._visual(values, grid_thw=given["image_grid_thw"])
        return time.perf_counter() - start

    def first_token(self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        start = time.perf_counter()
        self.image_logits(pixels, ids, settings, keep=1).argmax()
        return time.perf_counter() - start

    def image_logits(
        self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], settings: dict[str, Any], keep: int = 0
    ) -> npt.NDArray[np.float32]:
        """``(n, vocab)`` logits of the text after a picture."""
        given = self._pixels(pixels)
        config = self._config
        visual = int(given["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
        image = [config.vision_start_token_id, *[config.image_token_id] * visual, config.vision_end_token_id]
        all_ids = torch.tensor([[*image, *ids.tolist()]])
        logits = self.model(
            input_ids=all_ids,
            attention_mask=torch.ones_like(all_ids),
            mm_token_type_ids=(all_ids == config.image_token_id).int(),
            pixel_values=given["pixel_values"].to(self.model.dtype),
            image_grid_thw=given["image_grid_thw"],
            logits_to_keep=keep or len(ids),
        ).logits
        return logits[0].float().numpy()

    def notes(self) -> dict[str, Any]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        return {}


if __name__ == "__main__":
    main(Transformers)
