"""What both servers need: a thread for compute, an end for their tasks, and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from deepstitch.errors import InputError

__all__ = ["ComputeThread", "client_tls", "end_tasks", "server_tls"]

_MOMENT = 0.005  # seconds
Value = TypeVar("Value")


class ComputeThread:
    """One thread that computes in the order of the requests, so that the event loop never does."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, work: Callable[[], Value]) -> Value:
        """Run ``work`` there; its exceptions are raised here. Cancelled before its turn, it does not run."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

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
