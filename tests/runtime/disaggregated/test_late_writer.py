"""An encode process is stopped in the middle of its work and goes on when its blocks belong to somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.runtime.disaggregated.config import Address, PoolConfig
from deepstitch.runtime.disaggregated.conn_multimodal.receiver import Receiver
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
from deepstitch.runtime.disaggregated.transport import shm, tcp
from deepstitch.runtime.pipeline import Pipeline

from .pair import ask, conversation, encode_config, language_config, png, running, same
from .processes import QUICK, Child

PICTURES, SIDE = 9, 256  # of a request: 64 visual tokens each, more than the kernel takes ahead of a slow reader
# Landing blocks for one request only, so that the next one gets the same. No checksums: they would hide foreign bytes.
POOL = PoolConfig(block_tokens=64, blocks=11, deepstack_blocks=9, first_blocks=6, checksums=False)
SETTINGS: dict[str, Any] = {"pool": POOL, "deadlines": QUICK, "encoder_cache_bytes": 0}
PATTERN = 0xA5
LATE_SECONDS = 0.7
Stop = Callable[[], None]


@pytest.fixture(scope="module")
def files() -> list[list[bytes]]:
    """Pictures of three requests."""
    random = np.random.default_rng(11)
    shape = (SIDE, SIDE, 3)
    return [[png(random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(PICTURES)] for _ in range(3)]


@pytest.fixture(scope="module")
def answers(plain_bundle: Path, files: list[list[bytes]]) -> list[Any]:
    pipeline = Pipeline.open(plain_bundle, threads=1)
    options = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}
    found = [pipeline.generate(conversation("what is it?", PICTURES), images=each, **options) for each in files]
    blocks = -(-found[0].prompt_tokens // POOL.block_tokens)
    assert POOL.first_blocks < blocks <= POOL.blocks < 2 * blocks
    return found


class Scene:
    """A language process in this one, and encode processes of which the first gets stopped."""

    def __init__(self, language: LanguageServer, late: Child, start_other: Callable[[], Any]) -> None:
        self.language = language
        self.late = late
        self.start_other = start_other
        self.stopped = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def stop_it(self) -> None:
        """From any thread, once."""
        if not self.stopped.is_set():
            os.kill(self.late.pid, signal.SIGSTOP)
            self._loop.call_soon_threadsafe(self.stopped.set)

    def go_on(self) -> None:
        os.kill(self.late.pid, signal.SIGCONT)

    @property
    def landing(self) -> np.ndarray:
        """Memory of the landing blocks, without the words that say who owns them."""
        buffers = self.language.pool.buffers
        return buffers.memory[buffers.layout.offset("input_embeddings") :]


@contextlib.asynccontextmanager
async def scene(bundle: Path, transport: str, folder: Path) -> AsyncIterator[Scene]:
    folders = [folder / name for name in ("late", "other")]
    for each in folders:
        each.mkdir()
    configs = [encode_config(bundle, transport, str(each), **SETTINGS) for each in folders]
    if transport == "tcp":
        configs = [_at_port(config) for config in configs]
    late = await Child.start("encode", configs[0])
    others: list[Child] = []

    async def start_other() -> None:
        others.append(await Child.start("encode", configs[1]))

    try:
        await late.call("small_buffers")
        config = language_config(bundle, *[each.listen for each in configs], **SETTINGS)
        async with running(LanguageServer(config)) as language:
            here = Scene(language, late, start_other)
            try:
                yield here
            finally:
                here.go_on()
            await asyncio.sleep(0.1)
            assert language.idle
        state = (await late.call("state", timeout=5.0))["state"]
        assert state["idle"] and not state["rooms"]
        assert late.said() == ""
    finally:
        for child in [late, *others]:
            await child.end()


def _at_port(config: Any) -> Any:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return dataclasses.replace(config, listen=Address(host="127.0.0.1", port=taken.getsockname()[1]))


async def stop_in(moment: str, scene: Scene, transport: str, patch: pytest.MonkeyPatch) -> None:
    """Have the encode process stopped while it fills blocks, or when a part of them has been read."""
    if moment == "staging":
        await scene.late.call("stop_in_fill")
    elif transport == "shm":
        check_alive = shm.ShmImporter._check_alive
        patch.setattr(shm.ShmImporter, "_check_alive", lambda importer: (scene.stop_it(), check_alive(importer))[1])
    else:
        receive = tcp._receive

        def received(connection: socket.socket, views: list[memoryview]) -> int:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            if len(views[0]) == 1:  # the answer begins
                return receive(connection, views)
            count = receive(connection, [views[0][: 8 << 10]])
            patch.setattr(tcp, "_receive", receive)
            scene.stop_it()
            return count

        patch.setattr(tcp, "_receive", received)


async def given_up(scene: Scene, moment: str) -> None:
    """Wait until the language process has taken its landing blocks back from the stopped one."""
    if moment == "staging":
        await scene.late.event("fault", 0.0, 10.0)
    else:
        await asyncio.wait_for(scene.stopped.wait(), 10.0)
    deadline = time.monotonic() + 10.0
    while b'attempts_total{outcome="peer_hung"} 1.0' not in scene.language.metrics.text():
        assert time.monotonic() < deadline, "the language process has not given up"
        await asyncio.sleep(0.01)
    assert scene.language.pool.idle


@pytest.mark.parametrize("moment", ["staging", "transfer"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_no_foreign_bytes(plain_bundle, files, answers, tmp_path, monkeypatch, transport, moment):
    """All landing blocks belong to somebody else, who has filled them, when the stopped process goes on."""

    async def run() -> tuple[int, Any]:
        async with scene(plain_bundle, transport, tmp_path) as here:
            await stop_in(moment, here, transport, monkeypatch)
            pool, landing = here.language.pool, here.landing
            landing[:] = 0
            request = asyncio.create_task(ask(here.language, "what is it?", files[0]))
            await given_up(here, moment)
            came = int(np.count_nonzero(landing))
            assert came > 0 if moment == "transfer" else came == 0
            rows = [each.total * POOL.block_tokens for each in (pool.tokens, pool.deepstack)]
            await asyncio.wait_for(pool.acquire("the new owner", *rows), 5.0)
            landing[:] = PATTERN
            here.go_on()
            await asyncio.sleep(LATE_SECONDS)
            foreign = int(np.count_nonzero(landing != PATTERN))
            pool.release("the new owner")
            return foreign, await request

    foreign, answer = asyncio.run(run())
    assert foreign == 0
    assert same(answer, answers[0])


@pytest.mark.parametrize("moment", ["staging", "transfer"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_later_requests_in_the_same_blocks(plain_bundle, files, answers, tmp_path, monkeypatch, transport, moment):
    """The stopped process goes on in the moment in which another request has its bytes and has not yet used them."""

    async def run() -> list[Any]:
        async with scene(plain_bundle, transport, tmp_path) as here:
            await stop_in(moment, here, transport, monkeypatch)
            first = asyncio.create_task(ask(here.language, "what is it?", files[0]))
            await given_up(here, moment)
            accept = Receiver._accept

            def held_up(receiver: Receiver, *arguments: Any) -> None:
                here.go_on()
                monkeypatch.setattr(Receiver, "_accept", accept)
                time.sleep(LATE_SECONDS)  # in a thread of its own
                accept(receiver, *arguments)

            monkeypatch.setattr(Receiver, "_accept", held_up)
            await here.start_other()
            later = [ask(here.language, "what is it?", file) for file in files[1:]]
            return list(await asyncio.gather(first, *later))

    got = asyncio.run(run())
    assert [same(answer, wanted) for answer, wanted in zip(got, answers, strict=True)] == [True] * len(files)
