"""What an encode process takes on, whom it keeps waiting, and when it lets go."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.disaggregated import multimodal_embedding, service
from deepstitch.runtime.disaggregated.channel import receive
from deepstitch.runtime.disaggregated.errors import PeerBusy, PeerLost, RequestRefused, RequestTooLarge
from deepstitch.runtime.disaggregated.framing import REPLY_LIMIT, pack
from deepstitch.runtime.disaggregated.identity import differences, model_identity
from deepstitch.runtime.disaggregated.messages import (
    Announcement,
    EncodeRequest,
    Failure,
    ModelIdentity,
    Pending,
    Ping,
    Pong,
    Release,
    encode,
)
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.embedding import EmbeddingTable
from deepstitch.runtime.server.health import Health

from .clients import announced, encoded, guest, request, welcomed
from .intruders import held, settled
from .pair import QUICK, encode_config, png, running

ROOMS = [f"{number:032x}" for number in range(64)]


@pytest.fixture(scope="module")
def identity(plain_bundle: Path) -> ModelIdentity:
    bundle = Bundle.open(plain_bundle)
    return model_identity(bundle, EmbeddingTable.open(bundle))


@pytest.fixture(scope="module")
def files(pictures: Any) -> list[bytes]:
    return [png(each) for each in pictures]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "{path}"},
        {"type": "image", "path": "{path}"},
        {"type": "image_url", "image_url": {"url": "{path}"}},
        {"type": "video", "video": "{path}"},
        {"image": "{path}"},
        {"type": "image", "detail": "low"},
    ],
    ids=str,
)
def test_no_file_is_opened_for_a_peer(plain_bundle, identity, files, tmp_path, part):
    path = tmp_path / "secret.png"
    path.write_bytes(files[0])
    text = msgspec.json.encode(part).decode().replace("{path}", str(path))
    messages = [{"role": "user", "content": [msgspec.json.decode(text), {"type": "text", "text": "what is it?"}]}]

    async def run() -> None:
        server = EncodeServer(encode_config(plain_bundle, "tcp", ""))
        async with running(server), guest(server, identity) as caller:
            with pytest.raises(RequestRefused, match="pictures and clips are sent as bytes"):
                await announced(caller, request(ROOMS[0], [], messages))
            assert server.encoded == 0
            assert isinstance(await announced(caller, request(ROOMS[1], files[:1])), Announcement)

    asyncio.run(run())


def test_bytes_are_admitted_up_to_a_limit(plain_bundle, identity, files):
    """Pictures that wait and features that nobody has read count; what was released does not."""

    async def run() -> None:
        config = encode_config(plain_bundle, "tcp", "", request_bytes=100_000, encoder_cache_bytes=0)
        async with running(EncodeServer(config)) as server, guest(server, identity) as caller:
            large = files[0] + bytes(60_000)  # a PNG may end in anything
            with pytest.raises(RequestTooLarge, match="--request-mib"):
                await caller.call(request(ROOMS[0], [large, large]))
            gate = asyncio.Event()
            hold = asyncio.create_task(_hold(server, gate))
            await asyncio.sleep(0.05)
            first = asyncio.create_task(announced(caller, request(ROOMS[1], [large])))
            await asyncio.sleep(0.05)
            with pytest.raises(PeerBusy, match="bytes"):
                await caller.call(request(ROOMS[2], [large]))
            gate.set()
            await asyncio.gather(hold, first)
            await encoded(server)
            features = server._rooms[next(iter(server._rooms))].nbytes
            assert 0 < features < 60_000  # the picture itself is not kept
            await announced(caller, request(ROOMS[3], [large]))
            for room in (ROOMS[1], ROOMS[3]):
                await caller.call(Release(seq=0, room=room, attempt=0, abandoned=True))
            assert server._held == 0

    asyncio.run(run())


async def _hold(server: EncodeServer, gate: asyncio.Event) -> None:
    """Nothing is encoded before ``gate``."""
    async with server._turn:
        await gate.wait()


def test_features_that_nobody_reads_keep_others_from_being_encoded(plain_bundle, identity, files):
    async def run() -> None:
        config = encode_config(plain_bundle, "tcp", "", encoder_cache_bytes=0)
        async with running(EncodeServer(config)) as server, guest(server, identity) as caller:
            await announced(caller, request(ROOMS[0], files[:1]))
            await encoded(server)
            one = server._features
            server.config = replace(config, request_bytes=one)
            told: list[Any] = []
            waits = asyncio.create_task(server._encode(request(ROOMS[1], files[1:2]), told.append))
            await asyncio.sleep(0.3)
            assert not waits.done() and server.encoded == 1
            assert not told  # else blocks would be held for it, which the others may need
            await caller.call(Release(seq=0, room=ROOMS[0], attempt=0, abandoned=True))
            await asyncio.wait_for(waits, 5.0)

    asyncio.run(run())


def test_a_repeated_request_holds_no_pictures(plain_bundle, identity, files):
    """They would be here as often as the request is sent."""

    async def run() -> None:
        async with running(EncodeServer(encode_config(plain_bundle, "tcp", ""))) as server:
            seen = []
            answer = server.reply_to

            async def watched(peer: str, message: Any) -> Any:
                seen.append(message)
                return await answer(peer, message)

            server.reply_to = watched
            async with guest(server, identity) as caller:
                for _ in range(2):
                    await announced(caller, request(ROOMS[0], files[:1]))
            assert len(seen) >= 2 and all(each.images == () and each.messages == b"" for each in seen)

    asyncio.run(run())


def test_messages_stay_unread_while_many_are_answered(plain_bundle, identity, files):
    async def run() -> None:
        config = encode_config(plain_bundle, "tcp", "", max_requests=1)
        async with running(EncodeServer(config)) as server:
            who, gate, running_now = await welcomed(server, identity), asyncio.Event(), []

            async def slow(peer: str, message: Any) -> Any:
                running_now.append(message)
                await gate.wait()
                return Pending(seq=message.seq, room=message.room, attempt=0)

            server.reply_to = slow
            for number in range(20):
                who.send(Release(seq=number, room=ROOMS[0], attempt=0))
            await asyncio.sleep(0.2)
            assert len(running_now) == 4
            gate.set()
            replies = [await receive(who.reader, REPLY_LIMIT) for _ in range(20)]
            assert sorted(each.seq for each in replies) == list(range(20))
            who.writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_silent_peer_loses_its_blocks_long_before_the_lease(plain_bundle, identity, files, tmp_path, transport):
    quick = replace(QUICK, ping=0.2, hang=0.6)

    async def run() -> None:
        folder = os.path.relpath(tmp_path) if len(str(tmp_path)) > 80 else str(tmp_path)
        config = encode_config(plain_bundle, transport, folder, deadlines=quick)
        async with running(EncodeServer(config)) as server:
            before = held(server)
            async with guest(server, identity) as pinging:
                who = await welcomed(server, identity)
                who.send(request(ROOMS[0], files[:1]))
                began = time.monotonic()
                await asyncio.wait_for(who.rest(), 5.0)
                assert 0.7 < time.monotonic() - began < 2.5
                assert not pinging.lost.done()
                assert isinstance(await pinging.call(Ping(seq=0)), Pong)
                assert server.idle
                who.writer.close()
            assert await settled(server, before) == {}

    asyncio.run(run())


def test_a_slow_peer_is_not_silent(plain_bundle, identity, files):
    """A large request over a slow line."""
    quick = replace(QUICK, ping=0.2, hang=0.3)

    async def run() -> None:
        config = encode_config(plain_bundle, "tcp", "", deadlines=quick)
        async with running(EncodeServer(config)) as server:
            who = await welcomed(server, identity)
            frame = pack(encode(request(ROOMS[0], files[:1])))
            for at in range(10):
                who.writer.write(frame[at * len(frame) // 10 : (at + 1) * len(frame) // 10])
                await asyncio.sleep(0.15)
            assert isinstance(await receive(who.reader, REPLY_LIMIT), Announcement | Pending)
            who.writer.close()

    asyncio.run(run())


def test_a_machine_that_is_gone_is_noticed(plain_bundle, identity):
    """Both ends of a TCP control connection probe the other."""

    async def run() -> None:
        sockets: list[Any] = []
        async with running(EncodeServer(encode_config(plain_bundle, "tcp", ""))) as server:
            serve = multimodal_embedding.Guest.serve

            async def noted(self: Any, **more: Any) -> None:
                sockets.append(self._writer.get_extra_info("socket"))
                await serve(self, **more)

            multimodal_embedding.Guest.serve = noted
            try:
                async with guest(server, identity) as caller:
                    sockets.append(caller._writer.get_extra_info("socket"))
                    alive = [each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for each in sockets]
                    assert alive == [1, 1]
            finally:
                multimodal_embedding.Guest.serve = serve

    asyncio.run(run())


def test_a_busy_process_is_healthy(plain_bundle, identity, files, monkeypatch):
    """A check is done after the request that is being encoded, not after all that wait."""
    monkeypatch.setattr(multimodal_embedding, "_HEALTH_SECONDS", 1.0)
    monkeypatch.setattr(service, "_LOOK_SECONDS", 1.0)  # it would not wait for its turn that long

    async def run() -> None:
        async with running(EncodeServer(encode_config(plain_bundle, "tcp", ""))) as server:
            encode_now = server._encode_now

            def slow(message: EncodeRequest, prepared: Any) -> Any:
                time.sleep(0.25)
                return encode_now(message, prepared)

            server._encode_now = slow
            async with guest(server, identity) as caller:
                many = [asyncio.create_task(announced(caller, request(room, files[:1]))) for room in ROOMS[:12]]
                await asyncio.sleep(0.1)
                assert server.waiting == 12
                assert (await server.check())["encoded_rows"] > 0
                assert server.waiting > 5
                await asyncio.gather(*many)

    asyncio.run(run())


@pytest.mark.parametrize("computes", [True, False], ids=["computes", "sleeps"])
def test_a_long_encode_is_healthy_while_it_computes(plain_bundle, identity, files, monkeypatch, computes):
    """For as long as it takes; one that stands still for longer than the limit is not."""
    monkeypatch.setattr(multimodal_embedding, "_HEALTH_SECONDS", 0.4)
    monkeypatch.setattr(service, "_LOOK_SECONDS", 0.1)

    async def run() -> None:
        async with running(EncodeServer(encode_config(plain_bundle, "tcp", ""))) as server:
            encode_now, health, stuck = server._encode_now, Health(server.check, max_age=0.0), threading.Event()

            def slow(message: EncodeRequest, prepared: Any) -> Any:
                end = time.monotonic() + 1.2
                while computes and time.monotonic() < end:
                    sum(range(1000))
                assert computes or stuck.wait(20)
                return encode_now(message, prepared)

            server._encode_now = slow
            async with guest(server, identity) as caller:
                asked = asyncio.create_task(announced(caller, request(ROOMS[0], files[:1])))
                while not server.waiting:
                    await asyncio.sleep(0.01)
                reports = []
                while server.waiting and (computes or not reports):
                    reports.append(await health())
                stuck.set()
                assert isinstance(await asked, Announcement)
                if computes:
                    assert len(reports) > 5 and all(status == 200 for status, _ in reports)
                else:
                    [(status, report)] = reports
                    assert status == 503 and "not encoded within 0.4 s" in report["reason"]
                await encoded(server)
                status, report = await health()
                assert status == 200 and report["encoded_rows"] > 0

    asyncio.run(run())


def test_what_decides_how_a_prompt_looks_is_compared(plain_bundle, identity):
    bundle = Bundle.open(plain_bundle)
    table = EmbeddingTable.open(bundle)

    def other(**changes: Any) -> ModelIdentity:
        changed = replace(bundle.manifest, **changes)
        return model_identity(type("Changed", (), {"manifest": changed})(), table)  # type: ignore[arg-type]

    for names, field in (
        (("chat_template.jinja", "chat_template.json", "tokenizer_config.json"), "chat_template"),
        (("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"), "preprocessing"),
    ):
        name = next(each for each in names if each in bundle.manifest.files)
        damaged = {**bundle.manifest.files, name: replace(bundle.manifest.files[name], sha256="0" * 64)}
        found = differences(identity, other(files=damaged))
        assert found.startswith(f"{field}: ") and "same checkpoint" in found and found.count(" side, ") == 1
    without = differences(identity, other(vision=None))
    assert without.startswith("merge_size: 2 on the encode side, 0 on") and "reads text only" in without
    assert differences(identity, other()) == ""


def test_a_message_of_another_kind_is_refused_and_the_connection_stays(plain_bundle, identity, files):
    """Its frame is whole and its number can be read: only this request fails."""

    async def run() -> None:
        async with running(EncodeServer(encode_config(plain_bundle, "tcp", ""))) as server:
            who = await welcomed(server, identity)
            for seq, nonsense in enumerate(({"type": "dance"}, {"type": "ping", "more": 1}, {"room": 7}), 5):
                who.writer.write(pack(msgspec.msgpack.encode({"seq": seq, **nonsense})))
                reply = await receive(who.reader, REPLY_LIMIT)
                assert isinstance(reply, Failure) and (reply.seq, reply.code) == (seq, "protocol")
            who.send(Ping(seq=9))
            assert (await receive(who.reader, REPLY_LIMIT)).seq == 9
            who.writer.write(pack(msgspec.msgpack.encode({"seq": -1})))
            assert await asyncio.wait_for(who.rest(), 2.0) == b""
            who.writer.close()

    asyncio.run(run())


def test_gauges_follow_a_request(plain_bundle, identity, files):
    def shown(server: EncodeServer, name: str) -> float:
        lines = server.metrics.text().decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"deepstitch_{name}")))

    async def run() -> None:
        async with running(EncodeServer(encode_config(plain_bundle, "tcp", ""))) as server:
            assert shown(server, "connections ") == 0
            async with guest(server, identity) as caller:
                gate = asyncio.Event()
                hold = asyncio.create_task(_hold(server, gate))
                asked = asyncio.create_task(announced(caller, request(ROOMS[0], files[:1])))
                await asyncio.sleep(0.1)
                assert [shown(server, f"{each} ") for each in ("connections", "rooms", "requests_waiting")] == [1, 1, 1]
                gate.set()
                await asyncio.gather(hold, asked)
                await encoded(server)
                assert shown(server, "requests_waiting ") == 0
                assert shown(server, "cache_misses_total ") == 1
                for direction in ("in", "out"):
                    assert shown(server, f'messages_total{{direction="{direction}"}}') >= 1

    asyncio.run(run())


def test_a_dead_peer_says_so(plain_bundle, identity):
    async def run() -> None:
        server = EncodeServer(encode_config(plain_bundle, "tcp", ""))
        async with running(server), guest(server, identity) as caller:
            await server.stop()
            assert isinstance(await asyncio.wait_for(caller.lost, 2.0), PeerLost)

    asyncio.run(run())
