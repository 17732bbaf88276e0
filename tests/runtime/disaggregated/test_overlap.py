"""What happens while the vision encoder or the decoder works: sizes go ahead of the rows, the release after them.

And what waits then: rows for landing blocks, but landing blocks never for rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepstitch.runtime.disaggregated import reception
from deepstitch.runtime.disaggregated.channel import Caller
from deepstitch.runtime.disaggregated.config import PoolConfig
from deepstitch.runtime.disaggregated.conn_multimodal import link, sender
from deepstitch.runtime.disaggregated.errors import DeadlineExceeded, PeerLost
from deepstitch.runtime.disaggregated.messages import Release, TransferInit
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.disaggregated.reception import Request
from deepstitch.runtime.disaggregated.states import SenderState
from deepstitch.runtime.disaggregated.trace import LANGUAGE, Trace
from deepstitch.runtime.pipeline import Pipeline

from .pair import QUICK, ask, conversation, encode_config, language_config, pair, png, running, same, soon


@pytest.fixture(scope="module")
def files(pictures: Any) -> list[bytes]:
    return [png(each) for each in pictures]


@pytest.fixture(scope="module")
def wanted(plain_bundle: Path, files: list[bytes]) -> Any:
    options = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}
    pipeline = Pipeline.open(plain_bundle, threads=1)
    return pipeline.generate(conversation("what is it?", 1), images=files[:1], **options)


def held_up(server: EncodeServer, go_on: threading.Event, *, fails: int = 0) -> None:
    """Its vision encoder waits to be told; its first answers are failures."""
    features, left = server._parts.encoder.features, [fails]

    def slow(batches: Any) -> Any:
        assert go_on.wait(10)
        if left[0]:
            left[0] -= 1
            raise RuntimeError("on purpose")
        return features(batches)

    server._parts.encoder.features = slow  # type: ignore[method-assign]


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[TransferInit]:
    """Initial transfers that encode sides have been asked for."""
    found: list[TransferInit] = []
    handle = sender.Sender.handle

    async def noted(self: sender.Sender, message: Any) -> Any:
        if isinstance(message, TransferInit):
            found.append(message)
        return await handle(self, message)

    monkeypatch.setattr(sender.Sender, "handle", noted)
    return found


def test_rows_are_asked_for_while_a_picture_is_encoded(
    plain_bundle: Path, files: list[bytes], wanted: Any, asked_for: list[TransferInit]
) -> None:
    async def run() -> Any:
        async with pair(plain_bundle) as (encode, language):
            go_on = threading.Event()
            held_up(encode, go_on)
            asked = asyncio.create_task(ask(language, "what is it?", files[:1]))
            assert await soon(lambda: bool(asked_for))
            (room,) = encode._rooms.values()
            assert room.machine.state is SenderState.BOOTSTRAPPING
            assert encode.pool.idle and language.pool.idle
            await asyncio.sleep(1.2)  # long enough for Pending
            assert language.pool.idle
            go_on.set()
            return await asked

    assert same(asyncio.run(run()), wanted)


def test_an_encoder_that_fails_when_it_has_told_the_sizes(
    plain_bundle: Path, files: list[bytes], wanted: Any, asked_for: list[TransferInit]
) -> None:
    async def run() -> Any:
        async with pair(plain_bundle) as (encode, language):
            go_on = threading.Event()
            held_up(encode, go_on, fails=1)
            asked = asyncio.create_task(ask(language, "what is it?", files[:1]))
            assert await soon(lambda: bool(asked_for))
            go_on.set()
            answer = await asked
            assert b'attempts_total{outcome="encode_failed"} 1.0' in language.metrics.text()
            return answer

    assert same(asyncio.run(run()), wanted)


def test_a_client_that_goes_away_while_its_picture_is_encoded(
    plain_bundle: Path, files: list[bytes], asked_for: list[TransferInit]
) -> None:
    async def run() -> None:
        async with pair(plain_bundle) as (encode, language):
            go_on = threading.Event()
            held_up(encode, go_on)
            asked = asyncio.create_task(ask(language, "what is it?", files[:1]))
            assert await soon(lambda: bool(asked_for))
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            assert await soon(lambda: language.pool.idle and not encode._rooms)
            go_on.set()

    asyncio.run(run())


def test_a_slow_encoder_does_not_hold_up_another(plain_bundle: Path, files: list[bytes], wanted: Any) -> None:
    """There are landing blocks for one request; the picture at the second encode process is answered meanwhile."""
    go_on = {name: threading.Event() for name in "ab"}

    async def run(folder: Path) -> None:
        for name in go_on:
            (folder / name).mkdir()
        servers = {name: EncodeServer(encode_config(plain_bundle, "shm", str(folder / name))) for name in go_on}
        async with running(servers["a"]), running(servers["b"]):
            for name, server in servers.items():
                held_up(server, go_on[name])
            blocks = -(-wanted.prompt_tokens // 16)
            config = language_config(
                plain_bundle,
                *[server.address for server in servers.values()],
                pool=PoolConfig(block_tokens=16, blocks=blocks, deepstack_blocks=blocks),
            )
            async with running(LanguageServer(config)) as language:
                assert len(language._encoders.connected) == 2
                slow = asyncio.create_task(ask(language, "what is it?", files[:1]))
                rooms = {name: server._rooms for name, server in servers.items()}
                assert await soon(lambda: any(room._announcement for each in rooms.values() for room in each.values()))
                await asyncio.sleep(0.05)  # the answer to the sizes has come
                (idle,) = (name for name in rooms if not rooms[name])
                go_on[idle].set()
                quick = await asyncio.wait_for(ask(language, "what is it?", files[:1]), 5)
                assert same(quick, wanted) and not slow.done() and language.pool.idle
                for event in go_on.values():
                    event.set()
                assert same(await slow, wanted)
                assert await soon(lambda: language.idle and all(server.idle for server in servers.values()))

    try:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(run(Path(folder)))
    finally:
        for event in go_on.values():
            event.set()


async def starved(encode: EncodeServer, language: LanguageServer, file: bytes) -> Any:
    """A request whose rows lie ready, with no landing blocks for them; and who is in the way."""
    pool = language.pool
    rows = [each.total * pool.layout.block_tokens for each in (pool.tokens, pool.deepstack)]
    await pool.acquire("stranger", *rows)
    asked = asyncio.create_task(ask(language, "what is it?", [file]))
    ready = [SenderState.TRANSFERRING]
    assert await soon(lambda: [room.machine.state for room in encode._rooms.values()] == ready)
    await asyncio.sleep(0.05)  # it has heard so
    assert pool._queue
    return asked


def served(language: LanguageServer) -> Callable[[str], bool]:
    """Whether exactly one attempt had this outcome."""
    return lambda outcome: f'attempts_total{{outcome="{outcome}"}} 1.0' in language.metrics.text().decode()


def test_rows_are_kept_while_they_wait_for_landing_blocks(plain_bundle: Path, files: list[bytes], wanted: Any) -> None:
    deadlines = {"deadlines": dataclasses.replace(QUICK, lease=0.4)}

    async def run() -> Any:
        async with pair(plain_bundle, encode=deadlines) as (encode, language):
            asked = await starved(encode, language, files[0])
            await asyncio.sleep(1.5)
            assert not encode.pool.idle
            language.pool.release("stranger")
            answer = await asked
            assert served(language)("ok") and language.metrics.text().count(b"attempts_total{") == 1
            return answer

    assert same(asyncio.run(run()), wanted)


def test_a_peer_that_goes_while_its_rows_wait_for_landing_blocks(
    plain_bundle: Path, files: list[bytes], wanted: Any
) -> None:
    async def run() -> Any:
        async with pair(plain_bundle) as (encode, language):
            asked = await starved(encode, language, files[0])
            (peer,) = encode._peers
            peer.cancel()
            assert await soon(lambda: served(language)("peer_lost"))
            language.pool.release("stranger")
            return await asked

    assert same(asyncio.run(run()), wanted)


@pytest.mark.parametrize("how", ["cancelled", "too late"])
def test_nobody_waits_for_landing_blocks_for_ever(plain_bundle: Path, files: list[bytes], how: str) -> None:
    deadlines = {"deadlines": dataclasses.replace(QUICK, request=1.0 if how == "too late" else 30.0)}

    async def run() -> None:
        async with pair(plain_bundle, language=deadlines) as (encode, language):
            asked = await starved(encode, language, files[0])
            if how == "cancelled":
                asked.cancel()
            (outcome,) = await asyncio.wait_for(asyncio.gather(asked, return_exceptions=True), 5)
            assert isinstance(outcome, asyncio.CancelledError if how == "cancelled" else DeadlineExceeded)
            assert await soon(lambda: encode.idle and not language.pool._queue)
            assert set(language.pool.tokens.owners) == {"stranger"}
            language.pool.release("stranger")
            assert language.pool.idle

    asyncio.run(run())


@pytest.mark.parametrize("how", ["late", "lost"])
def test_nobody_waits_for_the_release(
    plain_bundle: Path, files: list[bytes], wanted: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, go_on = Caller.call, asyncio.Event()

    async def slow(self: Caller, message: Any) -> Any:
        if isinstance(message, Release):
            await go_on.wait()
            if how == "lost":
                raise PeerLost("on purpose")
        return await call(self, message)

    monkeypatch.setattr(Caller, "call", slow)

    async def run() -> Any:
        async with pair(plain_bundle, encode={"encoder_cache_bytes": 0}) as (encode, language):
            answer = await ask(language, "what is it?", files[:1])
            assert language.pool.idle and not language.idle and not encode.pool.idle
            go_on.set()
            assert await soon(lambda: language.idle)
            if how == "lost":
                for name, room in list(encode._rooms.items()):
                    room.end(sender.SenderEvent.PEER_LOST, PeerLost("on purpose"))
                    encode._bury(name)
            return answer

    assert same(asyncio.run(run()), wanted)


@pytest.mark.parametrize("at_once", [True, False])
def test_little_is_copied_at_once_and_much_in_a_thread(
    plain_bundle: Path, files: list[bytes], wanted: Any, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, list[bool]] = {"fill": [], "read": []}
    for module in (sender, link):
        monkeypatch.setattr(module, "_AT_ONCE", 1 << 20 if at_once else 0)
    for name, owner, method in (("fill", sender.Sender, "_fill"), ("read", link.Link, "_read")):
        original = getattr(owner, method)

        def noted(self: Any, *arguments: Any, name: str = name, original: Any = original) -> Any:
            threads[name].append(threading.current_thread() is threading.main_thread())
            return original(self, *arguments)

        monkeypatch.setattr(owner, method, noted)

    async def run() -> Any:
        async with pair(plain_bundle) as (_, language):
            return await ask(language, "what is it?", files[:1])

    assert same(asyncio.run(run()), wanted)
    assert threads == {"fill": [at_once], "read": [at_once]}


def test_what_is_left_to_do_is_bounded_and_ends(
    plain_bundle: Path, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with pair(plain_bundle) as (_, language):
            preparation, request = language._reception, Request(messages=conversation("what?", 1), images=files[:1])
            assert preparation is not None
            prepared = [await preparation.prepare(request, Trace(LANGUAGE)) for _ in range(3)]
            monkeypatch.setattr(reception, "_MOST_REMEMBERING", 2)
            for each in prepared:
                each.follow_up()
            assert len(preparation._remembering) == 2
            assert await soon(lambda: not preparation._remembering)
            await preparation.close()
            prepared[0].follow_up()
            assert not preparation._remembering
            assert b'attempts_total{outcome="ok"} 4.0' in language.metrics.text()

    asyncio.run(run())


def test_what_cannot_be_remembered_is_told(
    plain_bundle: Path, files: list[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(reception.Reception, "_remember", broken)

    async def run() -> None:
        async with pair(plain_bundle) as (_, language):
            await ask(language, "what is it?", files[:1])
            assert language._reception is not None
            assert await soon(lambda: not language._reception._remembering)

    asyncio.run(run())
    assert "could not be remembered" in caplog.text and "on purpose" in caplog.text


def test_without_a_cache_nothing_is_copied_for_it(plain_bundle: Path, files: list[bytes]) -> None:
    async def run() -> None:
        async with pair(plain_bundle, language={"encoder_cache_bytes": 0}) as (_, language):
            preparation, request = language._reception, Request(messages=conversation("what?", 1), images=files[:1])
            assert preparation is not None
            (await preparation.prepare(request, Trace(LANGUAGE))).follow_up()
            assert not preparation._remembering and not preparation._known
            assert b'attempts_total{outcome="ok"} 1.0' in language.metrics.text()

    asyncio.run(run())
