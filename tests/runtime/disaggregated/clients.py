"""Clients of an encode process: what they ask, and what they wait for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from deepstitch.runtime.disaggregated.channel import Caller, connect, receive
from deepstitch.runtime.disaggregated.framing import REPLY_LIMIT
from deepstitch.runtime.disaggregated.messages import Announcement, EncodeRequest, ModelIdentity, Pending, Welcome
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer

from .intruders import Stranger, stranger
from .pair import TOKEN, conversation


@contextlib.asynccontextmanager
async def guest(server: EncodeServer, identity: ModelIdentity) -> AsyncIterator[Caller]:
    """A client that has the token and pings."""
    caller, _ = await connect(
        server.address, token=TOKEN, identity=identity, transports=("shm", "tcp"), deadlines=server.config.deadlines
    )
    try:
        yield caller
    finally:
        await caller.close()


async def welcomed(server: EncodeServer, identity: ModelIdentity) -> Stranger:
    """One that has the token and says no more than it is told to."""
    who = await stranger(server.address, identity)
    who.send(who.hello(await who.challenge(), TOKEN))
    assert isinstance(await receive(who.reader, REPLY_LIMIT), Welcome)
    return who


def request(room: str, files: list[bytes], messages: Any = None) -> EncodeRequest:
    told = conversation("what is it?", len(files)) if messages is None else messages
    return EncodeRequest(seq=0, room=room, attempt=0, messages=msgspec.json.encode(told), images=tuple(files))


async def announced(caller: Caller, message: EncodeRequest) -> Announcement:
    reply = await caller.call(message)
    while isinstance(reply, Pending):
        reply = await caller.call(EncodeRequest(seq=0, room=message.room, attempt=0, poll=True))
    return reply


async def encoded(server: EncodeServer) -> None:
    """What was announced is encoded a little later."""
    while server.waiting:
        await asyncio.sleep(0.001)
