"""A server in a process of its own, for tests and benchmarks: obeys lines of JSON on stdin, answers on stdout.

    python child.py '{"side": "encode", "config": {…}}'

``side`` is ``encode``, ``language``, or ``alone``: one process, without disaggregation, to compare with. It prints a
line when it is ready, one for every command, and one for every event: a fault of the plan that strikes, a lost
connection. Times are of the monotonic clock, which all processes of a machine share. It ends with its stdin.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder; its modules are no top-level ones

import asyncio
import base64
import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LINE_LIMIT = 256 << 20
_PR_SET_PDEATHSIG = 1
_ANSWER = ("text", "token_ids", "prompt_tokens", "visual_tokens", "finish_reason", "logprobs")


class Voice:
    """Lines to stdout, from any thread, whole and at once: the process may be killed just after."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, **values: Any) -> None:
        line = memoryview(json.dumps(values).encode() + b"\n")
        with self._lock:
            while line:
                line = line[os.write(1, line) :]


class Signals:
    """Stands where ``faults.py`` expects the module ``os``: tells before it kills, and may kill another process."""

    def __init__(self, voice: Voice) -> None:
        self.victim = 0
        self._voice = voice

    def getpid(self) -> int:
        return self.victim or os.getpid()

    def kill(self, pid: int, number: int) -> None:
        self._voice(event="fault", at=time.monotonic())
        os.kill(pid, number)


def config_of(side: str, values: dict[str, Any]) -> Any:
    """The reverse of ``processes.plain``."""
    from deepstitch.runtime.disaggregated.config import Address, Deadlines, EncodeConfig, LanguageConfig, PoolConfig

    known = dict(values, bundle=Path(values["bundle"]))
    known["deadlines"] = Deadlines(**values["deadlines"])
    known["pool"] = PoolConfig(**values["pool"])
    for name in ("registry", "tls_certificate", "tls_authority"):
        if known.get(name) is not None:
            known[name] = Path(known[name])
    if side == "encode":
        return EncodeConfig(**dict(known, listen=Address(*values["listen"])))
    return LanguageConfig(**dict(known, encoders=tuple(Address(*each) for each in values["encoders"])))


class Host:
    """What the two servers have in common here."""

    def __init__(self, server: Any, voice: Voice, signals: Signals) -> None:
        self.server = server
        self.voice = voice
        self.signals = signals
        self.calls: dict[str, float] = defaultdict(float)

    async def start(self) -> dict[str, Any]:
        """Start, and have all the threads there will be."""
        await self.server.start()
        loop = asyncio.get_running_loop()
        await asyncio.gather(*[loop.run_in_executor(None, time.sleep, 0.02) for _ in range(64)])
        return {"address": list(getattr(self.server, "address", ()))}

    async def do_arm(self, faults: str, victim: int = 0) -> dict[str, Any]:
        """Replace the plan of faults."""
        self.signals.victim = victim
        self.server._faults.__init__(faults)
        return {}

    async def do_check(self) -> dict[str, Any]:
        """Health."""
        return {"check": await self.server.check()}

    async def do_metrics(self) -> dict[str, Any]:
        """As Prometheus sees them, and seconds by message."""
        return {"metrics": self.server.metrics.text().decode(), "calls": dict(self.calls)}

    def state(self) -> dict[str, Any]:
        """What is held."""
        pool = self.server.pool
        kinds = {"tokens": pool.tokens, "deepstack": pool.deepstack}
        blocks = {kind: [each.free, each.total] for kind, each in kinds.items()}
        return {"idle": self.server.idle, "blocks": blocks, "tasks": len(asyncio.all_tasks())}


