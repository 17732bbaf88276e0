"""POST /v1/chat/completions and GET /v1/models over a language process."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol

from aiohttp import web

from deepstitch.errors import DeepstitchError
from deepstitch.runtime.disaggregated.errors import PeerBusy
from deepstitch.runtime.disaggregated.trace import LANGUAGE, Trace
from deepstitch.runtime.results import Result
from deepstitch.runtime.server.openai import Answer, ChatRequest, parse_chat_request
from deepstitch.runtime.server.refusals import Refusal, refusal

__all__ = ["Answering", "Chat"]

_BODY_SECONDS = 60.0
_BODIES = 8  # of the largest size, that may be in memory at a time


class Answering(Protocol):
    """What a language process offers here."""

    def answer(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[bytes],
        videos: Sequence[bytes],
        options: dict[str, Any],
        trace: Trace | None = None,
    ) -> AsyncGenerator[str | Result, None]:
        """Pieces of text, then one result; closing it cancels the request."""
        ...


class Chat:
    """The routes of a chat model.

    Attributes:
        max_body_bytes: of one request.
    """

    def __init__(self, server: Answering, *, model: str, max_body_bytes: int) -> None:
        """``model`` is the name it is served under."""
        self.max_body_bytes = max_body_bytes
        self._server, self._model = server, model
        self._began = int(time.time())
        self._bytes = 0

    def routes(self) -> list[web.RouteDef]:
        """To be added to an application."""
        return [web.post("/v1/chat/completions", self.completions), web.get("/v1/models", self.models)]

    async def models(self, _: web.Request) -> web.StreamResponse:
        """The one model there is."""
        entry = {"id": self._model, "object": "model", "created": self._began, "owned_by": "deepstitch"}
        return web.json_response({"object": "list", "data": [entry]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer; where the client goes away this task is cancelled, and with it the request."""
        size = self._admit(request)
        try:
            trace = Trace(LANGUAGE)
            with trace.span("receive request") as detail:
                body = await self._read(request)
                detail["bytes"] = len(body)
            # JSON and base64 of large pictures take long enough to keep others waiting
            with trace.span("parse request"):
                asked = await asyncio.get_running_loop().run_in_executor(None, parse_chat_request, body)
            if asked.model is not None and asked.model != self._model:
                return _refuse(404, "model_not_found", f"no model '{asked.model[:60]}' here; this is '{self._model}'")
            return await self._reply(request, asked, trace if asked.trace else None)
        finally:
            self._bytes -= size

    def _admit(self, request: web.Request) -> int:
        """Keep bodies from filling the memory; returns the bytes to give back.

        Raises:
            PeerBusy: as many are in memory as may be.
        """
        if request.content_type != "application/json":
            # also what keeps the pages of a browser from asking a server on this machine
            raise web.HTTPUnsupportedMediaType(text="send JSON with the header Content-Type: application/json")
        length = request.content_length
        if length is not None and length > self.max_body_bytes:
            raise web.HTTPRequestEntityTooLarge(max_size=self.max_body_bytes, actual_size=length)
        size = self.max_body_bytes if length is None else length
        if self._bytes and self._bytes + size > _BODIES * self.max_body_bytes:
            raise PeerBusy(f"{self._bytes} bytes of requests are being answered; try again in a moment")
        self._bytes += size
        return size

    async def _read(self, request: web.Request) -> bytes:
        """The body; nobody holds memory by sending it drop by drop."""
        try:
            return await asyncio.wait_for(request.read(), _BODY_SECONDS)
        except asyncio.TimeoutError:
            raise web.HTTPRequestTimeout(text=f"the request did not arrive within {_BODY_SECONDS:g} s") from None

    async def _reply(self, request: web.Request, asked: ChatRequest, trace: Trace | None) -> web.StreamResponse:
        pieces = self._server.answer(asked.messages, asked.images, asked.videos, asked.options, trace)
        async with aclosing(pieces):
            if asked.stream:
                return await self._stream(request, asked, pieces, trace)
            result = None
            async for item in pieces:  # to its end: leaving earlier would count as a client that went away
                result = item
        if not isinstance(result, Result):
            raise RuntimeError("the answer ended without a result")
        return web.json_response(Answer(self._model).whole(result, trace.spans if trace else None))

    async def _stream(
        self,
        request: web.Request,
        asked: ChatRequest,
        pieces: AsyncGenerator[str | Result, None],
        trace: Trace | None,
    ) -> web.StreamResponse:
        """Events as the pieces come. What fails before the first piece still gets a status of its own."""
        first = await anext(pieces)
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        response, answer = web.StreamResponse(headers=headers), Answer(self._model)
        await response.prepare(request)
        try:
            await _send(response, answer.opening())
            item: str | Result = first
            while isinstance(item, str):
                await _send(response, answer.piece(item))
                item = await anext(pieces)
            async for _ in pieces:  # to its end, see above
                pass
            await _send(response, answer.closing(item, trace.spans if trace else None))
            if asked.include_usage:
                await _send(response, answer.usage(item))
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
        except ConnectionError:
            pass  # the client went away; leaving cancels the request
        except Exception as error:
            await _break_off(response, error)
        return response


async def _break_off(response: web.StreamResponse, error: Exception) -> None:
    """Tell why the answer is not whole; no [DONE] follows."""
    if not isinstance(error, DeepstitchError):
        logging.getLogger(__name__).error("an answer broke off", exc_info=error)
    with suppress(ConnectionError):
        await _send(response, refusal(error).body)
        await response.write_eof()


def _refuse(status: int, code: str, message: str) -> web.StreamResponse:
    return web.json_response(Refusal(status, code, message).body, status=status)


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
