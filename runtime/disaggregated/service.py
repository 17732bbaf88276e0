"""What both servers need: a thread for compute, an end for their tasks, and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from deepstitch.errors import InputError

__all__ = ["ComputeThread", "client_tls", "end_tasks", "server_tls"]

_MOMENT = 0.005  # seconds
_LOOK_SECONDS = 0.5
_COMPUTING = 0.05  # of that time on a processor; a thread that sleeps and looks again and again takes less
Value = TypeVar("Value")


class ComputeThread:
    """One thread that computes in the order of the requests, so that the event loop never does."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=self._find_clock)
        self._clock: int | None = None  # of the processor time of the thread
        self._began = 0.0  # the work that it does, or did last

    async def run(self, work: Callable[[], Value]) -> Value:
        """Run ``work`` there; its exceptions are raised here. Cancelled before its turn, it does not run."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._begin, work)

    async def probe(self, work: Callable[[], Value], *, timeout: float, patience: float) -> Value | None:
        """Find out whether the thread works: run ``work`` there, or see it compute for somebody else.

        That the thread's processor time goes on shows that it is not blocked and not asleep. It does not show that what
        it does will ever end: a thread that spins for ever looks alive for ``patience`` seconds. Where the platform has
        no such clock (Windows, macOS), only the result of ``work`` counts.

        Args:
            work: something small; it waits for its turn, as in :meth:`run`.
            timeout: seconds without either.
            patience: seconds after which one piece of work no longer counts, though the thread computes.

        Returns:
            The result of ``work``, whose exceptions are raised here too; None if its turn has not come, or not ended.

        Raises:
            asyncio.TimeoutError: neither was seen.
        """
        own, end = asyncio.ensure_future(self.run(work)), time.monotonic() + timeout
        try:
            while (left := end - time.monotonic()) > 0:
                before = self._processor_seconds()
                await asyncio.wait({own}, timeout=min(left, _LOOK_SECONDS))
                if own.done():
                    return own.result()
                computes = self._processor_seconds() - before >= _COMPUTING * _LOOK_SECONDS
                if computes and time.monotonic() - self._began < patience:
                    return None
            raise asyncio.TimeoutError
        finally:
            own.cancel()

    def _begin(self, work: Callable[[], Value]) -> Value:
        self._began = time.monotonic()
        return work()

    def _find_clock(self) -> None:
        """Called in the thread, which therefore lives: to ask for one that has ended can crash the process."""
        if hasattr(time, "pthread_getcpuclockid"):
            with contextlib.suppress(OSError):  # the system has none
                self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def _processor_seconds(self) -> float:
        """Always the same where it cannot be known."""
        with contextlib.suppress(OSError):  # the thread has ended
            return 0.0 if self._clock is None else time.clock_gettime(self._clock)
        return 0.0

    def forget(self, value: object) -> None:
        """Let go of something large there, a moment later: giving memory back takes time that others wait for."""
        held = [value]

        def let_go() -> None:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self._pool.submit(held.clear)

        asyncio.get_running_loop().call_later(_MOMENT, let_go)

    async def close(self) -> None:
        """Let the running work end and drop the rest."""
        await asyncio.get_running_loop().run_in_executor(
            None, lambda: self._pool.shutdown(wait=True, cancel_futures=True)
        )


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel until they have ended: a task that was just being woken can lose a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.1)


def server_tls(certificate: Path | None) -> ssl.SSLContext | None:
    """Context of the encode side.

    Raises:
        InputError: the file is not a PEM certificate with its key.
    """
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(lambda: context.load_cert_chain(certificate), certificate, "a PEM certificate with its private key")
    return context


def client_tls(authority: Path | None) -> ssl.SSLContext | None:
    """Context of the language side; it trusts only ``authority``.

    Raises:
        InputError: the file is not a PEM certificate.
    """
    if authority is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(lambda: context.load_verify_locations(authority), authority, "a PEM certificate")
    return context


def _load(load: Callable[[], object], path: Path, kind: str) -> None:
    try:
        load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"{path}: cannot be read as {kind} ({error})") from None
