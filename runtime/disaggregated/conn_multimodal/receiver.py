"""Language side: one attempt to get one prompt from one encode process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.calls import Floats, Ints
from deepstitch.runtime.disaggregated.buffers import BUFFERS, TOKEN_BUFFERS, BufferLayout, Stamp
from deepstitch.runtime.disaggregated.conn_multimodal.link import Link
from deepstitch.runtime.disaggregated.errors import (
    DisaggregationError,
    PeerHung,
    PeerLost,
    ProtocolError,
    RequestTooLarge,
    StaleTransfer,
    TransferCorrupt,
)
from deepstitch.runtime.disaggregated.faults import Faults
from deepstitch.runtime.disaggregated.messages import (
    Announcement,
    EncodeRequest,
    Item,
    Pending,
    Received,
    Release,
    RoomMessage,
    TransferInit,
    TransferReady,
    TransferResume,
)
from deepstitch.runtime.disaggregated.pool import BlockPool, Grant
from deepstitch.runtime.disaggregated.states import RECEIVER, Machine, ReceiverEvent, ReceiverState
from deepstitch.runtime.disaggregated.transport import Span

__all__ = ["ReceivedPrompt", "Receiver", "ReceiverTools"]

_SIGNS_PER_LEASE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedPrompt:
    """A prompt as the decoder takes it.

    Attributes:
        input_ids: ``(n,)`` int64.
        position_ids: ``(3, n)`` int64.
        embeds: ``(n, H)`` float32, visual rows in place.
        deepstack: ``(R, num_deepstack*H)`` float32, the rows of the visual tokens in order.
        rope_delta: position of the next token minus ``n``.
        items: pictures and clips.
        resumes: transfers after the initial one.
        seconds: of the encode side, per stage, and when it ``began`` by its clock; and ``transfer``: staging the first
            part, and all from when that was said to be ready until the last was read.
    """

    input_ids: Ints
    position_ids: Ints
    embeds: Floats
    deepstack: Floats
    rope_delta: int
    items: tuple[Item, ...]
    resumes: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverTools:
    """What all attempts of a language process share.

    Attributes:
        pool: landing blocks.
        first_tokens: most tokens of one transfer.
        hang: seconds without progress of a read until the encode process counts as hung.
        deadline: when nobody waits for the prompt any more, in seconds of the monotonic clock.
        faults: for tests.
        mark: told the name of a stage, when it began and when it ended, in seconds of the monotonic clock.
    """

    pool: BlockPool
    first_tokens: int
    hang: float
    deadline: float
    faults: Faults
    mark: Callable[[str, float, float], None]


class Receiver:
    """An attempt.

    Attributes:
        machine: its state.
    """

    def __init__(self, tools: ReceiverTools, link: Link, request: EncodeRequest) -> None:
        """``request`` names the room and the attempt."""
        self.machine = Machine(RECEIVER, ReceiverState.BOOTSTRAPPING)
        self._tools = tools
        self._link = link
        self._request = request
        self._names: dict[str, Any] = {"seq": 0, "room": request.room, "attempt": request.attempt}
        self._owner = f"{request.room}/{request.attempt}"

    async def run(self) -> ReceivedPrompt:
        """Request, receive and release.

        Raises:
            DisaggregationError: this attempt failed; all it held is free again.
        """
        alive = None
        try:
            announcement = await self._announced()
            alive = asyncio.create_task(self._keep_alive())
            return await self._receive(announcement)
        except BaseException as error:
            self._abandon(_reason(error))
            raise
        finally:
            if alive is not None:
                alive.cancel()

    async def _announced(self) -> Announcement:
        began = time.monotonic()
        poll = EncodeRequest(**self._names, poll=True)
        self._tools.faults.reached("language.requested")
        announcement = await self._ask(self._request, poll, Announcement)
        items = announcement.items
        steps = [len(item.timestamps) for item in items]
        clips = sum(map(bool, steps))
        asked = (len(self._request.images), len(self._request.videos))
        whole = all(count in (0, item.grid[0]) for count, item in zip(steps, items, strict=True))
        if (len(items) - clips, clips) != asked or not whole or announcement.deepstack_rows > announcement.total_tokens:
            raise ProtocolError(f"{self._link.caller.address}: announced something else than was asked for")
        self._move(ReceiverEvent.ANNOUNCED, "language.announced")
        self._tools.mark("wait for sizes", began, time.monotonic())
        return announcement

    async def _keep_alive(self) -> None:
        """Speak of the room while it waits for blocks or for a long read."""
        with contextlib.suppress(DisaggregationError):  # whoever works on the room notices too
            while True:
                await asyncio.sleep(self._link.lease / _SIGNS_PER_LEASE)
                await self._link.caller.call(EncodeRequest(**self._names, poll=True))

    async def _receive(self, sizes: Announcement) -> ReceivedPrompt:
        layout, pool = self._tools.pool.layout, self._tools.pool
        total = sizes.total_tokens
        pool.check_fits(min(total, self._tools.first_tokens), sizes.deepstack_rows, side="language")
        try:
            arrived = {name: np.empty((total, layout.width(name)), layout.dtype(name)) for name in TOKEN_BUFFERS}
            arrived[BUFFERS[4]] = np.empty((sizes.deepstack_rows, layout.width(BUFFERS[4])), np.float32)
        except (MemoryError, ValueError):
            raise RequestTooLarge(f"there is no memory for a prompt of {total} tokens") from None
        received = resumes = 0
        seconds, began = dict(sizes.seconds), 0.0
        while received < total:
            ready = await self._ready(sizes, received)
            if received == 0:
                began = time.monotonic()
                seconds |= ready.seconds
            grant = await self._allocate(ready, sizes)
            try:
                await self._read(sizes, ready, grant, arrived)
            finally:
                pool.release(self._owner)
            received += ready.count
            if received < total:
                resumes += 1
                self._move(ReceiverEvent.READ_PART, "language.read")
                self._tools.faults.reached("language.received_sent")
                await self._link.caller.call(Received(**self._names, tokens=received))
                self._move(ReceiverEvent.CONFIRMED)
        self._move(ReceiverEvent.READ_ALL, "language.read")
        seconds["transfer"] = seconds.get("staging", 0.0) + time.monotonic() - began
        prompt = _prompt(sizes, arrived, resumes, seconds)
        self._link.attend(self._release)
        return prompt

    async def _allocate(self, ready: TransferReady, sizes: Announcement) -> Grant:
        """Landing blocks, unless the encode process goes while there are none."""
        began, lost = time.monotonic(), self._link.caller.lost
        rows = sizes.deepstack_rows if ready.start == 0 else 0
        waiting = asyncio.ensure_future(self._tools.pool.acquire(self._owner, ready.count, rows))
        try:
            either: set[asyncio.Future[Any]] = {waiting, lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise lost.result()
        except BaseException:
            waiting.cancel()
            waiting.add_done_callback(lambda _: self._tools.pool.release(self._owner))  # granted just before
            raise
        self._move(ReceiverEvent.ALLOCATED, "language.allocated")
        self._tools.mark("wait for landing blocks", began, time.monotonic())
        return waiting.result()

    async def _ready(self, sizes: Announcement, received: int) -> TransferReady:
        """Ask for rows and check that the answer makes sense.

        No landing blocks are held meanwhile: the rows may still be being encoded.
        """
        began = time.monotonic()
        tokens = min(sizes.total_tokens - received, self._tools.first_tokens)
        message: TransferInit | TransferResume
        if received == 0:
            message = TransferInit(**self._names, tokens=tokens)
            self._tools.faults.reached("language.init_sent")
        else:
            message = TransferResume(**self._names, sent_tokens=received, tokens=tokens)
            self._tools.faults.reached("language.resume_sent")
        ready = await self._ask(message, message, TransferReady)
        remote = self._link.layout
        rows = sizes.deepstack_rows if received == 0 else 0
        fits = (
            ready.start == received
            and ready.count <= tokens
            and len(ready.blocks) == remote.blocks_for(ready.count)
            and len(ready.deepstack_blocks) == remote.blocks_for(rows)
            and max(ready.blocks) < remote.num_blocks
            and max(ready.deepstack_blocks, default=-1) < remote.num_deepstack_blocks
            and len(ready.generations) == len(ready.blocks) + len(ready.deepstack_blocks)
            and len(ready.checksums) in (0, len(BUFFERS))
        )
        if not fits:
            raise ProtocolError(f"{self._link.caller.address}: a transfer that does not fit what was asked for")
        self._move(ReceiverEvent.READY)
        self._tools.mark("wait for rows", began, time.monotonic())
        return ready

    async def _read(
        self, sizes: Announcement, ready: TransferReady, grant: Grant, arrived: dict[str, npt.NDArray[Any]]
    ) -> None:
        """Fill the landing blocks, make sure that they hold what was promised, and copy that out.

        They are not given back before the read has come to an end, whatever happens to this attempt meanwhile.
        """
        self._tools.faults.reached("language.reading")
        began = time.monotonic()
        rows = sizes.deepstack_rows if ready.start == 0 else 0
        spans = list(self._spans(ready, grant, rows))
        wanted = asyncio.get_running_loop().create_future()
        # one that began late may still end; one that never ends must not keep the blocks
        limit = max(self._tools.deadline - began, self._tools.hang)
        accept = partial(self._accept, sizes, ready, grant, rows, arrived)
        read = self._link.read(spans, accept=accept, timeout=self._tools.hang, limit=limit, wanted=wanted)
        reading = None if self._link.reads_at_once(spans) else asyncio.ensure_future(read)
        try:
            await (asyncio.shield(reading) if reading else read)  # the latter is not interrupted once it has begun
        except BaseException:
            self.machine.on(ReceiverEvent.READ_FAILED)
            wanted.cancel()  # where others are read first, it does not begin
            if reading:
                await _ended(reading)
            self.machine.on(ReceiverEvent.TRANSPORT_CLOSED)
            raise
        self._tools.mark("read", began, time.monotonic())

    def _spans(self, ready: TransferReady, grant: Grant, deepstack_rows: int) -> Iterator[Span]:
        """Which bytes of the encode side go where, buffer by buffer; the two sides may cut blocks differently."""
        far, near = self._link.layout, self._tools.pool.layout
        memory = self._tools.pool.buffers.memory
        plans = [(name, ready.blocks, grant.tokens, ready.count) for name in TOKEN_BUFFERS]
        plans.append((BUFFERS[3], ready.blocks[:1], grant.tokens[:1], 1))
        plans.append((BUFFERS[4], ready.deepstack_blocks, grant.deepstack, deepstack_rows))
        for name, source, target, rows in plans:
            yield from _joined(far, near, name, source, target, rows, memory)

    def _accept(
        self,
        sizes: Announcement,
        ready: TransferReady,
        grant: Grant,
        rows: int,
        arrived: dict[str, npt.NDArray[Any]],
        generations: npt.NDArray[np.uint64],
    ) -> None:
        """Copy out; refuse blocks that changed hands, belong to another transfer, or were damaged on the way."""
        link, buffers = self._link, self._tools.pool.buffers
        where = [*ready.blocks, *(link.layout.num_blocks + block for block in ready.deepstack_blocks)]
        if tuple(generations[where].tolist()) != ready.generations:
            raise StaleTransfer(f"{link.caller.address}: the blocks were given to another request meanwhile")
        stamp = Stamp(
            total_tokens=sizes.total_tokens,
            rope_delta=sizes.rope_delta,
            deepstack_rows=sizes.deepstack_rows,
            start=ready.start,
            tokens=ready.count,
            attempt=self._request.attempt,
            room=self._request.room,
            epoch=link.epoch,
        )
        if not np.array_equal(buffers.aux_datas[grant.tokens[0], 0], stamp.to_row()):
            raise StaleTransfer(f"{link.caller.address}: the blocks carry the stamp of another transfer")
        places = [(name, grant.tokens, ready.count) for name in TOKEN_BUFFERS]
        places += [(BUFFERS[3], grant.tokens[:1], 1), (BUFFERS[4], grant.deepstack, rows)]
        for (name, blocks, count), expected in zip(places, ready.checksums, strict=bool(ready.checksums)):
            if buffers.checksum(name, blocks, count) != expected:
                raise TransferCorrupt(f"{link.caller.address}: {name} arrived damaged (wrong checksum)")
        span = slice(ready.start, ready.start + ready.count)
        for name in TOKEN_BUFFERS:
            buffers.copy_rows(name, grant.tokens, arrived[name][span])
        if ready.start == 0:
            buffers.copy_rows(BUFFERS[4], grant.deepstack, arrived[BUFFERS[4]])

    async def _release(self) -> None:
        """Tell the encode side, while the prompt is on its way to the decoder: nothing depends on the answer."""
        self._tools.faults.reached("language.release_sent")
        event = ReceiverEvent.GAVE_UP
        try:
            await self._link.caller.call(Release(**self._names))
            event = ReceiverEvent.RELEASED
        except DisaggregationError:
            event = ReceiverEvent.PEER_LOST
        finally:
            self._move(event)

    def _abandon(self, event: ReceiverEvent) -> None:
        """Reach the end of a failed attempt; the encode side hears of it if it still listens."""
        if not self.machine.terminal:
            self.machine.on(event if self.machine.can(event) else ReceiverEvent.GAVE_UP)
        self._link.dismiss(Release(**self._names, abandoned=True))

    async def _ask(self, first: RoomMessage, again: RoomMessage, kind: type[Any]) -> Any:
        """Send ``first``, then ``again`` as long as the answer is Pending."""
        reply = await self._link.caller.call(first)
        while isinstance(reply, Pending):
            reply = await self._link.caller.call(again)
        if not isinstance(reply, kind):
            raise ProtocolError(f"{self._link.caller.address}: {type(reply).__name__} instead of {kind.__name__}")
        if (reply.room, reply.attempt) != (first.room, first.attempt):
            raise ProtocolError(f"{self._link.caller.address}: the answer is about another request")
        return reply

    def _move(self, event: ReceiverEvent, step: str = "") -> None:
        self.machine.on(event)
        if step:
            self._tools.faults.reached(step)


def _reason(error: BaseException) -> ReceiverEvent:
    """What an error is to the state machine."""
    if isinstance(error, (PeerLost, PeerHung)):
        return ReceiverEvent.PEER_LOST
    return ReceiverEvent.REFUSED if isinstance(error, DisaggregationError) else ReceiverEvent.GAVE_UP


async def _ended(reading: asyncio.Future[Any]) -> None:
    """Wait for a read to end, however often this is cancelled; its own deadline ends it."""
    while not reading.done():
        try:
            await asyncio.wait({reading})
        except asyncio.CancelledError:
            continue
    if not reading.cancelled():
        reading.exception()  # retrieved; the caller reports the first error


def _joined(
    far: BufferLayout,
    near: BufferLayout,
    buffer: str,
    source: tuple[int, ...],
    target: tuple[int, ...],
    rows: int,
    memory: npt.NDArray[np.uint8],
) -> Iterator[Span]:
    """Spans that are unbroken on both sides."""
    targets = near.pieces(buffer, target, rows)
    place = room = 0
    for at, size in far.pieces(buffer, source, rows):
        while size:
            if not room:
                place, room = next(targets)
            step = min(size, room)
            yield Span(at, memory[place : place + step])
            at, size, place, room = at + step, size - step, place + step, room - step


def _prompt(
    sizes: Announcement, arrived: dict[str, npt.NDArray[Any]], resumes: int, seconds: dict[str, float]
) -> ReceivedPrompt:
    return ReceivedPrompt(
        input_ids=arrived["fill_ids"][:, 0].astype(np.int64),
        position_ids=np.ascontiguousarray(arrived["mrope_positions"].T.astype(np.int64)),
        embeds=arrived["input_embeddings"],
        deepstack=arrived["deepstack_embeddings"],
        rope_delta=sizes.rope_delta,
        items=sizes.items,
        resumes=resumes,
        seconds=seconds,
    )
