"""An encode and a language process of one bundle, both in the event loop of a test."""

from __future__ import annotations

import asyncio
import contextlib
import io
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deepstitch.runtime.disaggregated.config import Address, Deadlines, EncodeConfig, LanguageConfig, PoolConfig
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.results import Result

TOKEN = "open sesame"
QUICK = Deadlines(connect=2.0, reply=0.5, hang=1.5, ping=0.3, lease=30.0, request=30.0, reconnect=0.05, encoder=3.0)


def png(picture: np.ndarray) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def conversation(text: str, images: int) -> list[dict[str, Any]]:
    """One user turn with that many placeholders."""
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]


def encode_config(bundle: Path, transport: str, folder: str, **options: Any) -> EncodeConfig:
    """Listens in ``folder`` or at a free port."""
    listen = f"unix:{folder}/encode.sock" if transport == "shm" else "tcp://127.0.0.1:0"
    defaults: dict[str, Any] = {"token": TOKEN, "deadlines": QUICK, "threads": 1, "transport": transport}
    return EncodeConfig(bundle=bundle, listen=Address.parse(listen), **{**defaults, **options})


def language_config(bundle: Path, *encoders: Address, **options: Any) -> LanguageConfig:
    """Talks to ``encoders``."""
    defaults: dict[str, Any] = {"token": TOKEN, "deadlines": QUICK, "threads": 1}
    return LanguageConfig(bundle=bundle, encoders=encoders, **{**defaults, **options})


@contextlib.asynccontextmanager
async def running(server: Any) -> AsyncIterator[Any]:
    """Start, and stop in the end."""
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def pair(
    bundle: Path,
    *,
    transport: str = "shm",
    encode: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
    pool: PoolConfig | None = None,
) -> AsyncIterator[tuple[EncodeServer, LanguageServer]]:
    """Both sides with the same pool; afterwards every block must be free again."""
    shared = {"pool": pool or PoolConfig(block_tokens=16, blocks=16, deepstack_blocks=32)}
    with tempfile.TemporaryDirectory() as folder:
        left = EncodeServer(encode_config(bundle, transport, folder, **{**shared, **(encode or {})}))
        async with running(left):
            right = LanguageServer(language_config(bundle, left.address, **{**shared, **(language or {})}))
            async with running(right):
                yield left, right
                assert await soon(lambda: right.idle)
                assert await soon(lambda: left.idle)


async def soon(true: Callable[[], bool]) -> bool:
    """An encode process hears that it was read when the answer is being written already."""
    for _ in range(100):
        if true():
            return True
        await asyncio.sleep(0.01)
    return False


async def ask(
    server: LanguageServer, text: str, images: Sequence[bytes] = (), *, trace: Any = None, **options: Any
) -> Result:
    """The whole answer."""
    messages: Any = conversation(text, len(images))
    chosen = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3, **options}
    return await collect(server.answer(messages, images, (), chosen, trace))


async def collect(answer: AsyncGenerator[str | Result, None]) -> Result:
    """The result of an answer."""
    async with contextlib.aclosing(answer) as events:
        async for event in events:
            if isinstance(event, Result):
                return event
    raise AssertionError("no result")


def same(left: Result, right: Result) -> bool:
    """Token for token, and bit for bit in the probabilities."""
    strip = {"timings": {}}
    return replace(left, **strip) == replace(right, **strip)
