"""Chat requests in OpenAI's format: what they ask for, and what goes back.

Every field either has its meaning or is refused by name; nothing is dropped. Beyond OpenAI's fields, a request may have
those of :class:`deepstitch.runtime.sampling.GenerationOptions` and ``"deepstitch": {"trace": true}``.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepstitch.errors import InputError, did_you_mean
from deepstitch.runtime.disaggregated.trace import Span
from deepstitch.runtime.results import Result, TokenLogprob
from deepstitch.runtime.sampling import GenerationOptions
from deepstitch.runtime.server.data_url import decode_data_url

__all__ = ["Answer", "ChatRequest", "parse_chat_request"]

_ROLES = ("system", "user", "assistant")
_MEDIA = ("image_url", "video_url")
_LIMITS = {"image_url": 1024, "video_url": 64}  # what one message between the processes may carry
_OPTIONS = tuple(field.name for field in dataclasses.fields(GenerationOptions) if field.name != "logprobs")
_OWN = (
    "messages",
    "model",
    "stream",
    "stream_options",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "deepstitch",
)
# OpenAI's fields that change nothing at these values; at others they would
_NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "store": False,
}
_FLAGS = ("ignore_eos",)
_MAX_NUMBER = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What a client asks.

    Attributes:
        messages: in chat format, with ``{"type": "image"}`` and ``{"type": "video"}`` where media go.
        images: files, in the order of their places.
        videos: likewise.
        options: of :class:`GenerationOptions`.
        model: which one the client means, if it says so.
        stream: send pieces as they come.
        include_usage: end the stream with the numbers of tokens.
        trace: tell what happened when.
    """

    messages: list[dict[str, Any]]
    images: tuple[bytes, ...]
    videos: tuple[bytes, ...]
    options: dict[str, Any]
    model: str | None
    stream: bool
    include_usage: bool
    trace: bool


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read and check a request.

    Raises:
        InputError: not JSON, an unknown field, or one that cannot be used.
    """
    fields = _fields(_json(body), (*_OWN, *_OPTIONS, *_NEUTRAL), "the request")
    for name, neutral in _NEUTRAL.items():
        if fields.pop(name, neutral) != neutral:
            raise InputError(f"{name} is not supported; leave it out")
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages: a list of at least one message is needed")
    media: dict[str, list[bytes]] = {kind: [] for kind in _MEDIA}
    plain = [_message(message, f"messages[{index}]", media) for index, message in enumerate(messages)]
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise InputError("model: a name is needed")
    stream_options = _fields(fields.get("stream_options", {}), ("include_usage",), "stream_options")
    return ChatRequest(
        messages=plain,
        images=tuple(media["image_url"]),
        videos=tuple(media["video_url"]),
        options=_options(fields),
        model=model,
        stream=_flag(fields, "stream"),
        include_usage=_flag(stream_options, "include_usage"),
        trace=_flag(_fields(fields.get("deepstitch", {}), ("trace",), "deepstitch"), "trace"),
    )


class Answer:
    """Writes the objects of one answer.

    Attributes:
        model: the name it is served under.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, result: Result, spans: Sequence[Span] | None) -> dict[str, Any]:
        """The answer in one object."""
        message = {"role": "assistant", "content": result.text}
        choice = {"index": 0, "message": message, **_ending(result)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(result), **_extra(result, spans)}

    def opening(self) -> dict[str, Any]:
        """The first event of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> dict[str, Any]:
        """The next characters."""
        return self._chunk({"content": text})

    def closing(self, result: Result, spans: Sequence[Span] | None) -> dict[str, Any]:
        """The last event with a choice: why it ended, probabilities of all tokens if wanted, and our own object."""
        return {**self._chunk({}, **_ending(result)), **_extra(result, spans)}

    def usage(self, result: Result) -> dict[str, Any]:
        """The event with the numbers of tokens."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(result)}

    def _chunk(self, delta: dict[str, Any], **ending: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": None, **ending}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model}


def _json(body: bytes) -> Any:
    import msgspec

    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"the request is not JSON: {error}") from None


