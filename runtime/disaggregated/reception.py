"""From a client's pictures to decoder inputs: what is known, what an encode process sends, what is done here."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec import structs

from deepstitch.runtime.calls import RowTokens
from deepstitch.runtime.disaggregated.config import Address, LanguageConfig
from deepstitch.runtime.disaggregated.conn_multimodal.link import Link
from deepstitch.runtime.disaggregated.conn_multimodal.receiver import ReceivedPrompt, Receiver, ReceiverTools
from deepstitch.runtime.disaggregated.encoders import Encoders
from deepstitch.runtime.disaggregated.errors import (
    DeadlineExceeded,
    DisaggregationError,
    NoEncoder,
    PeerBusy,
    ProtocolError,
    RequestTooLarge,
)
from deepstitch.runtime.disaggregated.faults import Faults
from deepstitch.runtime.disaggregated.framing import REQUEST_LIMIT
from deepstitch.runtime.disaggregated.messages import EncodeRequest
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.pool import BlockPool
from deepstitch.runtime.disaggregated.service import ComputeThread
from deepstitch.runtime.disaggregated.trace import ENCODE, Span, Trace
from deepstitch.runtime.embedding import merge
from deepstitch.runtime.encoder_cache import VisionFeatures
from deepstitch.runtime.parts import ModelParts
from deepstitch.runtime.preprocess import KnownImage, Prompt, VisionBatch

__all__ = ["PreparedPrompt", "Reception", "Request"]

_MAX_FAILURES = 4  # a request that kills its encoder must not kill all of them
_KNOWN_PICTURES = 4096
_BUSY_PAUSE, _LONGEST_BUSY_PAUSE = 0.1, 2.0  # seconds; every time all pictures are sent again
# What the schema of a request takes, and the length of its frame with room for what is not media
_MAX_TEXT, _MAX_IMAGES, _MAX_CLIPS = 64 << 20, 1024, 64
_MAX_BYTES = REQUEST_LIMIT - (1 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client wants answered; media are whole files, in the order of their placeholders."""

    messages: Any
    images: Sequence[bytes] = ()
    videos: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedPrompt:
    """A prompt and what it looks like to the decoder.

    Attributes:
        seconds: per stage, for the timings of the result.
    """

    prompt: Prompt
    tokens: RowTokens
    seconds: dict[str, float] = field(default_factory=dict)


