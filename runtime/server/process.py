"""The life of a server process: load, say that it is ready, work, and end cleanly when told to."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol

from deepstitch.runtime.server.http import HttpServer

__all__ = ["Server", "run_server"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(Protocol):
    """An encode or a language process."""

    async def start(self) -> None:
        """Load and listen."""
        ...

    async def stop(self) -> None:
        """End everything; may be called twice, and where :meth:`start` failed."""
        ...

    async def check(self) -> dict[str, Any]:
        """Do real work."""
        ...


def run_server(server: Server, http: HttpServer | None, *, ready: Callable[[], None], until_stdin_closes: bool) -> None:
    """Run until SIGTERM or SIGINT; a second one ends the process at once.

    Args:
        server: not started yet.
        http: likewise; its address is taken already.
        ready: called when requests can come.
        until_stdin_closes: also end when stdin does, which is when the parent process is gone, however it ended.

    Raises:
        DeepstitchError: the server cannot start.
    """
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    asyncio.run(_run(server, http, ready, until_stdin_closes))


async def _run(server: Server, http: HttpServer | None, ready: Callable[[], None], until_stdin_closes: bool) -> None:
    told = _told_to_stop(until_stdin_closes)
    waiting, starting = asyncio.ensure_future(told.wait()), asyncio.ensure_future(server.start())
    try:
        await asyncio.wait({waiting, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting  # raises what went wrong
            if http is not None:
                await http.start()
            ready()
            await waiting
    finally:
        waiting.cancel()
        starting.cancel()
        await asyncio.gather(waiting, starting, return_exceptions=True)
        if http is not None:
            await http.stop()
        await server.stop()


def _told_to_stop(until_stdin_closes: bool) -> asyncio.Event:
    """An event that is set by the first signal, or the end of stdin."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        told.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)  # the next one does what it does by itself

    def read() -> None:
        if not os.read(stdin, 4096):
            loop.remove_reader(stdin)
            stop()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    if until_stdin_closes:
        stdin = sys.stdin.fileno()
        loop.add_reader(stdin, read)
    return told
