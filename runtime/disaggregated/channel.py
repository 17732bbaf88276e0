"""Both ends of a control connection: handshake, then requests and replies."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import secrets
import ssl
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.clock import PeerClock
from deepstitch.runtime.disaggregated.config import Address, Deadlines
from deepstitch.runtime.disaggregated.errors import (
    DisaggregationError,
    HandshakeRefused,
    PeerHung,
    PeerLost,
    ProtocolError,
    error_from_code,
)
from deepstitch.runtime.disaggregated.framing import HANDSHAKE_LIMIT, REPLY_LIMIT, pack, read_frame
from deepstitch.runtime.disaggregated.identity import differences, proof
from deepstitch.runtime.disaggregated.messages import (
    PROTOCOL_VERSION,
    Challenge,
    Failure,
    Hello,
    Message,
    ModelIdentity,
    Ping,
    Pong,
    Welcome,
    decode,
    encode,
)
from deepstitch.runtime.disaggregated.service import end_tasks
from deepstitch.runtime.disaggregated.socket_path import short_path
from deepstitch.runtime.disaggregated.transport.sockets import keep_alive

__all__ = ["Caller", "connect", "receive", "send", "welcome"]

_GRACE = 0.1  # seconds to look at what has come in before a process counts as hung
_UNREAD_LIMIT = 64 << 20  # bytes of answers that a peer may leave lying


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Hand a message to the connection; a dead one, or one whose peer reads nothing, is noticed by its reader."""
    if writer.transport.get_write_buffer_size() > _UNREAD_LIMIT:
        writer.transport.abort()
    if not writer.is_closing():
        writer.write(pack(encode(message)))


async def receive(reader: asyncio.StreamReader, limit: int) -> Any:
    """The next message.

    Raises:
        PeerLost: the connection ended.
        ProtocolError: what came is no message.
    """
    return decode(await read_frame(reader, limit))


async def welcome(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    token: str,
    epoch: str,
    identity: ModelIdentity,
    answer: Callable[[Hello, str, ModelIdentity], Welcome],
) -> Hello:
    """Encode side of the handshake.

    Who has not proved to have the token is told the protocol's version, the epoch of this process, and why it is
    refused; nothing about the model or the pool.

    Args:
        reader: of a new connection.
        writer: of it.
        token: the shared secret.
        epoch: of this process.
        identity: of this side's bundle.
        answer: makes the Welcome from the Hello, our proof and our identity.

    Raises:
        DisaggregationError: refused; the peer was told why.
    """
    nonce = secrets.token_hex(16)
    send(writer, Challenge(seq=0, version=PROTOCOL_VERSION, epoch=epoch, nonce=nonce))
    hello = await receive(reader, HANDSHAKE_LIMIT)
    try:
        if not isinstance(hello, Hello):
            raise ProtocolError(f"{type(hello).__name__} instead of Hello")
        if hello.version != PROTOCOL_VERSION:
            raise _other_version(encode=PROTOCOL_VERSION, language=hello.version)
        if not hmac.compare_digest(hello.proof, proof(token, "language", nonce, hello.nonce)):
            raise HandshakeRefused("the token is missing or another one; give both sides the same --token-file")
        if different := differences(identity, hello.model):
            raise HandshakeRefused(f"the bundles of the two sides do not fit: {different}")
        send(writer, answer(hello, proof(token, "encode", hello.nonce, nonce), identity))
    except DisaggregationError as error:
        send(writer, Failure(seq=0, code=error.code, text=str(error)[:4096]))
        raise
    return hello


async def connect(
    address: Address,
    *,
    token: str,
    identity: ModelIdentity,
    transports: tuple[str, ...],
    deadlines: Deadlines,
    tls: ssl.SSLContext | None = None,
    count: Callable[[str], None] = lambda direction: None,
) -> tuple[Caller, Welcome]:
    """Language side of the handshake; ``count`` is told of every message after it, ``in`` or ``out``.

    Raises:
        PeerLost: nobody listens there, or the connection ended.
        PeerHung: no answer in time.
        HandshakeRefused: the two sides do not fit.
        InputError: no such address can be.
    """
    try:
        return await asyncio.wait_for(
            _connect(address, token, identity, transports, deadlines, tls, count), timeout=deadlines.connect
        )
    except asyncio.TimeoutError:
        raise PeerHung(f"{address}: no answer within {deadlines.connect:g} s") from None
    except (OSError, ssl.SSLError) as error:
        raise PeerLost(f"{address}: cannot connect ({error}); is the encode process running?") from None
    except ValueError as error:  # UnicodeError of a host name among them
        raise InputError(f"{address}: no address to connect to ({error})") from None


