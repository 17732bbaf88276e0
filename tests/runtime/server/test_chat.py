"""Chat requests over HTTP: answers whole and in pieces, refusals, clients that leave."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

import aiohttp
import pytest

from deepstitch.errors import BundleError, InputError
from deepstitch.runtime.disaggregated import errors

from .fake_language import ASK, LOGPROBS, FakeLanguage, result, serving

PATH = "/v1/chat/completions"


def ask(fake: FakeLanguage, body=ASK, **options):
    """Status, headers and body of one request."""

    async def run():
        async with serving(fake, **options) as client:
            sent = (
                {"json": body}
                if isinstance(body, dict)
                else {"data": body, "headers": {"Content-Type": "application/json"}}
            )
            async with client.post(PATH, **sent) as response:
                return response.status, response.headers, await response.text()

    return asyncio.run(run())


def events(text: str) -> list:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_a_whole_answer():
    fake = FakeLanguage(logprobs=LOGPROBS)
    status, _, text = ask(fake, {**ASK, "max_tokens": 9, "model": "tiny"})
    answer = json.loads(text)
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "two squares"
    assert answer["deepstitch"] == json.loads(json.dumps(result("two squares", logprobs=LOGPROBS).to_dict()))
    assert fake.asked == [(ASK["messages"], (), (), {"max_tokens": 9})] and fake.ended == 0


def test_an_answer_in_pieces():
    fake = FakeLanguage()
    status, headers, text = ask(fake, {**ASK, "stream": True, "stream_options": {"include_usage": True}})
    opening, *pieces, closing, usage, done = events(text)
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [each["choices"][0]["delta"]["content"] for each in pieces] == ["two ", "squares"]
    assert all(each["choices"][0]["finish_reason"] is None for each in (opening, *pieces))
    assert closing["choices"][0]["finish_reason"] == "stop" and closing["deepstitch"]["text"] == "two squares"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert done == "[DONE]" and fake.ended == 0
    assert len({each["id"] for each in (opening, *pieces, closing, usage)}) == 1


def test_an_empty_answer_streams_too():
    *_, closing, done = events(ask(FakeLanguage(""), {**ASK, "stream": True})[2])
    assert closing["deepstitch"]["text"] == "" and done == "[DONE]"


def test_pieces_come_when_they_are_written():
    async def run():
        async with (
            serving(FakeLanguage("one", 5.0, "two")) as client,
            client.post(PATH, json={**ASK, "stream": True}) as response,
        ):
            seen = b""
            while b'"one"' not in seen:
                seen += await asyncio.wait_for(response.content.readany(), 2)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_spans_are_told_to_those_who_ask(stream):
    text = ask(FakeLanguage(), {**ASK, "stream": stream, "deepstitch": {"trace": True}})[2]
    own = (events(text)[-2] if stream else json.loads(text))["deepstitch"]
    assert [span["name"] for span in own["spans"]] == ["receive request", "parse request", "encode"]
    assert own["spans"][2]["process"] == "encode process"
    assert own["spans"][0]["detail"]["bytes"] > 0


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InputError("bad picture"), 400, "invalid_request"),
        (errors.RequestRefused("bad picture"), 400, "refused"),
        (errors.RequestTooLarge("too many blocks"), 400, "too_large"),
        (errors.PeerBusy("full"), 503, "busy"),
        (errors.NoEncoder("none"), 503, "no_encoder"),
        (errors.PeerLost("gone"), 502, "peer_lost"),
        (errors.PeerHung("silent"), 502, "peer_hung"),
        (errors.DeadlineExceeded("late"), 504, "deadline"),
        (errors.TransferCorrupt("bits"), 500, "corrupt"),
        (BundleError("edited"), 500, "failed"),
        (ZeroDivisionError("secret detail"), 500, "internal"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_a_status_and_a_code(error, status, code, stream):
    found, headers, text = ask(FakeLanguage(error), {**ASK, "stream": stream})
    told = json.loads(text)["error"]
    assert (found, told["code"]) == (status, code)
    assert told["type"] == ("invalid_request_error" if status == 400 else "server_error")
    assert (headers.get("Retry-After") == "1") == (status == 503)
    assert ("secret" in text) is False and (str(error) in text) is not isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize(
    ("error", "code"), [(errors.PeerLost("gone"), "peer_lost"), (ValueError("secret"), "internal")]
)
def test_an_error_in_mid_stream_is_told_and_the_end_is_not_marked(error, code):
    status, _, text = ask(FakeLanguage("two ", error), {**ASK, "stream": True})
    *_, last = events(text)
    assert status == 200 and last["error"]["code"] == code
    assert "[DONE]" not in text and "secret" not in text


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_request"),
        ({**ASK, "bogus": 1}, 400, "invalid_request"),
        ({**ASK, "model": "gpt-4"}, 404, "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, 413, "too_large"),
    ],
)
def test_refused_requests_do_not_reach_the_model(body, status, code):
    fake = FakeLanguage()
    found, _, text = ask(fake, body)
    assert (found, json.loads(text)["error"]["code"]) == (status, code)
    assert fake.asked == []


def test_a_body_of_unknown_length_is_limited_too():
    async def endless():
        while True:
            yield b"x" * 65536

    async def run():
        async with serving(FakeLanguage()) as client:
            headers = {"Content-Type": "application/json"}
            async with client.post(PATH, data=endless(), headers=headers) as response:
                return response.status

    with suppress(aiohttp.ClientConnectionError, ConnectionError):  # cut off while it was still sending: as good
        assert asyncio.run(run()) == 413


def test_a_page_of_a_browser_cannot_ask():
    """It may send plain text to any server without asking, but not JSON."""

    async def run():
        plain = {"data": json.dumps(ASK), "headers": {"Content-Type": "text/plain"}}
        async with serving(FakeLanguage()) as client, client.post(PATH, **plain) as response:
            return response.status

    assert asyncio.run(run()) == 415


def test_bodies_do_not_fill_the_memory():
    """Eight of the largest size are in work; the ninth is told to come back, and may when one has ended."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 900}]})

    async def run():
        async with serving(FakeLanguage(0.5, "x"), max_body=1000) as client:
            headers = {"Content-Type": "application/json"}

            async def post():
                async with client.post(PATH, data=body, headers=headers) as response:
                    return response.status

            first = [asyncio.create_task(post()) for _ in range(8)]
            await asyncio.sleep(0.2)
            busy = await post()
            return busy, await asyncio.gather(*first), await post()

    assert asyncio.run(run()) == (503, [200] * 8, 200)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pieces", [(30.0, "late"), ("early", 30.0)])
