"""What a chat request may say, and what is said back."""

from __future__ import annotations

import json
import re

import pytest

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.trace import Span
from deepstitch.runtime.server.openai import Answer, parse_chat_request

from .fake_language import ASK, LOGPROBS, PICTURE, result


def parse(**fields):
    return parse_chat_request(json.dumps({**ASK, **fields}).encode())


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def picture(url=PICTURE, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def test_text_alone():
    asked = parse()
    assert asked.messages == [{"role": "user", "content": "what?"}]
    assert (asked.images, asked.videos, asked.options, asked.model) == ((), (), {}, None)
    assert not (asked.stream or asked.include_usage or asked.trace)


def test_media_become_bytes_in_their_order():
    clip = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,Y2xpcA=="}}
    text = {"type": "text", "text": "compare"}
    other = {"type": "image_url", "image_url": "data:image/jpeg;base64,b3RoZXI="}  # the short form
    asked = parse(messages=[{"role": "system", "content": "short"}, *user(picture(detail="auto"), clip, text, other)])
    assert asked.messages == [
        {"role": "system", "content": "short"},
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, text, {"type": "image"}]},
    ]
    assert asked.images == (b"\x89PNG\r\n\x1a\n", b"other") and asked.videos == (b"clip",)


def test_options_of_openai_and_ours():
    asked = parse(
        max_completion_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop="x", logprobs=True, top_logprobs=2,
        top_k=4, min_p=0.1, repetition_penalty=1.1, speculate=3, prefill_chunk=0, n=1, tools=[],
    )  # fmt: skip
    assert asked.options == {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x", "logprobs": 2,
        "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "speculate": 3, "prefill_chunk": 0,
    }  # fmt: skip


def test_null_is_as_good_as_left_out():
    assert parse(seed=None, stop=None, logprobs=None, stream=None, n=None, model=None) == parse()


def test_a_message_as_the_library_gave_it_can_be_sent_back():
    given = {"role": "assistant", "content": "two", "refusal": None, "tool_calls": None, "audio": None}
    asked = parse(messages=[ASK["messages"][0], given, {"role": "user", "content": "sure?"}])
    assert asked.messages[1] == {"role": "assistant", "content": "two"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 1}, "unknown field 'temprature' (did you mean 'temperature'?)"),
        ({"n": 2}, "n is not supported"),
        ({"tools": [{}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "tool_calls is not supported"),
        ({"messages": [{"role": "user", "content": "x", "nmae": "y"}]}, "unknown field 'nmae'"),
        ({"messages": user({"type": "image", "image": "/etc/passwd"})}, "type is 'image'"),
        ({"messages": user(picture("https://example.org/x.png"))}, "an address (https:…); this server fetches"),
        ({"messages": user(picture("file:///etc/passwd"))}, "an address (file:…)"),
        ({"messages": user(picture("/etc/passwd"))}, "no data: URL"),
        ({"messages": user(picture("data:text/plain;base64,eA=="))}, "is no image"),
        ({"messages": user(picture("data:image/png,eA=="))}, "must be base64"),
        ({"messages": user(picture("data:image/png;base64,e*"))}, "not valid base64"),
        ({"messages": user(picture("data:image/png;base64,"))}, "the image is empty"),
        ({"messages": user(picture(detail="high"))}, "detail is not supported"),
        ({"messages": user(picture(size="high"))}, "unknown field 'size'"),
        ({"messages": user({"type": "text", "text": None})}, "text must be a string"),
        ({"messages": user(*[picture("data:image/png;base64,eA==")] * 1025)}, "more than 1024"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": True}, "max_tokens=True: use a number"),
        ({"max_tokens": "8"}, "max_tokens='8': use a number"),
        ({"max_tokens": 8, "max_completion_tokens": 9}, "differ"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": [1]}, "temperature=[1]: use a number"),
        ({"top_p": 10**30}, "use a number"),
        ({"stop": {"a": 1}}, "stop: use a string"),
        ({"stop": [""]}, "stop="),
        ({"stop": [3]}, "stop="),
        ({"ignore_eos": 1}, "ignore_eos: use true or false"),
        ({"logprobs": 3}, "logprobs: use true or false"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "logprobs=-1"),
        ({"logprobs": True, "top_logprobs": "all"}, "logprobs='all'"),
        ({"stream": "yes"}, "stream: use true or false"),
        ({"stream_options": {"usage": True}}, "unknown field 'usage'"),
        ({"deepstitch": {"traces": True}}, "did you mean 'trace'"),
        ({"model": 5}, "model: a name"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse(**fields)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b'{"a": 1} x', b"null"],
)
def test_what_is_not_json_is_refused(body):
    with pytest.raises(InputError):
        parse_chat_request(body)


def test_messages_do_not_repeat_a_long_value():
    for fields in (
        {"x" * 10_000: 1},
        {"temperature": "y" * 10_000},
        {"model": None, "messages": user(picture("z" * 9999))},
    ):
        with pytest.raises(InputError) as refused:
            parse(**fields)
        assert len(str(refused.value)) < 900


def test_the_whole_answer():
    whole = Answer("tiny").whole(result("twö", logprobs=LOGPROBS), [Span("client", "x", 1.0, 2.0)])
    (choice,) = whole["choices"]
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny" and whole["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": "twö"} and choice["finish_reason"] == "stop"
    (entry,) = choice["logprobs"]["content"]
    assert entry["token"] == "é" and entry["bytes"] == [0xC3, 0xA9] and entry["logprob"] == -0.5
    assert [each["token"] for each in entry["top_logprobs"]] == ["é", "x"]
    assert whole["usage"]["total_tokens"] == 14
    own = whole["deepstitch"]
    assert own["spans"] == [{"process": "client", "name": "x", "begin": 1.0, "end": 2.0, "detail": {}}]
    assert {**own, "spans": None} == {**result("twö", logprobs=LOGPROBS).to_dict(), "spans": None}


@pytest.mark.parametrize(("ours", "openai"), [("stop", "stop"), ("length", "length"), ("interrupted", "length")])
def test_reasons_to_end(ours, openai):
    whole = Answer("tiny").whole(result("x", finish_reason=ours), None)
    assert whole["choices"][0]["finish_reason"] == openai
    assert whole["deepstitch"]["finish_reason"] == ours and "spans" not in whole["deepstitch"]