class EncodeHost(Host):
    """An encode process."""

    async def start(self) -> dict[str, Any]:
        ready = await super().start()
        exporter, voice = self.server._exporter, self.voice
        revoke = exporter.revoke

        def told(ticket: str) -> None:
            voice(event="lost", at=time.monotonic(), code="peer_lost")
            revoke(ticket)

        exporter.revoke = told
        answer = self.server.reply_to

        async def timed(peer: str, message: Any) -> Any:
            began = time.monotonic()
            try:
                return await answer(peer, message)
            finally:
                self.calls[type(message).__name__] += time.monotonic() - began

        self.server.reply_to = timed
        return ready

    async def do_state(self) -> dict[str, Any]:
        """What is held."""
        return {"state": {**self.state(), "rooms": len(self.server._rooms), "connections": len(self.server._peers)}}

    async def do_small_buffers(self) -> dict[str, Any]:
        """For the next reader over TCP, the kernel takes only a few KiB ahead."""
        from deepstitch.runtime.disaggregated.transport import tcp

        keep_alive = tcp.keep_alive

        def narrow(connection: socket.socket) -> None:
            tcp.keep_alive = keep_alive  # type: ignore[attr-defined]
            keep_alive(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

        tcp.keep_alive = narrow  # type: ignore[attr-defined]
        return {}

    async def do_stop_in_fill(self) -> dict[str, Any]:
        """Stop this process in the middle of the next staging, between token rows and DeepStack rows."""
        from deepstitch.runtime.disaggregated.buffers import MultimodalDataBuffers

        write = MultimodalDataBuffers.write_deepstack

        def interrupted(buffers: Any, *rows: Any) -> None:
            MultimodalDataBuffers.write_deepstack = write  # type: ignore[method-assign]
            self.signals.kill(os.getpid(), signal.SIGSTOP)
            write(buffers, *rows)

        MultimodalDataBuffers.write_deepstack = interrupted  # type: ignore[method-assign]
        return {}


class LanguageHost(Host):
    """A language process."""

    async def start(self) -> dict[str, Any]:
        from deepstitch.runtime.disaggregated.channel import Caller

        fail, call, voice, calls = Caller.fail, Caller.call, self.voice, self.calls

        def told(caller: Caller, error: Any) -> None:
            if not caller.lost.done():
                voice(event="lost", at=time.monotonic(), code=error.code)
            fail(caller, error)

        async def timed(caller: Caller, message: Any) -> Any:
            began = time.monotonic()
            try:
                return await call(caller, message)
            finally:
                calls[type(message).__name__] += time.monotonic() - began
                calls["messages"] += type(message).__name__ != "Ping"

        Caller.fail, Caller.call = told, timed  # type: ignore[method-assign]
        ready = await super().start()
        for thread in (self.server._reception._text, self.server._reception._pictures):
            await thread.run(lambda: None)
        return ready

    async def do_state(self) -> dict[str, Any]:
        """What is held."""
        server = self.server
        return {
            "state": {**self.state(), "rooms": server._admitted, "connections": len(server._encoders.connected)},
            "encoders": [str(address) for address in server._encoders.connected],
        }

    async def do_ask(self, text: str, images: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Answer a request."""
        from deepstitch.runtime.results import Result

        files = [base64.b64decode(image) for image in images]
        content = [*[{"type": "image"}] * len(files), {"type": "text", "text": text}]
        began, first = time.monotonic(), 0.0
        answer = self.server.answer([{"role": "user", "content": content}], files, (), options)
        async with contextlib.aclosing(answer) as events:
            async for event in events:
                first = first or time.monotonic() - began
                if isinstance(event, Result):
                    return told(event, first, time.monotonic() - began)
        raise AssertionError("no result")

    async def do_cut(self) -> dict[str, Any]:
        """Cut the busiest connection, as a broken network would."""
        links = list(self.server._encoders.connected.values())
        if links:
            max(links, key=lambda link: link.rooms).caller._writer.transport.abort()
        return {"done": bool(links)}

    async def do_corrupt(self) -> dict[str, Any]:
        """Flip a bit of what is read next."""
        from deepstitch.runtime.disaggregated.conn_multimodal.link import Link

        read = Link._read

        def damaged(link: Any, spans: Any, timeout: float) -> Any:
            Link._read = read  # type: ignore[method-assign]
            generations = read(link, spans, timeout)
            spans[0].local[0] ^= 1
            return generations

        Link._read = damaged  # type: ignore[method-assign]
        return {}


class Alone:
    """The same answers without disaggregation."""

    def __init__(self, config: Any) -> None:
        from deepstitch.runtime.pipeline import Pipeline

        self._pipeline = Pipeline.open(
            config.bundle, threads=config.threads, encoder_cache_bytes=config.encoder_cache_bytes
        )

    async def start(self) -> dict[str, Any]:
        """Nothing more to do."""
        return {"address": []}

    async def do_ask(self, text: str, images: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Answer a request."""
        files = [base64.b64decode(image) for image in images]
        content = [*[{"type": "image"}] * len(files), {"type": "text", "text": text}]
        began, first = time.monotonic(), 0.0
        stream = self._pipeline.stream([{"role": "user", "content": content}], images=files, **options)
        for _ in stream:
            first = first or time.monotonic() - began
        seconds = time.monotonic() - began
        return told(stream.result, first or seconds, seconds)


def told(result: Any, first: float, seconds: float) -> dict[str, Any]:
    """A result, without what differs from run to run."""
    values = result.to_dict()
    answer = {name: values.get(name) for name in _ANSWER}
    return {"answer": answer, "first": first, "seconds": seconds, "timings": values["timings"]}


async def serve(host: Any, voice: Voice) -> None:
    """Obey commands until stdin ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_LINE_LIMIT)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running: dict[int, asyncio.Task[None]] = {}
    while line := await reader.readline():
        command = json.loads(line)
        number, name = command.pop("id"), command.pop("do")
        if name == "cancel":
            if command["what"] in running:
                running[command["what"]].cancel()
            voice(id=number)
            continue
        task = loop.create_task(_obey(getattr(host, f"do_{name}"), number, command, voice))
        running[number] = task
        task.add_done_callback(lambda _, number=number: running.pop(number))


async def _obey(act: Callable[..., Any], number: int, fields: dict[str, Any], voice: Voice) -> None:
    from deepstitch.errors import DeepstitchError

    try:
        voice(id=number, **await act(**fields))
    except DeepstitchError as error:
        voice(id=number, error=getattr(error, "code", type(error).__name__), text=str(error))
    except asyncio.CancelledError:
        voice(id=number, error="cancelled", text="the client went away")
    except Exception as error:  # what no client should ever see
        voice(id=number, error=f"untyped {type(error).__name__}", text=str(error))


async def main(spec: dict[str, Any]) -> None:
    """Start the server and serve."""
    from deepstitch.runtime.disaggregated import faults
    from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
    from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer

    voice = Voice()
    signals = Signals(voice)
    faults.os = signals  # type: ignore[assignment]
    config = config_of(spec["side"], spec["config"])
    host: Any
    if spec["side"] == "alone":
        host = Alone(config)
    elif spec["side"] == "encode":
        host = EncodeHost(EncodeServer(config), voice, signals)
    else:
        host = LanguageHost(LanguageServer(config), voice, signals)
    voice(ready=True, pid=os.getpid(), **await host.start())
    await serve(host, voice)
    if hasattr(host, "server"):
        await host.server.stop()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # even a stopped one ends with the test
    asyncio.run(main(json.loads(sys.argv[1])))
