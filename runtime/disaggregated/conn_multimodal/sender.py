"""Encode side: one attempt of one request, from its acceptance until its blocks are free again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deepstitch.errors import DeepstitchError
from deepstitch.runtime.calls import RowTokens
from deepstitch.runtime.disaggregated.buffers import BUFFERS, TOKEN_BUFFERS, Stamp
from deepstitch.runtime.disaggregated.errors import (
    DisaggregationError,
    EncodeFailed,
    ProtocolError,
    RequestRefused,
    StaleTransfer,
)
from deepstitch.runtime.disaggregated.faults import Faults
from deepstitch.runtime.disaggregated.messages import (
    Announcement,
    EncodeRequest,
    Item,
    Message,
    Pending,
    Received,
    Release,
    Released,
    RoomMessage,
    TransferInit,
    TransferReady,
    TransferResume,
)
from deepstitch.runtime.disaggregated.pool import BlockPool, Grant
from deepstitch.runtime.disaggregated.states import SENDER, Machine, SenderEvent, SenderState
from deepstitch.runtime.engine.memory import to_host
from deepstitch.runtime.preprocess import Prompt

__all__ = ["EncodedPrompt", "PreparedSizes", "Sender", "SenderTools", "request_bytes"]

_PATIENCE = 1.0  # seconds a reply may be held back, in the hope that it can be more than Pending
_AT_ONCE = 1 << 20  # bytes that are written sooner than a thread is woken to do it


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSizes:
    """What is known of a request before its pictures are encoded.

    Attributes:
        prompt: ids and positions.
        deepstack_rows: there will be.
        seconds: of preparing it, and when that ``began``.
    """

    prompt: Prompt
    deepstack_rows: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """What a request became.

    Attributes:
        prompt: ids and positions.
        tokens: embeddings, made on demand, and DeepStack rows.
        nbytes: of the encoder's output.
        seconds: of encoding it.
    """

    prompt: Prompt
    tokens: RowTokens
    nbytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderTools:
    """What all rooms of an encode process share.

    Attributes:
        encode: prepares a request, says so in this event loop, and encodes it.
        pool: blocks to send from.
        epoch: of the process.
        checksums: whether to sum what is sent.
        faults: for tests.
        finished: told the outcome of every room; what it sent, in bytes by ``initial`` or ``resumed``; and seconds per
            stage, which nobody has to wait for before.
    """

    encode: Callable[[EncodeRequest, Callable[[PreparedSizes], None]], Awaitable[EncodedPrompt]]
    pool: BlockPool
    epoch: str
    checksums: bool
    faults: Faults
    finished: Callable[[str, dict[str, int], dict[str, float]], None]


def request_bytes(request: EncodeRequest) -> int:
    """What a request brings along."""
    return len(request.messages) + sum(map(len, request.images)) + sum(map(len, request.videos))


class Sender:
    """A room.

    Attributes:
        machine: its state.
        touched: when the language side last spoke of it, in seconds of the monotonic clock.
    """

    def __init__(self, tools: SenderTools, request: EncodeRequest, owner: str) -> None:
        """Accept ``request`` and begin to encode it; ``owner`` is the name its blocks are held under."""
        self.machine = Machine(SENDER, SenderState.BOOTSTRAPPING)
        self.touched = time.monotonic()
        self._tools = tools
        self._owner = owner
        self._room, self._attempt = request.room, request.attempt
        self._asked = request_bytes(request)
        self._encoded: EncodedPrompt | None = None
        self._announcement: Announcement | None = None
        self._failure: DisaggregationError = StaleTransfer("the room was released")
        self._ready: TransferReady | None = None
        self._start = self._received = 0
        self._filling = False
        self._sent = {"initial": 0, "resumed": 0}
        self._seconds: dict[str, float] = {}
        self._news = asyncio.get_running_loop().create_future()
        tools.faults.reached("encode.accepted")
        self._task = asyncio.create_task(self._encode(request))

    @property
    def nbytes(self) -> int:
        """Held outside the pool: the request until it is encoded, then what became of it."""
        if self.machine.state is SenderState.BOOTSTRAPPING:
            return self._asked
        return self._encoded.nbytes if self._encoded else 0

    async def handle(self, message: RoomMessage) -> Message:
        """The reply to a message about this room, the same again for the same message again.

        Raises:
            DisaggregationError: the room failed, or the message does not fit its state.
        """
        self.touched = time.monotonic()
        if isinstance(message, EncodeRequest):
            return await self._announce(message)
        if isinstance(message, TransferInit):
            return await self._transfer(message, 0, message.tokens)
        if isinstance(message, TransferResume):
            return await self._transfer(message, message.sent_tokens, message.tokens)
        if isinstance(message, Received):
            return self._confirm(message)
        if isinstance(message, Release):
            return self._release(message)
        raise ProtocolError(f"{type(message).__name__} is not for the encode side")

    def end(self, event: SenderEvent, reason: DisaggregationError) -> None:
        """Give up: the peer is gone, or has not spoken of the room for too long."""
        if not self.machine.terminal:
            self._failure = reason
            self._finish(event)

    async def _announce(self, message: EncodeRequest) -> Message:
        await self._settle(lambda: self._announcement is not None, self.touched + _PATIENCE)
        if self._announcement is None:
            return Pending(seq=message.seq, room=self._room, attempt=self._attempt)
        self._tools.faults.reached("encode.announced")
        return self._announcement

    async def _transfer(self, message: RoomMessage, start: int, tokens: int) -> Message:
        """Stage what is asked for; an initial transfer may be asked for as soon as the sizes are announced."""
        deadline = self.touched + _PATIENCE
        pending = Pending(seq=message.seq, room=self._room, attempt=self._attempt)
        if self._announcement is not None and start == 0:
            await self._settle(lambda: self.machine.state is not SenderState.BOOTSTRAPPING, deadline)
            if self.machine.state is SenderState.BOOTSTRAPPING:
                return pending
        state = self.machine.state
        if self.machine.terminal:
            raise self._failure
        if start < self._received or (start > 0) != isinstance(message, TransferResume):
            raise StaleTransfer(f"tokens from {start} on were received before; {self._received} are confirmed")
        if state is SenderState.WAITING_FOR_INPUT and start == self._received:
            self.machine.on(SenderEvent.INIT)
            self._start, self._ready = start, None
            self._task = asyncio.create_task(self._stage(start, tokens))
        elif state not in (SenderState.STAGING, SenderState.TRANSFERRING) or start != self._start:
            raise ProtocolError(f"a transfer from token {start} on was asked for in state {state.value!r}")
        await self._settle(lambda: self.machine.state is not SenderState.STAGING, deadline)
        if self._ready is None:
            return pending
        self._tools.faults.reached("encode.ready")
        return self._ready

    def _confirm(self, message: Received) -> Message:
        if self.machine.terminal:
            raise self._failure
        if message.tokens > self._received:
            ready = self._ready
            if ready is None or message.tokens != ready.start + ready.count:
                raise ProtocolError(f"{message.tokens} tokens confirmed that were not announced as ready")
            self.machine.on(SenderEvent.RECEIVED)
            self._received, self._ready = message.tokens, None
            self._tools.pool.release(self._owner)
            self._tools.faults.reached("encode.received")
        return Released(seq=message.seq, room=self._room, attempt=self._attempt)

    def _release(self, message: Release) -> Message:
        if not self.machine.terminal:
            done = not message.abandoned and self.machine.can(SenderEvent.RELEASE)
            self._finish(SenderEvent.RELEASE if done else SenderEvent.ABANDON)
            self._tools.faults.reached("encode.released")
        return Released(seq=message.seq, room=self._room, attempt=self._attempt)

    async def _settle(self, settled: Callable[[], bool], deadline: float) -> None:
        """Wait until ``settled``, or until ``deadline``, in seconds of the monotonic clock.

        Raises:
            DisaggregationError: the room failed.
        """
        while not settled() and not self.machine.terminal and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait({self._news}, timeout=left)
        if self.machine.terminal:
            raise self._failure

    async def _encode(self, request: EncodeRequest) -> None:
        try:
            encoded = await self._tools.encode(request, self._prepared)
            self._tools.faults.reached("encode.encoded")
        except DisaggregationError as error:
            self._refuse(error)
        except DeepstitchError as error:
            self._refuse(RequestRefused(str(error)))
        except Exception as error:  # a bug must not leave the other side waiting
            self._refuse(EncodeFailed(f"the encoder failed: {type(error).__name__}: {error}"))
        else:
            if not self.machine.terminal:
                self._encoded = encoded
                self._move(SenderEvent.ENCODED)

    def _prepared(self, sizes: PreparedSizes) -> None:
        """Announce them: the transfer can be asked for while the encoder works."""
        if self.machine.state is not SenderState.BOOTSTRAPPING:
            return
        self._seconds |= sizes.seconds
        prompt, vision = sizes.prompt, sizes.prompt.vision
        grids: Any = vision.grid_thw.tolist() if vision else []
        keys = vision.content_keys if vision else ()
        facts = zip(keys, grids, prompt.timestamps, strict=True)
        self._announcement = Announcement(
            seq=0,
            room=self._room,
            attempt=self._attempt,
            total_tokens=len(prompt.input_ids),
            deepstack_rows=sizes.deepstack_rows,
            rope_delta=prompt.rope_delta,
            items=tuple(Item(key=key, grid=tuple(grid), timestamps=steps) for key, grid, steps in facts),
            seconds=sizes.seconds,
        )
        self._tell()

    async def _stage(self, start: int, tokens: int) -> None:
        """Wait for blocks, fill them, and say that they are ready."""
        assert self._encoded is not None
        asked, pool, encoded = time.monotonic(), self._tools.pool, self._encoded
        capacity = pool.tokens.total * pool.layout.block_tokens
        count = min(tokens, len(encoded.prompt.input_ids) - start, capacity)
        rows = len(encoded.tokens.deepstack) if start == 0 else 0
        try:
            pool.check_fits(count, rows, side="encode")
            grant = await pool.acquire(self._owner, count, rows)
            self._filling = True
            self._tools.faults.reached("encode.staging")
            ready = await self._filled(encoded, grant, start, count)
        except DisaggregationError as error:
            self._refuse(error)
        except Exception as error:
            self._refuse(EncodeFailed(f"staging failed: {type(error).__name__}: {error}"))
        else:
            if self.machine.state is SenderState.STAGING:
                seconds = {} if start else {**encoded.seconds, "staging": time.monotonic() - asked}
                self._seconds |= seconds
                self._ready = msgspec.structs.replace(ready, seconds=seconds)
                self._sent["resumed" if start else "initial"] += self._nbytes(count, rows)
                self._tools.faults.reached("encode.staged")
                self._move(SenderEvent.STAGED)
        finally:
            self._filling = False
            if self.machine.state is not SenderState.TRANSFERRING:
                pool.release(self._owner)  # ended meanwhile; not before the last write

    async def _filled(self, encoded: EncodedPrompt, grant: Grant, start: int, count: int) -> TransferReady:
        """Blocks with rows in them; many rows are for a worker thread."""
        rows = 0 if start else len(encoded.tokens.deepstack)
        if self._nbytes(count, rows) <= _AT_ONCE:
            return self._fill(encoded, grant, start, count)
        return await asyncio.get_running_loop().run_in_executor(None, self._fill, encoded, grant, start, count)

    def _fill(self, encoded: EncodedPrompt, grant: Grant, start: int, count: int) -> TransferReady:
        """Write rows into blocks."""
        buffers, prompt = self._tools.pool.buffers, encoded.prompt
        span = slice(start, start + count)
        embeds = to_host(encoded.tokens.embeds[span])
        buffers.write_tokens(grant.tokens, embeds, prompt.input_ids[span], prompt.position_ids[:, span])
        stamp = Stamp(
            total_tokens=len(prompt.input_ids),
            rope_delta=prompt.rope_delta,
            deepstack_rows=len(encoded.tokens.deepstack),
            start=start,
            tokens=count,
            attempt=self._attempt,
            room=self._room,
            epoch=self._tools.epoch,
        )
        buffers.aux_datas[grant.tokens[0], 0] = stamp.to_row()
        rows = 0
        if start == 0:
            rows = len(encoded.tokens.deepstack)
            buffers.write_deepstack(grant.deepstack, to_host(encoded.tokens.deepstack))
        checksums: tuple[int, ...] = ()
        if self._tools.checksums:
            summed = [buffers.checksum(name, grant.tokens, count) for name in TOKEN_BUFFERS]
            summed.append(buffers.checksum(BUFFERS[3], grant.tokens[:1], 1))
            checksums = (*summed, buffers.checksum(BUFFERS[4], grant.deepstack, rows))
        return TransferReady(
            seq=0,
            room=self._room,
            attempt=self._attempt,
            start=start,
            count=count,
            blocks=grant.tokens,
            deepstack_blocks=grant.deepstack,
            generations=self._tools.pool.generations_of(grant),
            checksums=checksums,
        )

    def _nbytes(self, tokens: int, deepstack_rows: int) -> int:
        """Of one transfer."""
        layout = self._tools.pool.layout
        row = sum(layout.row_bytes(name) for name in TOKEN_BUFFERS)
        return tokens * row + layout.row_bytes(BUFFERS[3]) + deepstack_rows * layout.row_bytes(BUFFERS[4])

    def _refuse(self, error: DisaggregationError) -> None:
        if not self.machine.terminal:
            self._failure = error
            bootstrapping = self.machine.state is SenderState.BOOTSTRAPPING
            self._finish(SenderEvent.ENCODE_FAILED if bootstrapping else SenderEvent.ABANDON)

    def _move(self, event: SenderEvent) -> None:
        self.machine.on(event)
        self._tell()

    def _tell(self) -> None:
        """Wake everybody who waits for this room."""
        self._news.set_result(None)
        self._news = asyncio.get_running_loop().create_future()

    def _finish(self, event: SenderEvent) -> None:
        """Reach an end: nothing stays but the tombstone."""
        self._move(event)
        self._encoded = self._announcement = self._ready = None
        if not self._filling:  # else the writer gives the blocks back
            if self._task is not asyncio.current_task():
                self._task.cancel()
            self._tools.pool.release(self._owner)
        self._tools.finished(self.machine.state.value, self._sent, self._seconds)