def test_a_client_that_leaves_ends_its_request(stream, pieces):
    fake = FakeLanguage(*pieces)

    async def run():
        async with serving(fake) as client:
            with pytest.raises(asyncio.TimeoutError):
                timeout = aiohttp.ClientTimeout(total=0.3)
                async with client.post(PATH, json={**ASK, "stream": stream}, timeout=timeout) as response:
                    await response.read()
            for _ in range(100):
                if fake.ended:
                    break
                await asyncio.sleep(0.02)
            return fake.ended  # by the client, not by the end of the server

    assert asyncio.run(run()) == 1


def test_the_model_is_listed():
    async def run():
        async with serving(FakeLanguage()) as client, client.get("/v1/models") as response:
            return await response.json()

    listed = asyncio.run(run())
    assert [each["id"] for each in listed["data"]] == ["tiny"]


def test_requests_do_not_wait_for_each_other():
    async def run():
        fake = FakeLanguage(0.3, "x")
        async with serving(fake) as client:

            async def post():
                async with client.post(PATH, json=ASK) as response:
                    return response.status

            began = asyncio.get_running_loop().time()
            statuses = await asyncio.gather(*(post() for _ in range(20)))
            return statuses, asyncio.get_running_loop().time() - began

    statuses, seconds = asyncio.run(run())
    assert statuses == [200] * 20 and seconds < 3
