"""The language process by itself: who has its turn, what it takes from an encode process, and what it does then."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepstitch.errors import InputError
from deepstitch.manifest import MANIFEST_NAME
from deepstitch.runtime.answer import Piece
from deepstitch.runtime.disaggregated import encoders, multimodal_language, reception
from deepstitch.runtime.disaggregated.config import Address, PoolConfig
from deepstitch.runtime.disaggregated.decoding import DecoderLoop
from deepstitch.runtime.disaggregated.errors import (
    DisaggregationError,
    HandshakeRefused,
    PeerBusy,
    PeerLost,
    ProtocolError,
    RequestRefused,
    RequestTooLarge,
)
from deepstitch.runtime.disaggregated.framing import REQUEST_LIMIT
from deepstitch.runtime.disaggregated.messages import decode, encode
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.disaggregated.reception import Request
from deepstitch.runtime.results import Result
from deepstitch.runtime.stream import TextStream

from .pair import ask, encode_config, language_config, pair, png, running, same, soon

NOBODY = Address.parse("unix:/nonexistent/encode.sock")


@pytest.fixture(scope="module")
def files(pictures: Any) -> list[bytes]:
    return [png(each) for each in pictures]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A socket file's path takes 108 bytes at most; pytest's folders are longer."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def answer(texts: Any, pause: float = 0.0) -> TextStream:
    """A stream whose tokens have these texts."""

    class Written:
        def turns(self) -> Iterator[Piece]:
            for text in texts:
                time.sleep(pause)
                yield Piece(0, 1, text)

        def result(self) -> Any:
            return Result(
                text="",
                token_ids=(),
                prompt_tokens=1,
                cached_tokens=0,
                visual_tokens=0,
                finish_reason="stop",
                timings={},
            )

    written: Any = Written()
    return TextStream(written, lambda result: result)


def silence() -> Iterator[str]:
    """Tokens without text, such as all that come after the end of an answer; a million so that a failure ends."""
    return iter([""] * 1_000_000)


async def read(events: Any) -> list[Any]:
    return [event async for event in events]


# The decoder


def test_tokens_without_text_are_turns_too() -> None:
    async def run() -> list[Any]:
        loop = DecoderLoop(2)
        silent = asyncio.create_task(read(loop.run(lambda: answer(silence(), 1e-4))))
        await asyncio.sleep(0.05)
        spoken = await asyncio.wait_for(read(loop.run(lambda: answer(["a", "", "b"]))), 5)
        assert not silent.done()
        await asyncio.wait_for(loop.close(), 5)
        assert isinstance((await asyncio.gather(silent, return_exceptions=True))[0], PeerLost)
        return spoken

    assert asyncio.run(run())[:2] == ["a", "b"]


def test_a_silent_answer_can_be_cancelled() -> None:
    async def run() -> None:
        loop = DecoderLoop(1)
        silent = asyncio.create_task(read(loop.run(lambda: answer(silence(), 1e-4))))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(read(loop.run(lambda: answer(["a"]))))
        await asyncio.sleep(0.05)
        assert loop.waiting == 1
        silent.cancel()
        await asyncio.wait_for(waiting, 5)
        assert loop.waiting == 0
        await loop.close()

    asyncio.run(run())


def test_a_long_prompt_does_not_hold_up_others(plain_bundle: Path) -> None:
    """The long one is asked first, and takes many chunks; the short one has ended before it says anything."""

    async def run() -> None:
        async with running(LanguageServer(language_config(plain_bundle, NOBODY))) as language:
            order: list[str] = []

            async def named(name: str, text: str, **options: Any) -> Result:
                result = await ask(language, text, max_tokens=2, **options)
                order.append(name)
                return result

            prompt, slowly = "left of the circle " * 150, {"prefill_chunk": 1}
            long = asyncio.create_task(named("long", prompt, **slowly))
            while not language._decoder.steps:
                await asyncio.sleep(0.001)
            short = await named("short", "hello")
            assert order == ["short"]
            assert same(await long, await ask(language, prompt, max_tokens=2, **slowly))
            assert same(short, await ask(language, "hello", max_tokens=2))

    asyncio.run(run())


def test_a_busy_decoder_is_healthy(plain_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multimodal_language, "_HEALTH_SECONDS", 1.0)

    async def run() -> None:
        async with running(LanguageServer(language_config(plain_bundle, NOBODY, max_running=1))) as language:
            assert language._decoder is not None
            await language.check()
            busy = asyncio.create_task(read(language._decoder.run(lambda: answer(silence(), 1e-3))))
            await asyncio.sleep(0.05)
            await language.check()
            stuck = threading.Event()
            blocked = asyncio.create_task(read(language._decoder.run(lambda: stuck.wait(20) and answer([]))))
            busy.cancel()  # now the blocked one has its turn, which does not end
            await asyncio.sleep(0.05)
            with pytest.raises(DisaggregationError, match="took more than 1 s"):
                await language.check()
            stuck.set()
            await blocked

    asyncio.run(run())


# Requests


def test_text_is_sent_as_it_is() -> None:
    message = reception._encode_request(Request(messages=[{"role": "user", "content": "é" * 1000 + "\ud800"}]))
    assert len(message.messages) < 2100
    assert decode(encode(message)) == message


def test_what_an_encode_process_would_not_read_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**request: Any) -> None:
        with pytest.raises(RequestTooLarge, match="an encode process takes"):
            reception._encode_request(Request(**{"messages": "", **request}))

    whole = reception._encode_request(Request(messages="", images=[b""] * 1024, videos=[b""] * 64))
    decode(encode(whole))
    for name, most in (("images", 1024), ("videos", 64)):
        refused(**{name: [b""] * (most + 1)})
        with pytest.raises(ProtocolError):
            decode(encode(msgspec.structs.replace(whole, **{name: (b"",) * (most + 1)})))
    picture = b"0" * (16 << 20)
    refused(images=[picture] * (REQUEST_LIMIT // len(picture)))
    monkeypatch.setattr(reception, "_MAX_TEXT", 1000)
    refused(messages="x" * 1000)


def test_one_too_large_request_leaves_the_others_alone(
    plain_bundle: Path, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with pair(plain_bundle) as (_, language):
            (link,) = language._encoders.connected.values()
            monkeypatch.setattr(reception, "_MAX_BYTES", len(files[0]))
            with pytest.raises(RequestTooLarge):
                await ask(language, "é" * 1000, [files[0]])
            monkeypatch.undo()
            await ask(language, "what is it?", [files[0]])
            assert list(language._encoders.connected.values()) == [link]

    asyncio.run(run())


def test_no_file_is_opened_for_a_client(plain_bundle: Path, files: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(files[0])
    messages = [{"role": "user", "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": "what?"}]}]

    async def run() -> None:
        config = language_config(plain_bundle, NOBODY, local_encoder=True)
        async with running(LanguageServer(config)) as language:
            with pytest.raises(RequestRefused, match="sent as bytes"):
                await read(language.answer(messages))

    asyncio.run(run())


def test_known_pictures_may_be_forgotten_at_any_time(plain_bundle: Path, files: list[bytes]) -> None:
    async def run() -> None:
        async with pair(plain_bundle) as (_, language):
            await ask(language, "what is it?", [files[0]])
            pictures, cache = language._reception._pictures, language._parts.encoder
            work = pictures.run

            async def forgetful(job: Any) -> Any:
                try:
                    return await work(job)
                finally:
                    cache.clear()

            pictures.run = forgetful
            await ask(language, "what is it?", [files[0]])
            await ask(language, "what is it?", [files[0]])

    asyncio.run(run())


def test_text_is_admitted_apart_from_pictures(plain_bundle: Path, files: list[bytes]) -> None:
    async def run() -> None:
        async with running(LanguageServer(language_config(plain_bundle, NOBODY, max_requests=1))) as language:
            waiting = asyncio.create_task(ask(language, "what is it?", [files[0]]))
            await asyncio.sleep(0.1)
            with pytest.raises(PeerBusy):
                await ask(language, "what is it?", [files[0]])
            await ask(language, "left or right?")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize("rescue", ["another", "local"])
def test_one_encode_process_that_is_too_small_is_not_the_last_word(
    plain_bundle: Path, files: list[bytes], folder: Path, rescue: str
) -> None:
    small = {"pool": PoolConfig(block_tokens=4, blocks=64, deepstack_blocks=1)}

    async def run() -> None:
        for name in "ab":
            (folder / name).mkdir()
        servers = [EncodeServer(encode_config(plain_bundle, "shm", str(folder / "a"), **small))]
        servers.append(EncodeServer(encode_config(plain_bundle, "shm", str(folder / "b"))))
        async with running(servers[0]), running(servers[1]):
            addresses = [each.address for each in servers[: 2 if rescue == "another" else 1]]
            config = language_config(plain_bundle, *addresses, local_encoder=rescue == "local")
            async with running(LanguageServer(config)) as language:
                await asyncio.gather(*[ask(language, "what is it?", [files[3]]) for _ in range(2)])

    asyncio.run(run())


def test_more_blocks_at_once_than_there_are(plain_bundle: Path, files: list[bytes]) -> None:
    pool = PoolConfig(block_tokens=4, blocks=8, deepstack_blocks=32, first_blocks=100)

    async def run() -> None:
        async with pair(plain_bundle, language={"pool": pool}) as (_, language):
            result = await ask(language, "left of the circle " * 10, [files[0]])
            assert result.prompt_tokens > 32

    asyncio.run(run())


def test_an_announcement_without_times(plain_bundle: Path, files: list[bytes], folder: Path) -> None:
    class Timeless(EncodeServer):
        async def reply_to(self, peer: str, message: Any) -> Any:
            reply = await super().reply_to(peer, message)
            return msgspec.structs.replace(reply, seconds={}) if hasattr(reply, "seconds") else reply

    async def run() -> None:
        async with (
            running(Timeless(encode_config(plain_bundle, "shm", str(folder)))) as server,
            running(LanguageServer(language_config(plain_bundle, server.address))) as language,
        ):
            assert (await ask(language, "what is it?", [files[0]])).timings["encode"] == 0

    asyncio.run(run())


def test_a_bundle_without_vision_has_no_use_for_encode_processes(plain_bundle: Path, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    blind.mkdir()
    for file in plain_bundle.iterdir():
        (blind / file.name).symlink_to(file)
    manifest = msgspec.json.decode((blind / MANIFEST_NAME).read_bytes())
    (blind / MANIFEST_NAME).unlink()
    (blind / MANIFEST_NAME).write_bytes(msgspec.json.encode({**manifest, "vision": None}))
    with pytest.raises(InputError, match="nothing of pictures"):
        asyncio.run(LanguageServer(language_config(blind, NOBODY)).start())


# Encode processes


def refused(config: Any, text: str) -> None:
    async def run() -> None:
        server = LanguageServer(config)
        with pytest.raises(HandshakeRefused, match=text):
            await asyncio.wait_for(server.start(), 10)

    asyncio.run(run())


def test_an_address_nobody_can_have_is_refused(plain_bundle: Path) -> None:
    with pytest.raises(InputError):
        Address.parse("tcp://host:²")
    refused(language_config(plain_bundle, Address.parse("tcp://a..b:7000")), "no address to connect to")


def test_a_transport_that_fails_in_its_own_way_is_refused(plain_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the engine does not start")

    monkeypatch.setattr(encoders.Link, "open", broken)
    refused(language_config(plain_bundle, NOBODY), "the engine does not start")


def test_messages_and_connections_are_counted(plain_bundle: Path, files: list[bytes]) -> None:
    async def run() -> None:
        async with pair(plain_bundle) as (encode, language):

            def shown(server: Any, what: str) -> float:
                lines = server.metrics.text().decode().splitlines()
                return sum(float(line.split()[-1]) for line in lines if line.startswith(f"deepstitch_{what}"))

            assert shown(language, "connections ") == 1
            before = shown(language, "messages_total")
            await ask(language, "what is it?", [files[0]])
            assert await soon(lambda: language.idle)
            assert shown(language, "messages_total") >= before + 6
            for here, there in (("in", "out"), ("out", "in")):
                counts = (
                    shown(language, f'messages_total{{direction="{here}"}}'),
                    shown(encode, f'messages_total{{direction="{there}"}}'),
                )
                assert counts[0] == counts[1] > 0
            await encode.stop()
            while language._encoders.connected:
                await asyncio.sleep(0.01)
            assert shown(language, "connections ") == 0

    asyncio.run(run())


def test_an_address_that_leaves_and_comes_back_is_shown(plain_bundle: Path) -> None:
    async def run() -> None:
        async with pair(plain_bundle) as (encode, language):
            known = language._encoders
            known._follow(())
            known._follow((encode.address,))  # the earlier link is still being closed
            await asyncio.sleep(0.3)
            assert f'encoder_up{{address="{encode.address}"}} 1.0' in language.metrics.text().decode()
            known._follow(())
            await asyncio.sleep(0)
            await known.stop()
            assert not known._tasks and len(known._scratch) == encoders.MAX_ENCODERS

    asyncio.run(run())
