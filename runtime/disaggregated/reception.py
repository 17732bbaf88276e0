"""From a client's pictures to decoder inputs: what is known, what an encode process sends, what is done here."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import structs

from deepstitch.runtime.calls import Ints, RowTokens
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
from deepstitch.runtime.disaggregated.media import glimpse
from deepstitch.runtime.disaggregated.messages import EncodeRequest
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.pool import BlockPool
from deepstitch.runtime.disaggregated.service import ComputeThread, end_tasks
from deepstitch.runtime.disaggregated.trace import ENCODE, Span, Trace
from deepstitch.runtime.embedding import merge
from deepstitch.runtime.encoder_cache import VisionFeatures
from deepstitch.runtime.parts import ModelParts
from deepstitch.runtime.preprocess import KnownItem, Prompt, VisionBatch

__all__ = ["PreparedPrompt", "Reception", "Request"]

_MAX_FAILURES = 4  # a request that kills its encoder must not kill all of them
_KNOWN_FILES = 4096
_MOST_REMEMBERING = 64  # prompts at a time; each is held meanwhile, and nothing but time is lost by forgetting one
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
        follow_up: what is left to do, and need not be done before the first token.
    """

    prompt: Prompt
    tokens: RowTokens
    seconds: dict[str, float] = field(default_factory=dict)
    follow_up: Callable[[], None] = lambda: None


Bools = npt.NDArray[np.bool_]


