"""A language process without a model, and the HTTP server in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.trace import ENCODE, Span
from deepstitch.runtime.results import Result, TokenLogprob
from deepstitch.runtime.server.chat import Chat
from deepstitch.runtime.server.http import HttpServer, parse_listen

PICTURE = "data:image/png;base64,iVBORw0KGgo="
ASK = {"messages": [{"role": "user", "content": "what?"}]}


def result(text: str, **changes: Any) -> Result:
    timings = {
        "load": 1.0,
        "preprocess": 0.1,
        "encode": 0.2,
        "transfer": 0.3,
        "prefill": 0.4,
        "decode": 0.5,
        "engine": 0.4,
    }
    values: dict[str, Any] = {
        "text": text,
        "token_ids": (5, 6, 7),
        "prompt_tokens": 11,
        "cached_tokens": 0,
        "visual_tokens": 4,
        "finish_reason": "stop",
        "timings": timings,
    }
    return Result(**{**values, **changes})


LOGPROBS = (TokenLogprob(token_id=5, text="é", logprob=-0.5, top=((5, "é", -0.5), (9, "x", -1.5))),)


class FakeLanguage:
    """Answers with ``pieces``; an exception among them is raised, a number waited for.

    Attributes:
        asked: what came, request by request.
        ended: requests that nobody listened to until their end, or that failed.
    """

    def __init__(self, *pieces: Any, **changes: Any) -> None:
        self.pieces = pieces or ("two ", "squares")
        self.changes = changes
        self.metrics = Metrics()
        self.asked: list[tuple[Any, ...]] = []
        self.ended = 0
        self.checks = 0
        self.trouble: Exception | None = None

    async def start(self) -> None:
        if self.trouble:
            raise self.trouble

    async def stop(self) -> None:
        pass

    async def check(self) -> dict[str, Any]:
        self.checks += 1
        await asyncio.sleep(0.01)
        if self.trouble:
            raise self.trouble
        return {"steps": 1}

    async def answer(self, messages, images, videos, options, trace=None) -> AsyncGenerator[str | Result, None]:
        self.asked.append((messages, images, videos, options))
        done = False
        try:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, float):
                    await asyncio.sleep(piece)
                else:
                    yield piece
            if trace is not None:
                trace.spans.append(Span(ENCODE, "encode", 1.0, 2.0))
            yield result("".join(p for p in self.pieces if isinstance(p, str)), **self.changes)
            done = True
        finally:
            self.ended += not done


@asynccontextmanager
async def serving(
    fake: FakeLanguage, *, listen: str = "0", token: str = "", max_body: int = 1 << 20, chat: bool = True
) -> AsyncIterator[aiohttp.ClientSession]:
    front = Chat(fake, model="tiny", max_body_bytes=max_body) if chat else None
    http = HttpServer(parse_listen(listen), check=fake.check, metrics=fake.metrics, token=token, chat=front)
    await http.start()
    try:
        url = http.url.replace("0.0.0.0", "127.0.0.1")
        async with aiohttp.ClientSession(base_url=url, timeout=aiohttp.ClientTimeout(total=20)) as client:
            yield client
    finally:
        await http.stop()
