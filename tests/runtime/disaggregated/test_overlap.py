"""What happens while the vision encoder or the decoder works: sizes go ahead of the rows, the release after them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from deepstitch.runtime.disaggregated import reception
from deepstitch.runtime.disaggregated.channel import Caller
from deepstitch.runtime.disaggregated.conn_multimodal import link, sender
from deepstitch.runtime.disaggregated.errors import PeerLost
from deepstitch.runtime.disaggregated.messages import Release
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.reception import Request
from deepstitch.runtime.disaggregated.states import SenderState
from deepstitch.runtime.disaggregated.trace import LANGUAGE, Trace
from deepstitch.runtime.pipeline import Pipeline

from .pair import ask, conversation, pair, png, same, soon


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


def test_blocks_are_found_while_a_picture_is_encoded(plain_bundle: Path, files: list[bytes], wanted: Any) -> None:
    async def run() -> Any:
        async with pair(plain_bundle) as (encode, language):
            go_on = threading.Event()
            held_up(encode, go_on)
            asked = asyncio.create_task(ask(language, "what is it?", files[:1]))
            assert await soon(lambda: not language.pool.idle)
            (room,) = encode._rooms.values()
            assert room.machine.state is SenderState.BOOTSTRAPPING and encode.pool.idle
            await asyncio.sleep(1.2)  # long enough for Pending
            go_on.set()
            return await asked

    assert same(asyncio.run(run()), wanted)


def test_an_encoder_that_fails_when_it_has_told_the_sizes(plain_bundle: Path, files: list[bytes], wanted: Any) -> None:
    async def run() -> Any:
        async with pair(plain_bundle) as (encode, language):
            go_on = threading.Event()
            held_up(encode, go_on, fails=1)
            asked = asyncio.create_task(ask(language, "what is it?", files[:1]))
            assert await soon(lambda: not language.pool.idle)
            go_on.set()
            answer = await asked
            assert b'attempts_total{outcome="encode_failed"} 1.0' in language.metrics.text()
            return answer

    assert same(asyncio.run(run()), wanted)


def test_a_client_that_goes_away_while_its_picture_is_encoded(plain_bundle: Path, files: list[bytes]) -> None:
    async def run() -> None:
        async with pair(plain_bundle) as (encode, language):
            go_on = threading.Event()
            held_up(encode, go_on)
            asked = asyncio.create_task(ask(language, "what is it?", files[:1]))
            assert await soon(lambda: not language.pool.idle)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            assert await soon(lambda: language.pool.idle and not encode._rooms)
            go_on.set()

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