class _Known(NamedTuple):
    """What came of a file of which this is the hash; None: it is being remembered."""

    digest: bytes
    item: KnownItem | None


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
        self._known: OrderedDict[int, _Known] = OrderedDict()
        self._remembering: set[asyncio.Task[None]] = set()
        self._closed = False

    async def close(self) -> None:
        """End the threads."""
        self._closed = True
        await end_tasks(self._remembering)
        await self._text.close()
        await self._pictures.close()

    async def prepare(self, request: Request, trace: Trace) -> PreparedPrompt:
        """Text, and pictures that are known, are prepared here; for others an encode process is asked.

        Raises:
            DeepstitchError: the request cannot be used, or no encode process can serve it.
        """
        if not request.images and not request.videos:
            return await self._here(request, trace, self._text)
        began, media = time.monotonic(), (*request.images, *request.videos)
        if all(glimpse(file) in self._known for file in media):
            recalled = await self._pictures.run(lambda: self._recall(request))
            if recalled is not None:
                self._metrics.count("cache_hits_total", len(media))
                trace.add("preprocess", began, time.monotonic())
                return recalled
        self._metrics.count("cache_misses_total", len(media))
        received = await self._from_encoders(request, trace)
        if received is None:
            self._metrics.count("local_encodes_total")
            return await self._here(request, trace, self._pictures)
        with trace.span("unpack"):
            return self._unpack(request, received)

    async def _here(self, request: Request, trace: Trace, thread: ComputeThread) -> PreparedPrompt:
        with trace.span("preprocess"):
            return await thread.run(lambda: self._prepared(request.messages, request.images, request.videos))

    def _prepared(self, messages: Any, images: Sequence[Any], videos: Sequence[Any]) -> PreparedPrompt:
        began = time.monotonic()
        prompt = self._parts.processor(messages, images=list(images), videos=list(videos))
        prepared = time.monotonic()
        (features,) = self._parts.encoder.features([prompt.vision])
        seconds = {"preprocess": prepared - began, "encode": time.monotonic() - prepared}
        return PreparedPrompt(prompt=prompt, tokens=self._merged(prompt, features), seconds=seconds)

    def _merged(self, prompt: Prompt, features: Sequence[VisionFeatures]) -> RowTokens:
        parts, model = self._parts, self._parts.engine.bundle.manifest.model
        width = model.num_deepstack * model.hidden_size
        return merge(parts.table, prompt, features, visual_ids=parts.visual_ids, deepstack_width=width)

    def _recall(self, request: Request) -> PreparedPrompt | None:
        """The prompt, if the encoder outputs of all its pictures and clips are here.

        Looking and taking are one piece of work of the thread: between two, another request could push them out.
        """
        images, videos = [[self._lookup(file) for file in files] for files in (request.images, request.videos)]
        return None if None in (*images, *videos) else self._prepared(request.messages, images, videos)

    def _lookup(self, file: bytes) -> KnownItem | None:
        """What is known of a file, if its encoder outputs are here."""
        known = self._known.get(glimpse(file))
        if known is None or known.item is None or known.digest != hashlib.sha256(file).digest():
            return None
        return known.item if self._parts.encoder.get(known.item.key) is not None else None

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
        self._report(link, received, trace)
        return received

    def _check(self, link: Link, received: ReceivedPrompt) -> None:
        """Ids, rows and pictures must agree: the decoder would take one picture's rows for another's."""
        manifest, ids = self._parts.engine.bundle.manifest, received.input_ids
        assert manifest.vision is not None
        merged = manifest.vision.spatial_merge_size**2
        tokens = sum(math.prod(item.grid) // merged for item in received.items)
        rows = tokens if manifest.model.num_deepstack else 0
        known = ids.min() >= 0 and ids.max() < manifest.model.vocab_size
        if not known or self._visual(ids).sum() != tokens or len(received.deepstack) != rows:
            raise ProtocolError(f"{link.caller.address}: sent a prompt that does not fit its own pictures")

    def _visual(self, ids: Ints) -> Bools:
        """Which tokens are visual; for two ids, quicker than ``numpy.isin``."""
        found = np.zeros(len(ids), np.bool_)
        for each in self._parts.visual_ids:
            found |= ids == each
        return found

    def _report(self, link: Link, received: ReceivedPrompt, trace: Trace) -> None:
        """Add what the encode process did, in the time of this one."""
        clock = link.caller.clock
        begin = clock.here(received.seconds.get("began", 0.0))
        detail = {"clock known to ms": round(1000 * clock.error, 3)} if clock.error else {}
        for stage in ("preprocess", "encode"):
            end = begin + received.seconds.get(stage, 0.0)
            trace.spans.append(Span(ENCODE, stage, begin, end, detail))
            begin = end

    def _unpack(self, request: Request, received: ReceivedPrompt) -> PreparedPrompt:
        """Decoder inputs, and encoder outputs to remember later."""
        visual = self._visual(received.input_ids)
        index = np.zeros(len(visual), np.int32)
        if len(received.deepstack):
            index = np.where(visual, np.cumsum(visual), 0).astype(np.int32)
        tokens = RowTokens(
            embeds=received.embeds,
            position_ids=received.position_ids,
            deepstack=received.deepstack,
            deepstack_index=index,
        )
        prompt = Prompt(
            input_ids=received.input_ids,
            position_ids=received.position_ids,
            rope_delta=received.rope_delta,
            vision=self._vision(received),
            text="",
            timestamps=tuple(item.timestamps for item in received.items),
        )
        seconds = {name: received.seconds.get(name, 0.0) for name in ("preprocess", "encode", "transfer")}
        follow_up = partial(self._follow_up, request, received, prompt, visual)
        return PreparedPrompt(prompt=prompt, tokens=tokens, seconds=seconds, follow_up=follow_up)

    def _vision(self, received: ReceivedPrompt) -> VisionBatch:
        facts = self._parts.engine.bundle.manifest.vision
        assert facts is not None
        grid = np.array([item.grid for item in received.items], np.int64)
        return VisionBatch.without_pixels(grid, [item.key for item in received.items], facts.spatial_merge_size)

    def _follow_up(self, request: Request, received: ReceivedPrompt, prompt: Prompt, visual: Bools) -> None:
        """Count, and remember: copies and hashes are for a thread; who brings the same files next comes after it."""
        self._metrics.count("attempts_total", outcome="ok")
        self._metrics.count("transfers_total", kind="initial")
        self._metrics.count("transfers_total", received.resumes, kind="resumed")
        self._metrics.observe("stage_seconds", received.seconds["transfer"], stage="transfer")
        full = len(self._remembering) >= _MOST_REMEMBERING
        if full or self._closed or not self._config.encoder_cache_bytes:
            return
        for file in (*request.images, *request.videos):
            self._known.setdefault(glimpse(file), _Known(b"", None))
        task = asyncio.get_running_loop().create_task(self._later(request, received, prompt, visual))
        self._remembering.add(task)
        task.add_done_callback(self._remembering.discard)

    async def _later(self, request: Request, received: ReceivedPrompt, prompt: Prompt, visual: Bools) -> None:
        try:
            await self._pictures.run(lambda: self._remember(request, received, prompt, np.flatnonzero(visual)))
        except Exception:  # the answer does not need it
            logging.getLogger(__name__).exception("encoder outputs could not be remembered")

    def _remember(self, request: Request, received: ReceivedPrompt, prompt: Prompt, places: Ints) -> None:
        """Keep the encoder outputs, and which files they are of."""
        assert prompt.vision is not None
        counts = prompt.vision.tokens_per_item.tolist()
        images, videos = iter(request.images), iter(request.videos)
        end = 0
        for item, count in zip(received.items, counts, strict=True):
            rows = slice(end, end := end + count)
            deepstack = received.deepstack[rows] if len(received.deepstack) else np.zeros((count, 0), np.float32)
            self._parts.encoder.put(item.key, VisionFeatures(received.embeds[places[rows]], deepstack.copy()))
            file = next(videos if item.timestamps else images)
            known = KnownItem(item.grid, item.key, item.timestamps)
            self._known[glimpse(file)] = _Known(hashlib.sha256(file).digest(), known)
            while len(self._known) > _KNOWN_FILES:
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