async def _connect(
    address: Address,
    token: str,
    identity: ModelIdentity,
    transports: tuple[str, ...],
    deadlines: Deadlines,
    tls: ssl.SSLContext | None,
    count: Callable[[str], None],
) -> tuple[Caller, Welcome]:
    if address.path:
        with short_path(address.path) as path:
            reader, writer = await asyncio.open_unix_connection(path)
    else:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=tls)
        keep_alive(writer.get_extra_info("socket"))
    try:
        challenge = await receive(reader, HANDSHAKE_LIMIT)
        if not isinstance(challenge, Challenge):
            raise ProtocolError(f"{address}: {type(challenge).__name__} instead of Challenge")
        if challenge.version != PROTOCOL_VERSION:  # it might not be able to read our Hello, and could not say so
            raise _other_version(encode=challenge.version, language=PROTOCOL_VERSION, where=f"{address}: ")
        nonce = secrets.token_hex(16)
        hello = Hello(
            seq=0,
            version=PROTOCOL_VERSION,
            epoch=uuid.uuid4().hex,
            nonce=nonce,
            proof=proof(token, "language", challenge.nonce, nonce),
            model=identity,
            transports=transports,
        )
        said = time.monotonic()
        send(writer, hello)
        reply = await receive(reader, HANDSHAKE_LIMIT)
        if isinstance(reply, Failure):
            raise error_from_code(reply.code, f"{address}: {reply.text}")
        expected = proof(token, "encode", nonce, challenge.nonce)
        if not isinstance(reply, Welcome) or not hmac.compare_digest(reply.proof, expected):
            raise HandshakeRefused(f"{address}: the process there does not have the token")
        if different := differences(reply.model, identity):
            raise HandshakeRefused(f"{address}: the bundles of the two sides do not fit: {different}")
        clock = PeerClock(shared=bool(address.path))
        clock.observe(said, reply.clock, time.monotonic())
    except BaseException:
        writer.close()
        raise
    return Caller(address, reader, writer, deadlines, clock=clock, count=count), reply


def _other_version(*, encode: int, language: int, where: str = "") -> HandshakeRefused:
    return HandshakeRefused(
        f"{where}protocol version {language} on the language side, {encode} on the encode side; install the same "
        "deepstitch on both"
    )


class Caller:
    """Language side of a connection: asks, and knows when nobody will answer any more.

    A request without an answer is sent again under the same number, so a lost message costs time only; the encode side
    answers a repeated request as it did before.

    Attributes:
        clock: of the other process.
        lost: done when the connection has ended, with the reason.
    """

    def __init__(
        self,
        address: Address,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        deadlines: Deadlines,
        *,
        clock: PeerClock,
        count: Callable[[str], None],
    ) -> None:
        self.address = address
        self.clock = clock
        self._count = count
        self._writer = writer
        self._deadlines = deadlines
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[DisaggregationError] = loop.create_future()
        self._tasks = [loop.create_task(self._listen(reader)), loop.create_task(self._ping())]

    async def call(self, message: Message) -> Any:
        """Send a request and return its reply.

        Raises:
            PeerLost: the connection ended.
            PeerHung: it stands, but nobody answers.
            DisaggregationError: the other side refused or failed.
        """
        if self.lost.done():
            raise self.lost.result()
        number = next(self._numbers)
        frame = pack(encode(msgspec.structs.replace(message, seq=number)))
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            reply = await self._exchange(frame, future)
        finally:
            del self._waiting[number]
            if future.done() and not future.cancelled():
                future.exception()  # seen, even where this call was cancelled in the moment of failing
        if isinstance(reply, Failure):
            raise error_from_code(reply.code, reply.text)
        return reply

    def fail(self, error: DisaggregationError) -> None:
        """End the connection; everything that waits on it gets ``error``."""
        if self.lost.done():
            return
        self.lost.set_result(error)
        self._writer.transport.abort()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    async def close(self) -> None:
        """End the connection and its tasks."""
        self.fail(PeerLost(f"{self.address}: closed"))
        await end_tasks(self._tasks)

    async def _exchange(self, frame: bytes, future: asyncio.Future[Any]) -> Any:
        """Send, wait, send again; a frame on its way out counts as a sign of life."""
        loop = asyncio.get_running_loop()
        self._write(frame)
        unsent, alive = len(frame), loop.time()
        while True:
            patience = alive + self._deadlines.hang - loop.time()
            done, _ = await asyncio.wait({future}, timeout=max(0.0, min(self._deadlines.reply, patience)))
            if done:
                return future.result()
            left = self._writer.transport.get_write_buffer_size()
            if 0 < left < unsent:
                alive = loop.time()
            unsent = left
            if loop.time() - alive >= self._deadlines.hang:
                if (await asyncio.wait({future}, timeout=_GRACE))[0]:  # it was this process that slept
                    return future.result()
                self.fail(PeerHung(f"{self.address}: no answer for {self._deadlines.hang:g} s"))
            elif not left:
                self._write(frame)

    def _write(self, frame: bytes) -> None:
        self._count("out")
        self._writer.write(frame)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                message = await receive(reader, REPLY_LIMIT)
                self._count("in")
                future = self._waiting.get(message.seq)
                if future is not None and not future.done():  # else an answer to a request that was repeated
                    future.set_result(message)
        except DisaggregationError as error:
            self.fail(type(error)(f"{self.address}: {error}"))

    async def _ping(self) -> None:
        with contextlib.suppress(DisaggregationError):
            while True:
                await asyncio.sleep(self._deadlines.ping)
                asked = time.monotonic()
                reply = await self.call(Ping(seq=0))
                if isinstance(reply, Pong):
                    self.clock.observe(asked, reply.clock, time.monotonic())