class Reception:
    """Prepares the prompts of one language process."""

    def __init__(
        self,
        config: LanguageConfig,
        parts: ModelParts,
        encoders: Encoders,
        pool: BlockPool,
        metrics: Metrics,
        faults: Faults,
    ) -> None:
        self._config = config
        self._parts = parts
        self._encoders = encoders
        self._pool = pool
        self._metrics = metrics
        self._faults = faults
        self._text = ComputeThread("text")  # never behind a picture
        self._pictures = ComputeThread("pictures")
        self._known: OrderedDict[bytes, KnownImage] = OrderedDict()

    async def close(self) -> None:
        """End the threads."""
        await self._text.close()
        await self._pictures.close()

    async def prepare(self, request: Request, trace: Trace) -> PreparedPrompt:
        """Text, and pictures that are known, are prepared here; for others an encode process is asked.

        Raises:
            DeepstitchError: the request cannot be used, or no encode process can serve it.
        """
        if not request.images and not request.videos:
            return await self._here(request, (), trace, self._text)
        began = time.monotonic()
        recalled = await self._pictures.run(lambda: self._recall(request))
        if recalled is not None:
            self._metrics.count("cache_hits_total", len(request.images))
            trace.add("preprocess", began, time.monotonic())
            return recalled
        self._metrics.count("cache_misses_total", len(request.images) + len(request.videos))
        received = await self._from_encoders(request, trace)
        if received is None:
            self._metrics.count("local_encodes_total")
            return await self._here(request, request.images, trace, self._pictures)
        with trace.span("unpack"):
            return await self._pictures.run(lambda: self._unpack(request, received))

    async def _here(
        self, request: Request, images: Sequence[Any], trace: Trace, thread: ComputeThread
    ) -> PreparedPrompt:
        with trace.span("preprocess"):
            return await thread.run(lambda: self._prepared(request, images))

    def _prepared(self, request: Request, images: Sequence[Any]) -> PreparedPrompt:
        began = time.monotonic()
        prompt = self._parts.processor(request.messages, images=list(images), videos=list(request.videos))
        prepared = time.monotonic()
        (features,) = self._parts.encoder.features([prompt.vision])
        seconds = {"preprocess": prepared - began, "encode": time.monotonic() - prepared}
        return PreparedPrompt(prompt=prompt, tokens=self._merged(prompt, features), seconds=seconds)

    def _merged(self, prompt: Prompt, features: Sequence[VisionFeatures]) -> RowTokens:
        parts, model = self._parts, self._parts.engine.bundle.manifest.model
        width = model.num_deepstack * model.hidden_size
        return merge(parts.table, prompt, features, visual_ids=parts.visual_ids, deepstack_width=width)

    def _recall(self, request: Request) -> PreparedPrompt | None:
        """The prompt, if the encoder outputs of all its pictures are here.

        Looking and taking are one piece of work of the thread: between two, another request could push them out.
        """
        if request.videos:
            return None
        known = [self._known.get(hashlib.sha256(image).digest()) for image in request.images]
        found = [each for each in known if each is not None and self._parts.encoder.get(each.key) is not None]
        return self._prepared(request, found) if len(found) == len(known) else None

    async def _from_encoders(self, request: Request, trace: Trace) -> ReceivedPrompt | None:
        """Ask one encode process after another; None: none can be asked, and there is an encoder here."""
        try:
            message = _encode_request(request)
        except RequestTooLarge:
            if self._config.local_encoder:
                return None
            raise
        attempt = failures = 0
        began = time.monotonic()
        deadline, patience = began + self._config.deadlines.request, began + self._config.deadlines.encoder
        tried: set[Address] = set()
        pause = _BUSY_PAUSE
        while True:
            link = self._encoders.pick(tried, (*request.images, *request.videos)[0])
            if link is None:
                if self._config.local_encoder:
                    return None
                await self._wait_for_encoder(patience)
                continue
            try:
                return await self._attempt(link, structs.replace(message, attempt=attempt), deadline, trace)
            except DisaggregationError as error:
                self._metrics.count("attempts_total", outcome=error.code)
                busy = isinstance(error, PeerBusy)
                attempt += 1
                failures += not busy
                tried.add(link.caller.address)
                spent = failures >= _MAX_FAILURES
                # the pool of another encode process may be larger
                too_large = isinstance(error, RequestTooLarge)
                again = error.retryable or (too_large and self._encoders.pick_new(tried) is not None)
                if (spent or not again) and (error.retryable or too_large) and self._config.local_encoder:
                    return None
                if spent or not again or time.monotonic() >= deadline:
                    raise
                patience = time.monotonic() + self._config.deadlines.encoder
                if busy:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_BUSY_PAUSE)

    async def _wait_for_encoder(self, patience: float) -> None:
        left = patience - time.monotonic()
        if left > 0 and (self._config.encoders or self._config.registry):
            await self._encoders.wait_for_change(left)
            return
        reasons = "; ".join(str(error) for error in self._encoders.problems.values()) or "none is configured"
        raise NoEncoder(f"no encode process can be reached ({reasons}); start one, or pass --local-encoder")

    async def _attempt(self, link: Link, message: EncodeRequest, deadline: float, trace: Trace) -> ReceivedPrompt:
        blocks = min(self._config.pool.first_blocks or self._config.pool.blocks, self._config.pool.blocks)
        tools = ReceiverTools(
            pool=self._pool,
            first_tokens=blocks * self._pool.layout.block_tokens,
            hang=self._config.deadlines.hang,
            deadline=deadline,
            faults=self._faults,
            mark=trace.add,
        )
        link.rooms += 1
        try:
            running = Receiver(tools, link, message).run()
            received = await asyncio.wait_for(running, timeout=max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"not encoded within {self._config.deadlines.request:g} s") from None
        finally:
            link.rooms -= 1
        self._check(link, received)
        self._report(received, trace)
        return received

    def _check(self, link: Link, received: ReceivedPrompt) -> None:
        """Ids, rows and pictures must agree: the decoder would take one picture's rows for another's."""
        manifest, ids = self._parts.engine.bundle.manifest, received.input_ids
        assert manifest.vision is not None
        merged = manifest.vision.spatial_merge_size**2
        tokens = sum(math.prod(item.grid) // merged for item in received.items)
        rows = tokens if manifest.model.num_deepstack else 0
        known = ids.min() >= 0 and ids.max() < manifest.model.vocab_size
        if not known or np.isin(ids, self._parts.visual_ids).sum() != tokens or len(received.deepstack) != rows:
            raise ProtocolError(f"{link.caller.address}: sent a prompt that does not fit its own pictures")

    def _report(self, received: ReceivedPrompt, trace: Trace) -> None:
        self._metrics.count("attempts_total", outcome="ok")
        self._metrics.count("transfers_total", kind="initial")
        self._metrics.count("transfers_total", received.resumes, kind="resumed")
        self._metrics.observe("stage_seconds", received.seconds["transfer"], stage="transfer")
        begin = received.seconds.get("began", 0.0)
        for stage in ("preprocess", "encode"):
            end = begin + received.seconds.get(stage, 0.0)
            trace.spans.append(Span(ENCODE, stage, begin, end))
            begin = end

    def _unpack(self, request: Request, received: ReceivedPrompt) -> PreparedPrompt:
        """Decoder inputs, and encoder outputs to remember."""
        visual = np.isin(received.input_ids, self._parts.visual_ids)
        index = np.where(visual, np.cumsum(visual), 0).astype(np.int32) if len(received.deepstack) else None
        tokens = RowTokens(
            embeds=received.embeds,
            position_ids=received.position_ids,
            deepstack=received.deepstack,
            deepstack_index=np.zeros(len(visual), np.int32) if index is None else index,
        )
        vision = self._vision(received)
        prompt = Prompt(
            input_ids=received.input_ids,
            position_ids=received.position_ids,
            rope_delta=received.rope_delta,
            vision=vision,
            text="",
        )
        self._remember(request, received, vision, np.flatnonzero(visual))
        names = ("preprocess", "encode", "transfer")
        return PreparedPrompt(
            prompt=prompt, tokens=tokens, seconds={name: received.seconds.get(name, 0.0) for name in names}
        )

    def _vision(self, received: ReceivedPrompt) -> VisionBatch:
        facts = self._parts.engine.bundle.manifest.vision
        assert facts is not None
        grid = np.array([item.grid for item in received.items], np.int64)
        return VisionBatch.without_pixels(grid, [item.key for item in received.items], facts.spatial_merge_size)

    def _remember(
        self, request: Request, received: ReceivedPrompt, vision: VisionBatch, places: np.ndarray[Any, Any]
    ) -> None:
        if request.videos and not self._config.local_encoder:
            return  # what a clip shows is found out only by preparing it, which happens in the encode process
        ends = np.cumsum(vision.tokens_per_item).tolist()
        for item, end, count in zip(received.items, ends, vision.tokens_per_item.tolist(), strict=True):
            rows = slice(end - count, end)
            deepstack = received.deepstack[rows] if len(received.deepstack) else np.zeros((count, 0), np.float32)
            self._parts.encoder.put(item.key, VisionFeatures(received.embeds[places[rows]], deepstack.copy()))
        if request.videos:
            return
        for image, item in zip(request.images, received.items, strict=True):
            self._known[hashlib.sha256(image).digest()] = KnownImage(item.grid, item.key)
            while len(self._known) > _KNOWN_PICTURES:
                self._known.popitem(last=False)


def _encode_request(request: Request) -> EncodeRequest:
    """What an encode process is asked, as the first attempt of a new room.

    Raises:
        RequestTooLarge: no encode process would read it; one that has to hang up fails the requests of others too.
    """
    text = json.dumps(request.messages, ensure_ascii=False).encode("utf-8", "surrogatepass")
    size = len(text) + sum(map(len, (*request.images, *request.videos)))
    for what, count, limit in (
        ("bytes of text", len(text), _MAX_TEXT),
        ("bytes of text, pictures and clips", size, _MAX_BYTES),
        ("pictures", len(request.images), _MAX_IMAGES),
        ("clips", len(request.videos), _MAX_CLIPS),
    ):
        if count > limit:
            raise RequestTooLarge(f"{count} {what} in one request; an encode process takes {limit}")
    images, videos = tuple(request.images), tuple(request.videos)
    return EncodeRequest(seq=0, room=uuid.uuid4().hex, attempt=0, messages=text, images=images, videos=videos)
