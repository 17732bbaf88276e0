"""Language side: a standing connection to one encode process, its pool included."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.disaggregated.buffers import BufferLayout
from deepstitch.runtime.disaggregated.channel import Caller, connect
from deepstitch.runtime.disaggregated.config import Address, Deadlines
from deepstitch.runtime.disaggregated.errors import DisaggregationError, HandshakeRefused, PeerHung, PeerLost
from deepstitch.runtime.disaggregated.messages import ModelIdentity, Release, Welcome
from deepstitch.runtime.disaggregated.transport import TRANSPORTS, Importer, Span, open_importer

__all__ = ["SCRATCH_BYTES", "Link"]

_EVERYWHERE = ("0.0.0.0", "::")
_MOMENT = 0.002  # seconds
_AT_ONCE = 1 << 20  # bytes that are copied sooner than a thread is woken to do it
SCRATCH_BYTES = 64 << 10  # of the landing memory per link: where block generations are read to


class Link:
    """One encode process as the language side sees it.

    Attributes:
        caller: its control connection.
        layout: of its pool.
        epoch: of the process; another one after a restart.
        lease: seconds it keeps a room that nobody speaks of.
        rooms: attempts under way.
    """

    def __init__(self, caller: Caller, welcome: Welcome, importer: Importer, scratch: npt.NDArray[np.uint8]) -> None:
        self.caller = caller
        self.layout = _layout(welcome)
        self.epoch = welcome.epoch
        self.lease = welcome.lease_seconds
        self.rooms = 0
        self._importer = importer
        words = 8 * (self.layout.num_blocks + self.layout.num_deepstack_blocks)
        self._generations = scratch[:words]
        self._one_reader = asyncio.Lock()
        # a thread of its own: reads of one encoder that hangs must not hold up those of another
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._farewells: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        address: Address,
        *,
        token: str,
        identity: ModelIdentity,
        deadlines: Deadlines,
        memory: npt.NDArray[np.uint8],
        scratch: npt.NDArray[np.uint8],
        tls: ssl.SSLContext | None = None,
        count: Callable[[str], None] = lambda direction: None,
    ) -> Link:
        """Connect, and open the encode side's pool.

        Args:
            address: of the encode process.
            token: the shared secret.
            identity: of this side's bundle.
            deadlines: seconds.
            memory: the landing memory.
            scratch: ``SCRATCH_BYTES`` of it for this link alone.
            tls: context for TCP with TLS.
            count: told of every message, ``in`` or ``out``.

        Raises:
            DisaggregationError: no connection, or the two sides do not fit.
        """
        caller, welcome = await connect(
            address,
            token=token,
            identity=identity,
            transports=TRANSPORTS,
            deadlines=deadlines,
            tls=tls,
            count=count,
        )
        try:
            if 8 * (welcome.num_blocks + welcome.num_deepstack_blocks) > len(scratch):
                raise HandshakeRefused(f"{address}: more than {SCRATCH_BYTES // 8} blocks; use larger --block-tokens")
            importer = await asyncio.get_running_loop().run_in_executor(
                None, lambda: _importer(welcome, address, memory, tls)
            )
        except BaseException:
            await caller.close()
            raise
        return cls(caller, welcome, importer, scratch)

    def reads_at_once(self, spans: Sequence[Span]) -> bool:
        """Whether reading these is copying so little memory that it is not worth waking a thread."""
        return self._importer.immediate and sum(len(span.local) for span in spans) <= _AT_ONCE

    async def read(
        self,
        spans: Sequence[Span],
        *,
        accept: Callable[[npt.NDArray[np.uint64]], None],
        timeout: float,
        limit: float,
        wanted: asyncio.Future[None],
    ) -> None:
        """Fill the spans, read the generations of all blocks after that, and hand them to ``accept``.

        A failed read ends the link: after this has raised, nothing writes into the spans any more. What ``accept``
        raises concerns this read alone.

        Args:
            spans: what goes where.
            accept: told ``(num_blocks + num_deepstack_blocks,)`` uint64; in another thread, unless
                :meth:`reads_at_once`.
            timeout: seconds without progress.
            limit: seconds in all, without those it waits for other reads.
            wanted: cancelled when nobody wants it any more; then it does not begin.

        Raises:
            DisaggregationError: see :meth:`Importer.read`, or what ``accept`` raised.
        """
        async with self._one_reader:
            if self.caller.lost.done():
                raise self.caller.lost.result()
            if wanted.done():
                raise DisaggregationError("nobody waits for this read any more")
            try:
                if self.reads_at_once(spans):
                    refusal = self._read_and_accept(spans, timeout, accept)
                else:
                    refusal = await self._read_in_thread(spans, timeout, limit, accept)
            except DisaggregationError as error:
                self.caller.fail(error)  # before anything that can be cancelled: no other read may try
                await self._close_importer()
                raise self.caller.lost.result() from None  # the first reason: not that it was closed here because of it
        if refusal is not None:
            raise refusal

    async def _read_in_thread(
        self,
        spans: Sequence[Span],
        timeout: float,
        limit: float,
        accept: Callable[[npt.NDArray[np.uint64]], None],
    ) -> Exception | None:
        reading = asyncio.get_running_loop().run_in_executor(
            self._thread, self._read_and_accept, spans, timeout, accept
        )
        either: set[asyncio.Future[Any]] = {reading, self.caller.lost}
        await asyncio.wait(either, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():  # the process is gone, or slower than anybody waits for
            self.caller.fail(PeerHung(f"{self.caller.address}: a read did not end within {limit:.3g} s"))
            await self._close_importer()
        return await reading

    def _read_and_accept(
        self, spans: Sequence[Span], timeout: float, accept: Callable[[npt.NDArray[np.uint64]], None]
    ) -> Exception | None:
        """What ``accept`` refused, so that it is not taken for a failed read."""
        generations = self._read(spans, timeout)
        try:
            accept(generations)
        except Exception as error:
            return error
        return None

    def attend(self, farewell: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let something be said that nobody waits for, a moment later: what is waited for comes first."""

        async def later() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(_MOMENT)
            await farewell()

        task = asyncio.get_running_loop().create_task(later())
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    @property
    def idle(self) -> bool:
        """Nothing is left to be said."""
        return not self._farewells

    def dismiss(self, message: Release) -> None:
        """Send a release that nobody waits for."""

        async def farewell() -> None:
            with contextlib.suppress(DisaggregationError):
                await self.caller.call(message)

        if not self.caller.lost.done():
            self.attend(farewell)

    async def close(self) -> None:
        """End the connection; a read under way fails."""
        self.caller.fail(PeerLost(f"{self.caller.address}: closed"))
        await self._close_importer()
        await self.caller.close()
        await asyncio.gather(*self._farewells, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    async def _close_importer(self) -> None:
        """In a thread of its own: some engines take a second."""
        await asyncio.get_running_loop().run_in_executor(None, self._importer.close)

    def _read(self, spans: Sequence[Span], timeout: float) -> npt.NDArray[np.uint64]:
        self._importer.read(spans, timeout=timeout)
        self._importer.read([Span(0, self._generations)], timeout=timeout)
        return self._generations.view(np.uint64).copy()


def _importer(
    welcome: Welcome, address: Address, memory: npt.NDArray[np.uint8], tls: ssl.SSLContext | None
) -> Importer:
    endpoint = dict(welcome.endpoint)
    if address.host and (welcome.transport == "tcp" or endpoint.get("host") in _EVERYWHERE):
        # What it listens at need not be where it can be reached; and whose certificate counts, we decide here
        endpoint["host"] = address.host
    if address.path and "path" in endpoint:
        # Beside the socket that was dialled: another process has another current folder, or sees it somewhere else
        endpoint["path"] = str(Path(address.path).resolve().parent / Path(endpoint["path"]).name)
    context = tls if welcome.transport == "tcp" else None
    return open_importer(welcome.transport, endpoint, welcome.ticket, local=memory, context=context)


def _layout(welcome: Welcome) -> BufferLayout:
    return BufferLayout(
        hidden_size=welcome.model.hidden_size,
        num_deepstack=welcome.model.num_deepstack,
        block_tokens=welcome.block_tokens,
        num_blocks=welcome.num_blocks,
        num_deepstack_blocks=welcome.num_deepstack_blocks,
    )
