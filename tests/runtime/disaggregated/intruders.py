"""Strangers who have found the address of an encode process, and what they could make it hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from deepstitch.runtime.disaggregated.channel import receive
from deepstitch.runtime.disaggregated.config import Address
from deepstitch.runtime.disaggregated.framing import HANDSHAKE_LIMIT, pack
from deepstitch.runtime.disaggregated.identity import proof
from deepstitch.runtime.disaggregated.messages import (
    PROTOCOL_VERSION,
    Challenge,
    EncodeRequest,
    Hello,
    ModelIdentity,
    encode,
)
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer

from .pair import TOKEN
from .processes import QUICK

QUICKER = replace(QUICK, connect=0.6)
CLOSED_SECONDS = QUICKER.connect + 3.0  # of a machine with more to do than cores
ROOM = "a" * 32
MAGIC = b"DSM1"


class Stranger:
    """Somebody who has found the address."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, identity: ModelIdentity) -> None:
        self.reader = reader
        self.writer = writer
        self.identity = identity

    async def challenge(self) -> Challenge:
        return await receive(self.reader, HANDSHAKE_LIMIT)

    def hello(self, challenge: Challenge, token: str, **changes: Any) -> Hello:
        nonce = "ab" * 16
        values = {"version": PROTOCOL_VERSION, "epoch": ROOM, "nonce": nonce, "model": self.identity}
        shown = proof(token, "language", challenge.nonce, nonce)
        return Hello(**{"seq": 0, **values, "proof": shown, "transports": ("shm", "tcp"), **changes})

    def send(self, message: Any) -> None:
        self.writer.write(pack(encode(message)))

    async def rest(self) -> bytes:
        """All that comes until the connection is closed."""
        with contextlib.suppress(ConnectionError):
            return await self.reader.read()
        return b""


async def stranger(address: Address, identity: ModelIdentity) -> Stranger:
    if address.path:
        return Stranger(*await asyncio.open_unix_connection(address.path), identity)
    return Stranger(*await asyncio.open_connection(address.host, address.port), identity)


async def nothing(who: Stranger) -> None:
    """Says nothing."""


async def garbage(who: Stranger) -> None:
    who.writer.write(os.urandom(1 << 16))


async def a_web_browser(who: Stranger) -> None:
    who.writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


async def four_gigabytes(who: Stranger) -> None:
    who.writer.write(struct.pack("<4sIQ", MAGIC, 0xFFFFFFFF, 0) + bytes(1 << 16))


async def half_a_frame(who: Stranger) -> None:
    frame = pack(encode(who.hello(await who.challenge(), TOKEN)))
    who.writer.write(frame[: len(frame) // 2])


async def byte_by_byte(who: Stranger) -> None:
    """Never silent, never done."""
    for byte in pack(encode(who.hello(await who.challenge(), TOKEN))):
        who.writer.write(bytes([byte]))
        await asyncio.sleep(0.02)
        if who.reader.at_eof() or who.writer.is_closing():  # a send that fails sets no end of file
            return


async def a_wrong_checksum(who: Stranger) -> None:
    frame = bytearray(pack(encode(who.hello(await who.challenge(), TOKEN))))
    frame[-1] ^= 1
    who.writer.write(bytes(frame))


async def no_token(who: Stranger) -> None:
    who.send(who.hello(await who.challenge(), ""))


async def a_wrong_token(who: Stranger) -> None:
    who.send(who.hello(await who.challenge(), TOKEN + " "))


async def no_proof(who: Stranger) -> None:
    who.send(who.hello(await who.challenge(), TOKEN, proof=""))


async def a_proof_of_the_other_side(who: Stranger) -> None:
    challenge = await who.challenge()
    who.send(who.hello(challenge, TOKEN, proof=proof(TOKEN, "encode", challenge.nonce, "ab" * 16)))


async def a_request_at_once(who: Stranger) -> None:
    who.send(EncodeRequest(seq=1, room=ROOM, attempt=0, messages=b"[]"))


async def its_own_challenge(who: Stranger) -> None:
    who.send(await who.challenge())


async def another_version(who: Stranger) -> None:
    who.send(who.hello(await who.challenge(), TOKEN, version=PROTOCOL_VERSION + 1))


async def another_model(who: Stranger) -> None:
    model = msgspec.structs.replace(who.identity, hidden_size=4096)
    who.send(who.hello(await who.challenge(), TOKEN, model=model))


async def no_transport(who: Stranger) -> None:
    who.send(who.hello(await who.challenge(), TOKEN, transports=("pigeon",)))


INTRUDERS: list[Callable[[Stranger], Awaitable[None]]] = [
    nothing,
    garbage,
    a_web_browser,
    four_gigabytes,
    half_a_frame,
    byte_by_byte,
    a_wrong_checksum,
    no_token,
    a_wrong_token,
    no_proof,
    a_proof_of_the_other_side,
    a_request_at_once,
    its_own_challenge,
    another_version,
    another_model,
    no_transport,
]


def held(server: EncodeServer) -> dict[str, int]:
    """What strangers could make grow."""
    assert server._exporter is not None
    gate = server._exporter._gate  # type: ignore[attr-defined]
    return {
        "fds": len(list(Path("/proc/self/fd").iterdir())),
        "connections": len(server._peers),
        "rooms": len(server._rooms),
        "tickets": len(gate._tickets),
        "readers": len(gate._guests),
        "tasks": len(asyncio.all_tasks()),
    }


async def settled(server: EncodeServer, before: dict[str, int], seconds: float = 30.0) -> dict[str, int]:
    """What is still held beyond ``before``."""
    deadline = time.monotonic() + seconds
    while True:
        more = {name: value for name, value in held(server).items() if value > before[name]}
        if not more or time.monotonic() > deadline:
            return more
        await asyncio.sleep(0.02)
