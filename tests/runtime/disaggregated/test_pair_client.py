"""The client of a local pair: what it asks, what it makes of the answer."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import pytest

from deepstitch.errors import DeepstitchError, InputError
from deepstitch.runtime.disaggregated.errors import PeerBusy, PeerLost, RequestRefused
from deepstitch.runtime.disaggregated.pair_client import PairStream, chat_request, result_of
from deepstitch.runtime.disaggregated.trace import CLIENT, draw
from deepstitch.runtime.sampling import GenerationOptions
from deepstitch.runtime.server.openai import parse_chat_request

from ..server.fake_language import LOGPROBS, FakeLanguage, result

MESSAGES = [{"role": "system", "content": "short"}, {"role": "user", "content": "what?"}]


@contextmanager
def listening(fake: FakeLanguage, path):
    """The fake behind a socket file, in a thread."""
    from deepstitch.runtime.server.chat import Chat
    from deepstitch.runtime.server.http import HttpServer, parse_listen

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    chat = Chat(fake, model="tiny", max_body_bytes=1 << 20)
    http = HttpServer(parse_listen(f"unix:{path}"), check=fake.check, metrics=fake.metrics, token="", chat=chat)
    asyncio.run_coroutine_threadsafe(http.start(), loop).result(5)
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(http.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def stream(path, *, trace: bool = False, dead: str | None = None) -> PairStream:
    request = chat_request(MESSAGES, [], [], {"max_tokens": 3}, trace=trace)
    return PairStream(str(path), request, load_seconds=4.5, explain=lambda: dead)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "h"


def test_every_option_of_a_run_arrives():
    options = {
        "max_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2,
        "seed": 4, "stop": ("x", "y"), "prefill_chunk": 7, "speculate": 2, "speculate_ngram": 4, "logprobs": 2,
    }  # fmt: skip
    asked = parse_chat_request(chat_request(MESSAGES, [], [], options, trace=True))
    assert GenerationOptions.from_keywords(asked.options) == GenerationOptions.from_keywords(options)
    assert asked.messages == MESSAGES and asked.stream and asked.trace


@pytest.mark.parametrize("logprobs", [False, True, 0, 3])
def test_logprobs_keep_their_meaning(logprobs):
    asked = parse_chat_request(chat_request(MESSAGES, [], [], {"logprobs": logprobs, "seed": None}, trace=False))
    chosen = GenerationOptions.from_keywords(asked.options)
    assert chosen.num_top_logprobs == GenerationOptions(logprobs=logprobs).num_top_logprobs


def test_files_take_the_places_of_their_parts(tmp_path):
    for name in ("a.jpg", "b.dat", "c.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    content = [{"type": "image"}, {"type": "video"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    images, videos = [tmp_path / "a.jpg", tmp_path / "b.dat"], [tmp_path / "c.mp4"]
    request = chat_request([{"role": "user", "content": content}], images, videos, {}, trace=False)
    asked = parse_chat_request(request)
    assert asked.images == (b"a.jpg", b"b.dat") and asked.videos == (b"c.mp4",)
    assert asked.messages[0]["content"] == content
    assert b"data:image/jpeg;" in request and b"data:image/unknown;" in request


@pytest.mark.parametrize(("make", "reason"), [(None, "no such file"), (b"", "is empty"), ("folder", "directory")])
def test_files_that_cannot_be_read(tmp_path, make, reason):
    path = tmp_path / "x.png"
    if make == "folder":
        path.mkdir()
    elif make is not None:
        path.write_bytes(make)
    with pytest.raises(InputError, match=rf"image 1 \('.*x\.png'\): .*{reason}"):
        chat_request([{"role": "user", "content": [{"type": "image"}]}], [path], [], {}, trace=False)


@pytest.mark.parametrize("logprobs", [None, LOGPROBS])
def test_a_result_survives_the_way(logprobs):
    sent = result("twö", logprobs=logprobs, drafted_tokens=4, accepted_tokens=2, finish_reason="length")
    assert result_of(json.loads(json.dumps(sent.to_dict()))) == sent


def test_pieces_then_the_result(path):
    with listening(FakeLanguage(), path):
        answer = stream(path)
        assert list(answer) == ["two ", "squares"] and answer.begun
        assert answer.result.text == "two squares" and answer.spans == []
        assert answer.result.timings["load"] == 4.5 and answer.result.timings["transfer"] == 0.3
        answer.close()


def test_the_result_alone(path):
    with listening(FakeLanguage(), path):
        answer = stream(path, trace=True)
        assert answer.result.text == "two squares"
        names = {(span.process, span.name) for span in answer.spans}
        assert {(CLIENT, "request"), (CLIENT, "first text"), ("encode process", "encode")} <= names
        assert draw(answer.spans).startswith("<svg")
        answer.close()


@pytest.mark.parametrize("error", [InputError("bad"), RequestRefused("bad"), PeerBusy("full"), DeepstitchError("odd")])
@pytest.mark.parametrize("before", [(), ("two ",)])
def test_errors_keep_their_kind(path, error, before):
    with listening(FakeLanguage(*before, error), path):
        answer = stream(path)
        with pytest.raises(type(error), match=str(error)):
            list(answer)
        answer.close()


def test_who_died_is_said_instead_of_what_followed_from_it(path):
    with listening(FakeLanguage(PeerLost("the connection ended")), path):
        answer = stream(path, dead="the encode process ended (signal SIGKILL)")
        with pytest.raises(PeerLost, match="SIGKILL"):
            list(answer)
        answer.close()


def test_nobody_listens(path):
    with pytest.raises(PeerLost, match="broke"):
        list(stream(path))
    with pytest.raises(PeerLost, match="it ended"):
        list(stream(path, dead="it ended"))


def test_a_wait_can_be_ended_from_outside(path):
    fake = FakeLanguage("one", 30.0)
    with listening(fake, path):
        answer = stream(path)
        assert next(answer) == "one"
        threading.Timer(0.1, answer.interrupt).start()
        began = time.monotonic()
        with pytest.raises(PeerLost):
            next(answer)
        assert time.monotonic() - began < 5
        answer.close()
    assert fake.ended == 1


def test_hanging_up_ends_the_request(path):
    fake = FakeLanguage("one", 30.0)
    with listening(fake, path):
        answer = stream(path)
        next(answer)
        answer.close()
        for _ in range(100):
            if fake.ended:
                break
            time.sleep(0.02)
        assert fake.ended == 1
