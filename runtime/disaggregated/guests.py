"""Encode side: the control connections of language processes, and who has been silent for too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import socket
import ssl
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from deepstitch.runtime.disaggregated.channel import send, welcome
from deepstitch.runtime.disaggregated.config import EncodeConfig
from deepstitch.runtime.disaggregated.errors import DisaggregationError, EncodeFailed, PeerLost, ProtocolError
from deepstitch.runtime.disaggregated.framing import REQUEST_LIMIT, read_frame
from deepstitch.runtime.disaggregated.messages import (
    Failure,
    Hello,
    Message,
    ModelIdentity,
    Ping,
    Pong,
    RoomMessage,
    Welcome,
    decode,
    seq_of,
)
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.transport.sockets import keep_alive

__all__ = ["Guest", "Host", "listen"]

_GRACE = 0.1  # seconds to look at what has come in before a peer counts as silent
_ANSWERS_PER_ROOM = 4  # being made for one peer; more messages stay unread until some are sent

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Host(Protocol):
    """What a connection needs of its server."""

    config: EncodeConfig
    metrics: Metrics

    @property
    def waiting(self) -> int:
        """Requests ahead of a new one."""

    def welcome(self, hello: Hello, proof: str, identity: ModelIdentity, ticket: str) -> Welcome:
        """Let somebody in who has proved to have the token."""

    def open_room(self, peer: str, message: RoomMessage) -> RoomMessage:
        """Begin what a request asks for; the message without its pictures, which the room has now."""

    async def reply_to(self, peer: str, message: RoomMessage) -> Any:
        """What is answered; it may take its time."""


class _Listener(asyncio.StreamReader):
    """Knows when it last heard something.

    Attributes:
        heard: seconds of the monotonic clock.
    """

    heard = 0.0

    def feed_data(self, data: Any) -> None:
        self.heard = time.monotonic()
        super().feed_data(data)


async def listen(
    serve: Serve, listening: socket.socket, *, tls: ssl.SSLContext | None, handshake: float
) -> asyncio.AbstractServer:
    """Serve the connections of a socket; ``handshake`` is how many seconds TLS may take for one."""
    loop = asyncio.get_running_loop()

    def protocol() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(_Listener(loop=loop), serve, loop=loop)

    if listening.family == socket.AF_UNIX:
        # the file is removed by who made it, and only if it is still the same
        options: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        return await loop.create_unix_server(protocol, sock=listening, **options)
    timeout = None if tls is None else handshake
    return await loop.create_server(protocol, sock=listening, ssl=tls, ssl_handshake_timeout=timeout)


class Guest:
    """One language process, from its connection to its end.

    Attributes:
        name: of the connection; rooms are held under it.
        ticket: shown where the pool is read.
    """

    def __init__(self, host: Host, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name, self.ticket = uuid.uuid4().hex, secrets.token_hex(16)
        self._host = host
        self._reader, self._writer = reader, writer
        self._answers: set[asyncio.Task[None]] = set()
        self._began = math.inf  # to read

    async def serve(self, *, epoch: str, identity: ModelIdentity) -> None:
        """Welcome it, then answer until the connection ends.

        Raises:
            DisaggregationError: it was refused, breaks the protocol, is silent, or has gone.
            asyncio.TimeoutError: it did not prove itself in time.
        """
        host, connection = self._host, self._writer.get_extra_info("socket")
        if connection.family != socket.AF_UNIX:
            keep_alive(connection)
        handshake = welcome(
            self._reader,
            self._writer,
            token=host.config.token,
            epoch=epoch,
            identity=identity,
            answer=lambda hello, proof, own: host.welcome(hello, proof, own, self.ticket),
        )
        await asyncio.wait_for(handshake, timeout=host.config.deadlines.connect)
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                self._began = time.monotonic()
                frame = await read_frame(self._reader, REQUEST_LIMIT)
                self._began = math.inf
                self._take(frame)
                while len(self._answers) >= _ANSWERS_PER_ROOM * host.config.max_requests:
                    await asyncio.wait(self._answers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()

    def close(self) -> None:
        """Drop the answers under way and end the connection."""
        for answer in self._answers:
            answer.cancel()
        with contextlib.suppress(OSError):
            self._writer.close()

    async def _watch(self) -> None:
        """End a connection on which nothing at all has come for longer than pings take."""
        deadlines = self._host.config.deadlines
        silence = deadlines.ping + deadlines.hang
        while True:
            left = silence - self._silent
            await asyncio.sleep(min(max(left, _GRACE), silence))
            if left <= 0 and self._silent > silence:
                lost = PeerLost(f"the language process has said nothing for {silence:g} s")
                self._reader.set_exception(lost)
                return

    @property
    def _silent(self) -> float:
        """Seconds; time in which this side did not read does not count."""
        return time.monotonic() - max(self._began, getattr(self._reader, "heard", self._began))

    def _take(self, frame: bytes) -> None:
        """Answer at once what can be; the rest in a task, which does not hold the pictures."""
        self._host.metrics.count("messages_total", direction="in")
        try:
            message = decode(frame)
        except ProtocolError as error:
            seq = seq_of(frame)
            if seq is None:
                raise
            self._send(_failure(seq, error))
            return
        try:
            if isinstance(message, Ping):
                self._send(Pong(seq=message.seq, waiting=self._host.waiting, clock=time.monotonic()))
                return
            if not isinstance(message, RoomMessage):
                raise ProtocolError(f"{type(message).__name__} is not for the encode side")
            light = self._host.open_room(self.name, message)
        except DisaggregationError as error:
            self._send(_failure(message.seq, error))
            return
        answer = asyncio.create_task(self._answer(light))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    async def _answer(self, message: RoomMessage) -> None:
        try:
            reply = await self._host.reply_to(self.name, message)
        except DisaggregationError as error:
            reply = _failure(message.seq, error)
        except Exception as error:  # a bug must not look like a hang, which would cost every room its connection
            logging.getLogger(__name__).exception("a message could not be handled")
            reply = _failure(message.seq, EncodeFailed(f"{type(error).__name__}: {error}"))
        self._send(msgspec.structs.replace(reply, seq=message.seq))

    def _send(self, message: Message) -> None:
        self._host.metrics.count("messages_total", direction="out")
        send(self._writer, message)


def _failure(seq: int, error: DisaggregationError) -> Failure:
    return Failure(seq=seq, code=error.code, text=str(error)[:4096])
