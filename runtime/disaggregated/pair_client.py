"""The client's side of a local pair: writes a chat request, reads the answer as it comes."""

from __future__ import annotations

import http.client
import json
import mimetypes
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepstitch.errors import DeepstitchError, InputError
from deepstitch.runtime.disaggregated.errors import PeerLost
from deepstitch.runtime.disaggregated.trace import CLIENT, Span
from deepstitch.runtime.results import Result, TokenLogprob
from deepstitch.runtime.server.data_url import data_url
from deepstitch.runtime.server.refusals import error_of

__all__ = ["PairStream", "chat_request", "result_of"]


def chat_request(
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Path],
    videos: Sequence[Path],
    options: Mapping[str, Any],
    *,
    trace: bool,
) -> bytes:
    """A request for the chat interface.

    Args:
        messages: in chat format, with a part ``{"type": "image"}`` or ``{"type": "video"}`` for each file.
        images: files, in the order of their parts.
        videos: likewise.
        options: of :class:`deepstitch.runtime.sampling.GenerationOptions`.
        trace: ask what happened when.

    Raises:
        InputError: a file cannot be read.
    """
    media = {
        "image": (_read(path, "image", index) for index, path in enumerate(images)),
        "video": (_read(path, "video", index) for index, path in enumerate(videos)),
    }
    fields = {name: value for name, value in options.items() if value is not None and name != "logprobs"}
    count = options.get("logprobs", False)
    if count is not False:
        fields |= {"logprobs": True} | ({} if count is True else {"top_logprobs": count})
    asked = {
        "messages": [_message(message, media) for message in messages],
        **fields,
        "stream": True,
        "deepstitch": {"trace": trace},
    }
    return json.dumps(asked).encode()


class PairStream(Iterator[str]):
    """Iterate for pieces of text; joined, they are the text of :attr:`result`.

    Attributes:
        begun: a piece has come.
        spans: what happened when, here and in both processes, if that was asked for; complete with the result.
    """

    def __init__(self, path: str, request: bytes, *, load_seconds: float, explain: Callable[[], str | None]) -> None:
        """Nothing is sent before the first piece is asked for.

        Args:
            path: of the socket.
            request: from :func:`chat_request`.
            load_seconds: for the timings of the result.
            explain: may know why a connection broke.
        """
        self.begun = False
        self.spans: list[Span] = []
        self._explain = explain
        self._load_seconds = load_seconds
        self._request: bytes | None = request
        self._connection = _UnixConnection(path)
        self._response: http.client.HTTPResponse | None = None
        self._result: Result | None = None
        self._began = self._first = time.monotonic()

    def __next__(self) -> str:
        """The next piece.

        Raises:
            DeepstitchError: the request was refused or failed, or a process died.
        """
        while self._result is None:
            try:
                event = self._event()
            except (OSError, http.client.HTTPException) as error:
                raise self._broken(error) from error
            if "error" in event:
                raise self._failure(error_of(500, event), 500)
            if "deepstitch" in event:
                self._finish(event["deepstitch"])
            elif text := event["choices"][0]["delta"].get("content"):
                if not self.begun:
                    self.begun, self._first = True, time.monotonic()
                return str(text)
        raise StopIteration

    @property
    def result(self) -> Result:
        """The whole answer; what has not come yet is waited for."""
        for _ in self:
            pass
        assert self._result is not None
        return self._result

    def interrupt(self) -> None:
        """From another thread: end a wait for the next piece with an error."""
        with suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up, which ends a request that is under way."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def _event(self) -> dict[str, Any]:
        """The next event of the stream."""
        if self._response is None:
            self._began = time.monotonic()
            self._response = self._ask()
        while line := self._response.readline():
            if line.startswith(b"data: {"):
                event: dict[str, Any] = json.loads(line[len(b"data: ") :])
                return event
        raise http.client.IncompleteRead(b"")

    def _ask(self) -> http.client.HTTPResponse:
        self._connection.request(
            "POST", "/v1/chat/completions", body=self._request, headers={"Content-Type": "application/json"}
        )
        self._request = None  # as large as its pictures
        response = self._connection.getresponse()
        if response.status != 200:
            raise self._failure(error_of(response.status, _json(response.read())), response.status)
        return response

    def _finish(self, values: dict[str, Any]) -> None:
        now = time.monotonic()
        spans = values.pop("spans", None)
        self._result = result_of({**values, "timings": values["timings"] | {"load": self._load_seconds}})
        if spans is not None:
            own = [Span(CLIENT, "request", self._began, now, {"tokens": self._result.generated_tokens})]
            if self.begun:
                own.append(Span(CLIENT, "first text", self._began, self._first))
                own.append(Span(CLIENT, "further text", self._first, now))
            self.spans = [*own, *(Span(**span) for span in spans)]

    def _failure(self, error: DeepstitchError, status: int) -> DeepstitchError:
        """What the language process says is wrong; or who died, which is why it says so."""
        reason = self._explain() if status >= 500 else None
        return error if reason is None else PeerLost(reason)

    def _broken(self, error: Exception) -> DeepstitchError:
        return PeerLost(self._explain() or f"the connection to the language process broke ({error})")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP through a socket file."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def result_of(values: Mapping[str, Any]) -> Result:
    """The reverse of :meth:`Result.to_dict`."""
    logprobs = values.get("logprobs")
    return Result(
        text=values["text"],
        token_ids=tuple(values["token_ids"]),
        prompt_tokens=values["prompt_tokens"],
        cached_tokens=values["cached_tokens"],
        visual_tokens=values["visual_tokens"],
        finish_reason=values["finish_reason"],
        timings=dict(values["timings"]),
        drafted_tokens=values["drafted_tokens"],
        accepted_tokens=values["accepted_tokens"],
        logprobs=None if logprobs is None else tuple(_logprob(entry) for entry in logprobs),
    )


def _logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((each["token_id"], each["text"], each["logprob"]) for each in entry["top"])
    return TokenLogprob(token_id=entry["token_id"], text=entry["text"], logprob=entry["logprob"], top=top)


def _message(message: Mapping[str, Any], media: Mapping[str, Iterator[str]]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    return {**message, "content": [_part(part, media) for part in content]}


def _part(part: Mapping[str, Any], media: Mapping[str, Iterator[str]]) -> dict[str, Any]:
    kind = part["type"]
    if kind not in media:
        return dict(part)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": next(media[kind])}}


def _read(path: Path, medium: str, index: int) -> str:
    """A file as a data: URL; what is really in it is found out where it is decoded."""
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(f"{medium} {index + 1} ('{path}'): {reason}") from None
    if not content:
        raise InputError(f"{medium} {index + 1} ('{path}'): the file is empty")
    guess = mimetypes.guess_type(path.name)[0] or ""
    return data_url(content, guess if guess.startswith(f"{medium}/") else f"{medium}/unknown")


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
