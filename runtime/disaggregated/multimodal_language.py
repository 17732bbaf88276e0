"""The language process: takes requests, gets pictures encoded elsewhere, and writes answers. Text needs no encoder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np

from deepstitch.errors import DeepstitchError, InputError
from deepstitch.runtime.bundle import DECODER, Bundle
from deepstitch.runtime.disaggregated.config import LanguageConfig
from deepstitch.runtime.disaggregated.conn_multimodal.link import SCRATCH_BYTES
from deepstitch.runtime.disaggregated.decoding import DecoderLoop
from deepstitch.runtime.disaggregated.encoders import MAX_ENCODERS, Encoders
from deepstitch.runtime.disaggregated.errors import EncodeFailed, PeerBusy
from deepstitch.runtime.disaggregated.faults import Faults
from deepstitch.runtime.disaggregated.identity import model_identity
from deepstitch.runtime.disaggregated.media import refuse_sources
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.pool import BlockPool, layout_for
from deepstitch.runtime.disaggregated.reception import PreparedPrompt, Reception, Request
from deepstitch.runtime.disaggregated.service import client_tls, end_tasks
from deepstitch.runtime.disaggregated.trace import LANGUAGE, Trace
from deepstitch.runtime.disaggregated.transport.sockets import new_memory
from deepstitch.runtime.embedding import EmbeddingTable, merge
from deepstitch.runtime.encoder_cache import EncoderCache
from deepstitch.runtime.engine.ort import OrtEngine
from deepstitch.runtime.generate import Generation
from deepstitch.runtime.parts import ModelParts
from deepstitch.runtime.preprocess import Processor, Prompt
from deepstitch.runtime.results import Result
from deepstitch.runtime.sampling import GenerationOptions
from deepstitch.runtime.stream import TextStream

__all__ = ["LanguageServer"]

_HEALTH_SECONDS = 10.0
_LOOK_SECONDS = 0.05


class LanguageServer:
    """Answers requests; any number at a time, in one event loop.

    Attributes:
        config: as given.
        metrics: counters and times.
    """

    def __init__(self, config: LanguageConfig) -> None:
        """Nothing is loaded before :meth:`start`."""
        self.config = config
        self.metrics = Metrics()
        self._tls = client_tls(config.tls_authority)
        self._faults = Faults(config.faults)
        self._admitted = {"text": 0, "pictures": 0}
        self._decoder: DecoderLoop | None = None
        self._encoders: Encoders | None = None
        self._reception: Reception | None = None

    async def start(self) -> None:
        """Load the bundle and look for the encode processes.

        Raises:
            DeepstitchError: the bundle cannot be used, or an encode process does not fit it.
        """
        config = self.config
        self._parts = await asyncio.get_running_loop().run_in_executor(None, _load, config)
        bundle = self._parts.engine.bundle
        model = bundle.manifest.model
        if bundle.manifest.vision is None and (config.encoders or config.registry):
            raise InputError(f"{config.bundle}: this bundle knows nothing of pictures; leave the encode processes out")
        layout = layout_for(config.pool, hidden_size=model.hidden_size, num_deepstack=model.num_deepstack)
        memory = new_memory(layout.nbytes + MAX_ENCODERS * SCRATCH_BYTES)
        self._pool = BlockPool(layout, memory[: layout.nbytes])
        self._encoders = Encoders(config, model_identity(bundle, self._parts.table), memory, self.metrics)
        self._reception = Reception(config, self._parts, self._encoders, self._pool, self.metrics, self._faults)
        self._decoder = DecoderLoop(config.max_running)
        try:
            await self._encoders.start(self._tls)
        except BaseException:
            await self.stop()
            raise
        self._pool.report(self.metrics)
        self.metrics.gauge("rooms", lambda: sum(self._admitted.values()))
        self.metrics.gauge("connections", lambda: len(self._encoders.connected) if self._encoders else 0)
        self.metrics.gauge("requests_waiting", lambda: self._decoder.waiting if self._decoder else 0)

    async def stop(self) -> None:
        """End everything; may be called twice."""
        for each in (self._encoders, self._reception, self._decoder):
            if isinstance(each, Encoders):
                await each.stop()
            elif each is not None:
                await each.close()
        self._encoders = self._reception = self._decoder = None

    @property
    def pool(self) -> BlockPool:
        """Landing blocks."""
        return self._pool

    @property
    def idle(self) -> bool:
        """No request is here, no block is held, and no release is unanswered."""
        links = self._encoders.connected.values() if self._encoders else ()
        return not any(self._admitted.values()) and self._pool.idle and all(link.idle for link in links)

    async def answer(
        self,
        messages: Any,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes] = (),
        options: dict[str, Any] | None = None,
        trace: Trace | None = None,
    ) -> AsyncGenerator[str | Result, None]:
        """Pieces of the answer, then the result. Closing the iterator ends the request.

        Args:
            messages: the user's text, or a conversation in chat format.
            images: whole files, in the order of their placeholders.
            videos: likewise.
            options: fields of :class:`deepstitch.runtime.sampling.GenerationOptions`.
            trace: takes down when what happened.

        Raises:
            DeepstitchError: the request cannot be used, or could not be served.
        """
        chosen = GenerationOptions.from_keywords(options or {})
        refuse_sources(messages)
        kind = "pictures" if images or videos else "text"  # counted apart: text needs no encode process
        if self._admitted[kind] >= self.config.max_requests:
            self.metrics.count("requests_total", outcome="busy")
            raise PeerBusy(f"{self._admitted[kind]} requests are being served, as many as are admitted; try again")
        self._admitted[kind] += 1
        try:
            request = Request(messages=messages, images=images, videos=videos)
            async with aclosing(self._answer(request, chosen, trace or Trace(LANGUAGE))) as events:
                async for event in events:
                    yield event
            self.metrics.count("requests_total", outcome="ok")
        except DeepstitchError as error:
            self.metrics.count("requests_total", outcome=getattr(error, "code", "refused"))
            raise
        except BaseException:
            self.metrics.count("requests_total", outcome="ended early")
            raise
        finally:
            self._admitted[kind] -= 1

    async def check(self) -> dict[str, Any]:
        """Take one step of the decoder; where it is busy, one for somebody else is as good.

        Raises:
            DeepstitchError: it could not be done, or not in time.
        """
        assert self._encoders is not None and self._decoder is not None
        zero = np.zeros(1, np.int64)
        prompt = Prompt(input_ids=zero, position_ids=np.zeros((3, 1), np.int64), rope_delta=0, vision=None, text="")
        width = self._parts.engine.bundle.manifest.model.num_deepstack * len(self._parts.table(zero)[0])
        tokens = merge(self._parts.table, prompt, (), visual_ids=(), deepstack_width=width)
        began = time.monotonic()

        async def step() -> None:
            options = GenerationOptions.from_keywords({"max_tokens": 1})
            async for _ in self._decode(PreparedPrompt(prompt=prompt, tokens=tokens), options):
                pass

        before = self._decoder.steps
        own = asyncio.create_task(step())
        try:
            while not own.done() and self._decoder.steps == before:
                if time.monotonic() - began > _HEALTH_SECONDS:
                    raise EncodeFailed(f"one step of the decoder took more than {_HEALTH_SECONDS:g} s")
                await asyncio.wait({own}, timeout=_LOOK_SECONDS)
            if own.done():
                own.result()
        finally:
            await end_tasks([own])
        up = {str(address): "up" for address in self._encoders.connected}
        down = {str(address): str(error) for address, error in self._encoders.problems.items()}
        pictures = bool(up) or self.config.local_encoder
        return {"seconds": time.monotonic() - began, "pictures": pictures, "encoders": {**down, **up}}

    async def _answer(
        self, request: Request, options: GenerationOptions, trace: Trace
    ) -> AsyncGenerator[str | Result, None]:
        assert self._reception is not None
        prepared = await self._reception.prepare(request, trace)
        self._faults.reached("language.decoding")
        began = time.monotonic()
        left: list[Callable[[], None]] = [prepared.follow_up]
        try:
            async with aclosing(self._decode(prepared, options)) as events:
                async for event in events:
                    if left:
                        trace.add("first token", began, time.monotonic())
                        began = time.monotonic()
                    if isinstance(event, Result):
                        trace.add("decode", began, time.monotonic())
                        self._count(event)
                    yield event
                    while left:
                        left.pop()()
        finally:
            while left:  # the client went away before
                left.pop()()

    def _decode(self, prepared: PreparedPrompt, options: GenerationOptions) -> AsyncGenerator[str | Result, None]:
        """Hand the prompt to the decoder."""
        assert self._decoder is not None

        def begin() -> TextStream:
            generation = Generation(self._parts, [prepared.prompt], options, inputs=[prepared.tokens])
            return TextStream(generation, lambda result: replace(result, timings=result.timings | prepared.seconds))

        return self._decoder.run(begin)

    def _count(self, result: Result) -> None:
        self.metrics.count("tokens_total", result.prompt_tokens, kind="prompt")
        self.metrics.count("tokens_total", result.generated_tokens, kind="generated")
        for stage in ("prefill", "decode"):
            self.metrics.observe("stage_seconds", result.timings[stage], stage=stage)


def _load(config: LanguageConfig) -> ModelParts:
    graphs = None if config.local_encoder else [DECODER]
    bundle = Bundle.open(config.bundle, progress=False, graphs=graphs)
    manifest = bundle.manifest
    engine = OrtEngine(bundle, threads=config.threads, graphs=graphs)
    return ModelParts(
        engine=engine,
        table=EmbeddingTable.open(bundle),
        encoder=EncoderCache(engine.vision, config.encoder_cache_bytes),
        processor=Processor.from_folder(bundle.folder, manifest.model, manifest.vision),
    )