def _fields(value: Any, known: Sequence[str], where: str) -> dict[str, Any]:
    """An object's fields; null is as good as left out."""
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, not {type(value).__name__}")
    for name in value:
        if name not in known:
            hint = did_you_mean(name[:60], known)
            raise InputError(f"{where} has the unknown field '{name[:60]}'{hint}; known are {', '.join(known)}")
    return {name: field for name, field in value.items() if field is not None}


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name}: use true or false, not {value!r:.60}")
    return value


def _message(message: Any, where: str, media: dict[str, list[bytes]]) -> dict[str, Any]:
    # a client that sends back what OpenAI's library gave it has these, as null
    absent = ("refusal", "annotations", "audio", "function_call", "tool_calls")
    fields = _fields(message, ("role", "content", *absent), where)
    for name in absent:
        if fields.get(name):
            raise InputError(f"{where}.{name} is not supported")
    role, content = fields.get("role"), fields.get("content")
    if role not in _ROLES:
        raise InputError(f"{where}.role is {role!r:.60}; use one of {', '.join(_ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise InputError(f"{where}.content must be a string or a list of parts")
    parts = [_part(part, f"{where}.content[{index}]", media) for index, part in enumerate(content)]
    return {"role": role, "content": parts}


def _part(part: Any, where: str, media: dict[str, list[bytes]]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = _fields(part, ("type", "text"), where).get("text")
        if not isinstance(text, str):
            raise InputError(f"{where}.text must be a string")
        return {"type": "text", "text": text}
    if kind not in _MEDIA:
        raise InputError(f"{where}.type is {kind!r:.60}; use one of text, {', '.join(_MEDIA)}")
    own = _fields(part, ("type", kind), where).get(kind)
    source = {"url": own} if isinstance(own, str) else _fields(own, ("url", "detail"), f"{where}.{kind}")
    if source.get("detail", "auto") != "auto":
        raise InputError(f"{where}.{kind}.detail is not supported; the model's own limits of size apply")
    if len(media[kind]) == _LIMITS[kind]:
        raise InputError(f"{where}: more than {_LIMITS[kind]} parts of type {kind}")
    medium = kind.removesuffix("_url")
    media[kind].append(decode_data_url(source.get("url"), medium, f"{where}.{kind}"))
    return {"type": medium}


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    """Those of :class:`GenerationOptions`, checked."""
    options = {name: fields[name] for name in _OPTIONS if name in fields}
    limit = fields.get("max_completion_tokens")  # OpenAI's newer name
    if limit is not None and options.setdefault("max_tokens", limit) != limit:
        raise InputError("max_tokens and max_completion_tokens differ; pass one of them")
    top = fields.get("top_logprobs")
    if _flag(fields, "logprobs"):
        options["logprobs"] = True if top is None else top
    elif top is not None:
        raise InputError("top_logprobs needs logprobs: true")
    for name, value in options.items():
        _check_type(name, value)
    GenerationOptions.from_keywords(options)
    return options


def _check_type(name: str, value: Any) -> None:
    """What JSON can say that Python would take for a number or a flag."""
    if name in _FLAGS and not isinstance(value, bool):
        raise InputError(f"{name}: use true or false, not {value!r:.60}")
    if name == "stop":
        if not isinstance(value, str | list):
            raise InputError("stop: use a string or a list of strings")
    elif name not in (*_FLAGS, "logprobs") and (
        isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= _MAX_NUMBER
    ):
        raise InputError(f"{name}={value!r:.60}: use a number")


def _ending(result: Result) -> dict[str, Any]:
    reason = "stop" if result.finish_reason == "stop" else "length"  # OpenAI has no word for interrupted
    ending: dict[str, Any] = {"finish_reason": reason}
    if result.logprobs is not None:
        ending["logprobs"] = {"content": [_logprob(entry) for entry in result.logprobs]}
    return ending


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    top = [_token(text, value) for _, text, value in entry.top]
    return {**_token(entry.text, entry.logprob), "top_logprobs": top}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _usage(result: Result) -> dict[str, Any]:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.generated_tokens,
        "total_tokens": result.prompt_tokens + result.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
    }


def _extra(result: Result, spans: Sequence[Span] | None) -> dict[str, Any]:
    """Our own object: all of the result, and what happened when."""
    own = result.to_dict()
    if spans is not None:
        own["spans"] = [span.to_dict() for span in spans]
    return {"deepstitch": own}
