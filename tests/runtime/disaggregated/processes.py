"""Real encode and language processes that a test may kill, stop and start again, and what they must leave behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from deepstitch.runtime.disaggregated.config import Address, Deadlines, EncodeConfig, LanguageConfig, PoolConfig

CHILD = Path(__file__).with_name("child.py")
TOKEN = "open sesame"
QUICK = Deadlines(connect=1.0, reply=0.4, hang=1.0, ping=0.25, lease=20.0, request=30.0, reconnect=0.05, encoder=5.0)
PARTS = PoolConfig(block_tokens=4, blocks=16, deepstack_blocks=32, first_blocks=3, checksums=True)
QUESTION = "what is it?"
OPTIONS = {"max_tokens": 3, "ignore_eos": True, "logprobs": 2}
_LINE_LIMIT = 256 << 20
_START_SECONDS = 60.0
_SETTLE_SECONDS = 5.0


class Gone(Exception):
    """The process ended before it answered."""


class Refused(Exception):
    """The process answered with an error.

    Attributes:
        code: of the error.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


def plain(config: EncodeConfig | LanguageConfig) -> dict[str, Any]:
    """A configuration as JSON types."""
    return json.loads(json.dumps(asdict(config), default=str))


class Child:
    """A server in a process of its own.

    Attributes:
        started: when it was started, of the monotonic clock; ``ready``: when it said so.
        events: what it told without being asked, the oldest first.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes], started: float) -> None:
        self.started = self.ready = started
        self.events: list[dict[str, Any]] = []
        self.pid = process.pid
        self._process = process
        self._log = log
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._news = asyncio.Event()
        self._first: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, side: str, config: EncodeConfig | LanguageConfig) -> Child:
        """Start one and wait until it is ready."""
        spec = json.dumps({"side": side, "config": plain(config)})
        started = time.monotonic()
        log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in end()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(CHILD),
            spec,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=_LINE_LIMIT,
            start_new_session=True,  # Ctrl-C is for the parent
        )
        child = cls(process, log, started)
        try:
            await asyncio.wait_for(child._first, _START_SECONDS)
        except BaseException as error:
            said = child.said()
            await child.end()
            if isinstance(error, Gone):
                raise RuntimeError(f"the {side} process did not start: {said}") from None
            raise
        child.ready = time.monotonic()
        return child

    async def call(self, do: str, timeout: float = 60.0, **fields: Any) -> dict[str, Any]:
        """Send a command and return its answer.

        Raises:
            Gone: the process ended.
            Refused: it answered with an error.
            asyncio.TimeoutError: it did not answer.
        """
        number, answer = self._send(do, fields)
        try:
            reply = await asyncio.wait_for(answer, timeout)
        except asyncio.CancelledError:
            with contextlib.suppress(Gone):
                self._send("cancel", {"what": number})
            raise
        finally:
            self._waiting.pop(number, None)
        if "error" in reply:
            raise Refused(reply["error"], reply["text"])
        return reply

    async def ask(
        self, files: Sequence[bytes], text: str = QUESTION, timeout: float = 60.0, **options: Any
    ) -> dict[str, Any]:
        """The answer to a question about pictures, with its times."""
        images = [base64.b64encode(file).decode() for file in files]
        return await self.call("ask", timeout, text=text, images=images, options={**OPTIONS, **options})

    async def event(self, name: str, since: float, timeout: float) -> dict[str, Any]:
        """The first event of that name after ``since``.

        Raises:
            asyncio.TimeoutError: none came.
        """

        async def search() -> dict[str, Any]:
            while True:
                for event in self.events:
                    if event["event"] == name and event["at"] >= since:
                        return event
                await self._news.wait()

        return await asyncio.wait_for(search(), timeout)

    def signal(self, number: int) -> float:
        """Send it a signal; returns when."""
        now = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return now

    async def end(self, *, kill: bool = True) -> int:
        """End it, orderly or not; returns its exit code."""
        if kill:
            self.signal(signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        await asyncio.gather(self._listener, return_exceptions=True)
        code = await self._process.wait()
        self._log.close()
        return code

    def said(self) -> str:
        """What it has written to stderr, where nothing should be."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode("utf-8", "replace")

    def usage(self) -> dict[str, int]:
        """File descriptors, threads and bytes of memory it has now."""
        folder = Path("/proc", str(self.pid))
        resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "fds": len(list((folder / "fd").iterdir())),
            "threads": len(list((folder / "task").iterdir())),
            "rss": resident,
        }

    def _send(self, do: str, fields: dict[str, Any]) -> tuple[int, asyncio.Future[dict[str, Any]]]:
        if self._listener.done():
            raise Gone(do)
        assert self._process.stdin is not None
        self._number += 1
        answer = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": self._number, "do": do, **fields}).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._process.stdin.write(line)
        return self._number, answer

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            values = json.loads(line)
            if "event" in values:
                self.events.append(values)
            elif "ready" in values:
                self._first.set_result(values)
            elif (future := self._waiting.get(values["id"])) is not None and not future.done():
                future.set_result(values)
            self._tell()
        for future in [self._first, *self._waiting.values()]:
            if not future.done():
                future.set_exception(Gone("the process ended"))
                future.exception()  # who waits for it is told; nobody has to
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a cluster consists of.

    Attributes:
        encoders: encode processes.
        options: further fields of both configurations, ``encode`` and ``language`` those of one side.
    """

    bundle: Path
    transport: str = "shm"
    encoders: int = 1
    pool: PoolConfig = PARTS
    deadlines: Deadlines = QUICK
    options: dict[str, Any] = field(default_factory=dict)
    encode: dict[str, Any] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)


class Cluster:
    """Encode processes and one language process.

    Attributes:
        encoders: encode processes.
        language: the language process.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.encoders: list[Child] = []
        self.language: Child
        self._addresses = [self._address(place) for place in range(plan.encoders)]
        self._baseline: dict[str, Any] = {}

    async def start(self) -> None:
        """Start all."""
        starting = [self._start_encoder(place) for place in range(self.plan.encoders)]
        self.encoders = list(await asyncio.gather(*starting))
        self.language = await self._start_language()

    async def stop(self) -> None:
        """End all, whatever state they are in."""
        everyone = [*self.encoders, *([self.language] if hasattr(self, "language") else [])]
        await asyncio.gather(*[child.end() for child in everyone])

    async def restart(self, child: Child) -> Child:
        """Replace a process that was killed, or kills it."""
        await child.end()
        if child is self.language:
            self.language = fresh = await self._start_language()
            return fresh
        place = self.encoders.index(child)
        self.encoders[place] = fresh = await self._start_encoder(place)
        return fresh

    async def remember(self) -> None:
        """Take what is held now as what may be held later."""
        await self._until_connected()
        self._baseline = await self._held()

    async def leftovers(self, grace: float = _SETTLE_SECONDS) -> dict[str, Any]:
        """What is held beyond that after ``grace`` seconds; nothing is as it should be."""
        deadline = time.monotonic() + grace
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await self._until_connected()
            more = _beyond(self._baseline, await self._held())
            if not more or time.monotonic() > deadline:
                return more
            await asyncio.sleep(0.05)

    async def _held(self) -> dict[str, Any]:
        held: dict[str, Any] = {
            "files": sorted(path.name.partition("-pool-")[0] for path in self.folder.rglob("*")),
            "shared memory": sorted(path.name for path in Path("/dev/shm").iterdir() if "deepstitch" in path.name),
        }
        sides = {f"encode {place}": child for place, child in enumerate(self.encoders)}
        for name, child in {**sides, "language": self.language}.items():
            state = (await child.call("state", 10.0))["state"]
            usage = child.usage()
            usage.pop("rss")
            held[name] = {**state, **usage, "stderr": child.said()}
        return held

    async def _until_connected(self) -> None:
        async def wait() -> None:
            while len((await self.language.call("state", 10.0))["encoders"]) < len(self.encoders):
                await asyncio.sleep(0.02)

        await asyncio.wait_for(wait(), _SETTLE_SECONDS)

    def _address(self, place: int) -> Address:
        if self.plan.transport == "shm":
            folder = self.folder / str(place)
            folder.mkdir()
            return Address(path=str(folder / "encode.sock"))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            return Address(host="127.0.0.1", port=taken.getsockname()[1])

    def _shared(self) -> dict[str, Any]:
        plan = self.plan
        shared = {"bundle": plan.bundle, "token": TOKEN, "deadlines": plan.deadlines, "pool": plan.pool, "threads": 1}
        return {**shared, "encoder_cache_bytes": 0, **plan.options}

    async def _start_encoder(self, place: int) -> Child:
        shared = {"listen": self._addresses[place], "transport": self.plan.transport, **self._shared()}
        return await Child.start("encode", EncodeConfig(**{**shared, **self.plan.encode}))

    async def _start_language(self) -> Child:
        shared = {"encoders": tuple(self._addresses), **self._shared()}
        return await Child.start("language", LanguageConfig(**{**shared, **self.plan.language}))


def _beyond(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Entries that are not as before; of descriptors, threads and tasks only more than before counts."""
    more: dict[str, Any] = {}
    for name, value in now.items():
        if isinstance(value, dict):
            if inner := _beyond(before[name], value):
                more[name] = inner
        elif value > before[name] if name in ("fds", "threads", "tasks") else value != before[name]:
            more[name] = f"{before[name]} before, {value} now"
    return more


@contextlib.asynccontextmanager
async def cluster(plan: Plan, *warm_up: bytes) -> AsyncIterator[Cluster]:
    """Processes that have answered questions about the given pictures, and have all they will need."""
    with tempfile.TemporaryDirectory(prefix="ds-") as name:
        processes = Cluster(plan, Path(name))
        try:
            await processes.start()
            await processes.language.ask([])
            for _ in range(2):
                await asyncio.gather(*[processes.language.ask([picture]) for picture in warm_up * plan.encoders])
            await processes.remember()
            yield processes
        finally:
            await processes.stop()
