"""Who may not ask gets nothing, and who may, but asks the impossible, harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.disaggregated.channel import Caller, connect, receive
from deepstitch.runtime.disaggregated.config import PoolConfig
from deepstitch.runtime.disaggregated.errors import DisaggregationError, HandshakeRefused, PeerLost
from deepstitch.runtime.disaggregated.framing import HANDSHAKE_LIMIT, pack
from deepstitch.runtime.disaggregated.identity import model_identity
from deepstitch.runtime.disaggregated.messages import (
    Announcement,
    EncodeRequest,
    Failure,
    ModelIdentity,
    Pending,
    Ping,
    Pong,
    Received,
    Release,
    Released,
    TransferInit,
    TransferReady,
    TransferResume,
    Welcome,
    encode,
)
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.disaggregated.transport import open_importer
from deepstitch.runtime.embedding import EmbeddingTable
from deepstitch.runtime.pipeline import Pipeline

from .intruders import CLOSED_SECONDS, INTRUDERS, MAGIC, QUICKER, ROOM, Stranger, held, settled, stranger
from .pair import TOKEN, ask, conversation, encode_config, language_config, pair, png, running, same
from .processes import Child

SIDE = {"deadlines": QUICKER, "encoder_cache_bytes": 0}


@pytest.fixture(scope="module")
def identity(plain_bundle: Path) -> ModelIdentity:
    bundle = Bundle.open(plain_bundle)
    return model_identity(bundle, EmbeddingTable.open(bundle))


@pytest.fixture(scope="module")
def files(pictures: Any) -> list[bytes]:
    return [png(each) for each in pictures]


@pytest.fixture(scope="module")
def answers(plain_bundle: Path, files: list[bytes]) -> list[Any]:
    pipeline = Pipeline.open(plain_bundle, threads=1)
    options = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}
    return [pipeline.generate(conversation("what is it?", 1), images=[file], **options) for file in files]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_who_has_no_token_gets_nothing(plain_bundle, identity, files, answers, transport):
    """All of them at once, while requests are served."""

    async def intrude(encode_side: EncodeServer, how: Callable[[Stranger], Awaitable[None]]) -> tuple[bytes, float]:
        began = time.monotonic()
        who = await stranger(encode_side.address, identity)
        try:
            with contextlib.suppress(DisaggregationError, ConnectionError):
                await how(who)
            return await asyncio.wait_for(who.rest(), CLOSED_SECONDS + 2), time.monotonic() - began
        finally:
            who.writer.close()

    async def run() -> None:
        async with pair(plain_bundle, transport=transport, encode=SIDE, language=SIDE) as (left, right):
            await ask(right, "what is it?", [files[0]])
            before = held(left)
            intruders = [asyncio.create_task(intrude(left, how)) for how in INTRUDERS]
            served = await asyncio.gather(*[ask(right, "what is it?", [file]) for file in files])
            assert all(map(same, served, answers))
            for how, (heard, seconds) in zip(INTRUDERS, await asyncio.gather(*intruders), strict=True):
                assert b"welcome" not in heard, how.__name__
                assert seconds < CLOSED_SECONDS, how.__name__
            assert await settled(left, before) == {}

    asyncio.run(run())


def test_a_hello_is_good_for_one_connection(plain_bundle, identity):
    """Somebody has listened to the first one."""

    async def run() -> None:
        with_config = encode_config(plain_bundle, "tcp", "", **SIDE)
        async with running(EncodeServer(with_config)) as server:
            first, second = [await stranger(server.address, identity) for _ in range(2)]
            hello = first.hello(await first.challenge(), TOKEN)
            first.send(hello)
            welcomed = await receive(first.reader, 1 << 20)
            assert isinstance(welcomed, Welcome)
            await second.challenge()
            second.send(hello)
            refused = await receive(second.reader, HANDSHAKE_LIMIT)
            assert isinstance(refused, Failure) and refused.code == HandshakeRefused.code
            for each in (first, second):
                each.writer.close()
            await asyncio.sleep(0.1)
            with pytest.raises(HandshakeRefused):  # its ticket ended with the connection
                open_importer("tcp", welcomed.endpoint, welcomed.ticket, local=server.pool.buffers.memory)

    asyncio.run(run())


def test_thousands_of_silent_connections(plain_bundle, identity, files, answers):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 8192
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, 8192)), hard))
    count = min(2000, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200) // 2)

    async def run() -> None:
        async with pair(plain_bundle, transport="tcp", encode=SIDE, language=SIDE) as (left, right):
            await ask(right, "what is it?", [files[0]])
            before = held(left)
            crowd = [await stranger(left.address, identity) for _ in range(count)]
            assert same(await ask(right, "what is it?", [files[1]]), answers[1])
            async with running(LanguageServer(language_config(plain_bundle, left.address, **SIDE))) as newcomer:
                assert same(await ask(newcomer, "what is it?", [files[2]]), answers[2])
            await asyncio.wait_for(asyncio.gather(*[each.rest() for each in crowd]), 30.0)
            for each in crowd:
                each.writer.close()
            assert await settled(left, before) == {}

    try:
        asyncio.run(run())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptors_left(plain_bundle, identity, files, answers, tmp_path):
    """More connections than the process may have: who is connected is served, later ones when the crowd has gone."""

    async def run() -> None:
        config = encode_config(plain_bundle, "shm", str(tmp_path), **SIDE)
        child = await Child.start("encode", config)
        try:
            async with running(LanguageServer(language_config(plain_bundle, config.listen, **SIDE))) as language:
                await ask(language, "what is it?", [files[0]])
                usual = child.usage()["fds"]
                resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (usual + 40, usual + 40))
                crowd = [await stranger(config.listen, identity) for _ in range(90)]
                await asyncio.sleep(0.1)
                for file, answer in zip(files, answers, strict=True):
                    assert same(await ask(language, "what is it?", [file]), answer)
                for each in crowd:
                    each.writer.close()
                async with running(LanguageServer(language_config(plain_bundle, config.listen, **SIDE))) as newcomer:
                    assert same(await ask(newcomer, "what is it?", [files[0]]), answers[0])
            deadline = time.monotonic() + 5.0
            while child.usage()["fds"] >= usual:  # without the connection of the language process
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        finally:
            await child.end()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def guest(server: EncodeServer, identity: ModelIdentity) -> AsyncIterator[Caller]:
    """A client that has the token."""
    caller, _ = await connect(
        server.address, token=TOKEN, identity=identity, transports=("shm", "tcp"), deadlines=QUICKER
    )
    try:
        yield caller
    finally:
        await caller.close()


def request(room: str, files: list[bytes]) -> EncodeRequest:
    messages = msgspec.json.encode(conversation("what is it?", len(files)))
    return EncodeRequest(seq=0, room=room, attempt=0, messages=messages, images=tuple(files))


async def transferring(caller: Caller, room: str, files: list[bytes]) -> TransferReady:
    """Bring a room so far that blocks are filled."""
    reply = await caller.call(request(room, files))
    while isinstance(reply, Pending):
        reply = await caller.call(EncodeRequest(seq=0, room=room, attempt=0, poll=True))
    assert isinstance(reply, Announcement)
    reply = init = TransferInit(seq=0, room=room, attempt=0, tokens=8)
    while not isinstance(reply, TransferReady):
        reply = await caller.call(init)
    return reply


IMPOSSIBLE = {
    "received what was never sent": Received(seq=0, room=ROOM, attempt=0, tokens=3),
    "resumes before the beginning": TransferResume(seq=0, room=ROOM, attempt=0, sent_tokens=5, tokens=5),
    "begins an unknown room": TransferInit(seq=0, room="b" * 32, attempt=0, tokens=5),
    "speaks of another attempt": TransferInit(seq=0, room=ROOM, attempt=7, tokens=5),
    "asks for news of nothing": EncodeRequest(seq=0, room="c" * 32, attempt=0, poll=True),
    "announces": Announcement(seq=0, room=ROOM, attempt=0, total_tokens=9, deepstack_rows=9, rope_delta=0, items=()),
    "is pending": Pending(seq=0, room=ROOM, attempt=0),
    "has released": Released(seq=0, room=ROOM, attempt=0),
    "has failed": Failure(seq=0, code="busy", text=""),
    "pongs": Pong(seq=0, waiting=1, clock=0.0),
    "sends no messages": EncodeRequest(seq=0, room="d" * 32, attempt=0),
    "sends no JSON": EncodeRequest(seq=0, room="e" * 32, attempt=0, messages=b"\xff\x00"),
    "sends a number": EncodeRequest(seq=0, room="f" * 32, attempt=0, messages=b"7"),
    "sends nested lists": EncodeRequest(seq=0, room="1" * 32, attempt=0, messages=b"[" * 90000 + b"]" * 90000),
    "sends strange parts": EncodeRequest(
        seq=0, room="2" * 32, attempt=0, messages=b'[{"role":[],"content":[{"type":{}}]}]'
    ),
    "sends a picture that is none": EncodeRequest(
        seq=0, room="3" * 32, attempt=0, messages=msgspec.json.encode(conversation("?", 1)), images=(b"GIF89a",)
    ),
}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_impossible_messages_are_refused(plain_bundle, identity, files, answers, transport):
    """Each gets a typed failure; the room of somebody else stays as it is, and so does the connection."""

    async def run() -> None:
        async with pair(plain_bundle, transport=transport, encode=SIDE, language=SIDE) as (left, right):
            await ask(right, "what is it?", [files[0]])
            before = held(left)
            async with guest(left, identity) as victim, guest(left, identity) as attacker:
                mine = await transferring(victim, ROOM, [files[1]])
                for name, message in IMPOSSIBLE.items():
                    with pytest.raises(DisaggregationError) as caught:
                        reply = await attacker.call(message)
                        while isinstance(reply, Pending):
                            reply = await attacker.call(msgspec.structs.replace(message, poll=True))
                    assert caught.value.code != "peer_lost", name
                    assert "internal" not in str(caught.value), name
                # a room of the same name is another room, and so is its release
                assert isinstance(await attacker.call(Release(seq=0, room=ROOM, attempt=0)), Released)
                again = await victim.call(TransferInit(seq=0, room=ROOM, attempt=0, tokens=8))
                assert msgspec.structs.replace(again, seq=0) == msgspec.structs.replace(mine, seq=0)
                assert same(await ask(right, "what is it?", [files[2]]), answers[2])
                own = await transferring(attacker, "9" * 32, [files[3]])
                for wrong in (own.count + 1, own.count - 1):
                    with pytest.raises(DisaggregationError):
                        await attacker.call(Received(seq=0, room="9" * 32, attempt=0, tokens=wrong))
                resume = TransferResume(seq=0, room="9" * 32, attempt=0, sent_tokens=own.count + 5, tokens=1)
                with pytest.raises(DisaggregationError):
                    await attacker.call(resume)
            assert await settled(left, before) == {}

    asyncio.run(run())


@pytest.mark.parametrize(
    "nonsense",
    [
        pytest.param(pack(b"\xc1 no message"), id="a frame that is no message"),
        pytest.param(pack(encode(Ping(seq=0)))[:-1] + b"x", id="a wrong checksum"),
        pytest.param(b"DSM2" + bytes(12), id="another magic"),
        pytest.param(struct.pack("<4sIQ", MAGIC, 0xFFFFFFFF, 0), id="four gigabytes"),
        pytest.param(os.urandom(4096), id="garbage"),
    ],
)
def test_a_guest_that_babbles_loses_its_connection_and_rooms(plain_bundle, identity, files, answers, nonsense):
    async def run() -> None:
        async with pair(plain_bundle, encode=SIDE, language=SIDE) as (left, right):
            await ask(right, "what is it?", [files[0]])
            before = held(left)
            async with guest(left, identity) as babbler:
                await transferring(babbler, ROOM, [files[1]])
                assert not left.idle
                babbler._writer.write(nonsense)
                lost = await asyncio.wait_for(babbler.lost, 3.0)
                assert isinstance(lost, PeerLost)
                assert same(await ask(right, "what is it?", [files[2]]), answers[2])
            assert await settled(left, before) == {}
            assert left.pool.idle

    asyncio.run(run())


def test_a_greedy_guest_gets_what_there_is_and_no_more(plain_bundle, identity, files):
    """It asks for rooms without end and never releases one; when it has gone, everything is free."""

    async def run() -> None:
        pool = PoolConfig(block_tokens=16, blocks=16, deepstack_blocks=32)
        options = {**SIDE, "max_requests": 8, "pool": pool}
        async with pair(plain_bundle, encode=options, language=SIDE) as (left, right):
            before = held(left)
            async with guest(left, identity) as greedy:
                calls = [greedy.call(request(f"{number:032x}", [files[0]])) for number in range(50)]
                replies = await asyncio.gather(*calls, return_exceptions=True)
                assert [getattr(each, "code", "") for each in replies].count("busy") == 42
                assert isinstance(await greedy.call(Ping(seq=0)), Pong)
            assert await settled(left, before) == {}
            await ask(right, "what is it?", [files[1]])

    asyncio.run(run())
