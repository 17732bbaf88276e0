"""llama.cpp through llama-cpp-python's bindings of its C interface."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp as mtmd

from benchmarks.peers.children.base import NotSupported, main

_TYPES = {"f32": lib.GGML_TYPE_F32, "f16": lib.GGML_TYPE_F16, "bf16": 30, "q8_0": lib.GGML_TYPE_Q8_0}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_SPARE = 64  # tokens of room after a prompt


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(level: int, text: bytes, _: Any) -> None:
    if level >= 4:  # errors
        print(text.decode(errors="replace"), end="")


class Context:
    """A llama_context and the number of positions in it."""

    def __init__(self, model: Any, settings: dict[str, Any], tokens: int, threads: int, *, all_logits: bool) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = -(-(tokens + _SPARE) // 256) * 256
        params.n_ubatch = int(settings.get("ubatch", 512))
        params.n_batch = max(2048, params.n_ubatch)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = _FLASH[settings.get("flash", "auto")]
        params.type_k = _TYPES[settings.get("kv", "f16")]
        params.type_v = _TYPES[settings.get("kv_v", settings.get("kv", "f16"))]
        params.no_perf = True
        self.batch_tokens = params.n_batch
        self.pointer = lib.llama_init_from_model(model, params)
        if not self.pointer:
            raise NotSupported(f"llama_init_from_model refuses {settings}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._batch = lib.llama_batch_init(self.batch_tokens, 0, 1)
        self._all_logits = all_logits
        self.position = 0

    def clear(self) -> None:
        """Forget all tokens."""
        lib.llama_memory_clear(lib.llama_get_memory(self.pointer), False)
        self.position = 0

    def feed(self, ids: npt.NDArray[np.int64]) -> None:
        """Run tokens; the logits of the last are computed, or of all."""
        for start in range(0, len(ids), self.batch_tokens):
            part = ids[start : start + self.batch_tokens]
            batch = self._batch
            batch.n_tokens = len(part)
            for index, token in enumerate(part.tolist()):
                batch.token[index] = token
                batch.pos[index] = self.position + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = self._all_logits
            batch.logits[len(part) - 1] = start + len(part) == len(ids) or self._all_logits
            code = lib.llama_decode(self.pointer, batch)
            if code:
                raise NotSupported(f"llama_decode returned {code}")
            self.position += len(part)

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        """``(rows, vocab)`` of the last call; a view."""
        return np.ctypeslib.as_array(lib.llama_get_logits(self.pointer), (rows, self.vocab))

    def free(self) -> None:
        """Give the memory back."""
        lib.llama_batch_free(self._batch)
        lib.llama_free(self.pointer)


class Llama:
    """One GGUF, and its mmproj where a picture is asked for."""

    def __init__(self, request: dict[str, Any]) -> None:
        lib.llama_log_set(_quiet, ctypes.c_void_p(0))
        mtmd.mtmd_helper_log_set(_quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._threads = request["threads"]
        self._states = Path(request["scratch"])
        self._file = Path(request["files"]["text"])
        self._vision_folder = self._file.parent
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = bool(request["open"].get("repack", True))
        self._repack = params.use_extra_bufts
        self.model = lib.llama_model_load_from_file(str(self._file).encode(), params)
        if not self.model:
            raise NotSupported(f"llama_model_load_from_file refuses {self._file.name}")
        self._contexts: dict[str, Context] = {}
        self._vision: dict[tuple[str, str], Any] = {}
        if "vision" in request["parts"]:
            self._projector(request["open"])

    def _context(self, settings: dict[str, Any], tokens: int, *, all_logits: bool = False) -> Context:
        """A fresh context; only the latest is kept, as each one reserves its cache."""
        for context in self._contexts.values():
            context.free()
        context = Context(self.model, settings, tokens, self._threads, all_logits=all_logits)
        self._contexts = {"": context}
        return context

    def prefill(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        context = self._context(settings, len(ids))
        start = time.perf_counter()
        context.feed(ids)
        context.logits(1).argmax()
        return time.perf_counter() - start

    def decode(self, ids: npt.NDArray[np.int64], steps: int, settings: dict[str, Any]) -> list[float]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        context = self._context(settings, len(ids) + steps)
        self._restore(context, ids, settings)
        context.feed(ids[-1:])
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            token = context.logits(1)[0].argmax()
            context.feed(np.array([token]))
            seconds.append(time.perf_counter() - start)
        return seconds

    def _restore(self, context: Context, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> None:
        """Fill the context with all but the last id, from a saved state where an earlier run left one."""
        before = ids[:-1]
        if len(before) < 1024:
            context.feed(before)
            return
        setting = "-".join(f"{key}={value}" for key, value in sorted(settings.items()))
        path = self._states / f"{self._file.stem}-{len(before)}-{setting}.state"
        tokens = (lib.llama_token * len(before))(*before.tolist())
        if path.exists():
            count = ctypes.c_size_t()
            read = lib.llama_state_seq_load_file(
                context.pointer, str(path).encode(), 0, tokens, len(before), ctypes.byref(count)
            )
            if read:
                context.position = len(before)
                return
            context.clear()
        context.feed(before)
        path.parent.mkdir(parents=True, exist_ok=True)
        lib.llama_state_seq_save_file(context.pointer, str(path).encode(), 0, tokens, len(before))

    def logits(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> npt.NDArray[np.float32]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        context = self._context(settings, len(ids), all_logits=True)
        context.feed(ids)
        return context.logits(len(ids)).copy()

    def _projector(self, settings: dict[str, Any]) -> Any:
        key = (settings.get("mmproj", "f16"), settings.get("vision_flash", "auto"))
        if key not in self._vision:
            params = mtmd.mtmd_context_params_default()
            params.use_gpu = False
            params.print_timings = False
            params.warmup = False
            params.n_threads = self._threads
            params.flash_attn_type = _FLASH[key[1]]
            path = self._vision_folder / f"mmproj-{key[0]}.gguf"
            self._vision[key] = mtmd.mtmd_init_from_file(str(path).encode(), self.model, params)
            if not self._vision[key]:
                raise NotSupported(f"mtmd_init_from_file refuses {path.name}")
        return self._vision[key]

    def _chunks(self, vision: Any, pixels: npt.NDArray[np.uint8]) -> tuple[Any, list[Any]]:
        """The picture between its start and end tokens, preprocessed."""
        height, width, _ = pixels.shape
        data = np.ascontiguousarray(pixels).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(width, height, data)
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        chunks = mtmd.mtmd_input_chunks_init()
        code = mtmd.mtmd_tokenize(vision, chunks, ctypes.byref(text), (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
        mtmd.mtmd_bitmap_free(bitmap)
        if code:
            raise NotSupported(f"mtmd_tokenize returned {code}")
        return chunks, [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]

    def encode(self, pixels: npt.NDArray[np.uint8], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        vision = self._projector(settings)
        holder, chunks = self._chunks(vision, pixels)
        image = next(each for each in chunks if mtmd.mtmd_input_chunk_get_type(each) == 1)
        start = time.perf_counter()
        code = mtmd.mtmd_encode_chunk(vision, image)
        seconds = time.perf_counter() - start
        mtmd.mtmd_input_chunks_free(holder)
        if code:
            raise NotSupported(f"mtmd_encode_chunk returned {code}")
        return seconds

    def embeddings(self, pixels: npt.NDArray[np.uint8], settings: dict[str, Any]) -> npt.NDArray[np.float32]:
        """``(tokens, H * (1 + taps))`` vision features."""
        vision = self._projector(settings)
        holder, chunks = self._chunks(vision, pixels)
        image = next(each for each in chunks if mtmd.mtmd_input_chunk_get_type(each) == 1)
        mtmd.mtmd_encode_chunk(vision, image)
        rows, width = mtmd.mtmd_input_chunk_get_n_tokens(image), lib.llama_model_n_embd_inp(self.model)
        found = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(vision), (rows, width)).copy()
        mtmd.mtmd_input_chunks_free(holder)
        return found

    def first_token(self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        height, width, _ = pixels.shape
        context = self._context(settings, height * width // 1024 + len(ids) + 2)
        start = time.perf_counter()
        self._see(context, pixels, settings)
        context.feed(ids)
        context.logits(1).argmax()
        return time.perf_counter() - start

    def image_logits(
        self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], settings: dict[str, Any]
    ) -> npt.NDArray[np.float32]:
        """``(n, vocab)`` logits of the text after a picture."""
        height, width, _ = pixels.shape
        context = self._context(settings, height * width // 1024 + len(ids) + 2, all_logits=True)
        self._see(context, pixels, settings)
        context.feed(ids)
        return context.logits(len(ids)).copy()

    def _see(self, context: Context, pixels: npt.NDArray[np.uint8], settings: dict[str, Any]) -> None:
        vision = self._projector(settings)
        holder, chunks = self._chunks(vision, pixels)
        past = lib.llama_pos(0)
        for chunk in chunks:
            code = mtmd.mtmd_helper_eval_chunk_single(
                vision, context.pointer, chunk, past, 0, context.batch_tokens, False, ctypes.byref(past)
            )
            if code:
                raise NotSupported(f"mtmd_helper_eval_chunk_single returned {code}")
        mtmd.mtmd_input_chunks_free(holder)
        context.position = past.value

    def notes(self) -> dict[str, Any]:
        """See :class:`benchmarks.peers.children.base.Runtime`."""
        return {}


if __name__ == "__main__":
    main(Llama)
