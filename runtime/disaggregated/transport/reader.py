"""What all readers of a pool have in common: checks of the spans, one read at a time, and how they end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.disaggregated.errors import PeerHung, PeerLost, ProtocolError
from deepstitch.runtime.disaggregated.transport import Span
from deepstitch.runtime.disaggregated.transport.gate import check_alive, end

__all__ = ["Reader", "Stretch", "address_of", "stretches"]


class Reader:
    """Base of the importers: ``_read`` and ``_free`` are the transport's own.

    Whatever fails in a read ends the connection. What the transport holds is freed by ``close()``, which waits for a
    read under way; so nothing lands in local memory after it.
    """

    immediate = False

    def __init__(self, connection: socket.socket, nbytes: int, local: npt.NDArray[np.uint8], peer: str) -> None:
        """``connection`` has been let in at the gate of ``peer``, whose pool has ``nbytes``; spans lie in ``local``."""
        self._connection = connection
        self._nbytes = nbytes
        self._begin, self._end = _extent(local)
        self._peer = peer
        self._closing = False
        self._failed = False
        self._freed = False
        self._lock = threading.Lock()

    def read(self, spans: Sequence[Span], *, timeout: float) -> None:
        """See :class:`~deepstitch.runtime.disaggregated.transport.Importer`.

        Raises:
            ProtocolError: a span lies outside of the other side's pool; nothing was read.
            ValueError: a span's local side is not a piece of the local memory.
        """
        with self._lock:
            if self._closing or self._failed:
                raise self._closed_here()
            wanted = self._checked(spans)
            try:
                self._read(wanted, timeout)
                if self._closing:
                    raise self._closed_here()
            except BaseException as error:
                self._failed = True
                end(self._connection)
                self._translate(error, timeout)

    def close(self) -> None:
        """See :class:`~deepstitch.runtime.disaggregated.transport.Importer`."""
        self._closing = True
        end(self._connection)
        with self._lock:
            if not self._freed:
                self._freed = True
                try:
                    self._free()
                finally:
                    self._connection.close()

    def _read(self, spans: list[Span], timeout: float) -> None:
        """Fill checked, non-empty spans; TimeoutError and OSError become typed errors."""
        raise NotImplementedError

    def _free(self) -> None:
        """Give up what the transport holds; afterwards nothing may write into local memory."""

    def _check_alive(self) -> None:
        if self._closing:
            raise self._closed_here()
        check_alive(self._connection, self._peer)

    def _closed_here(self) -> PeerLost:
        return PeerLost(f"{self._peer}: the connection was closed on this side")

    def _translate(self, error: BaseException, timeout: float) -> NoReturn:
        if self._closing:
            raise self._closed_here() from None
        if isinstance(error, TimeoutError):
            raise PeerHung(f"{self._peer}: nothing arrived for {timeout:g} s") from None
        if isinstance(error, OSError):
            raise PeerLost(f"{self._peer}: the connection ended ({error})") from None
        raise error

    def _checked(self, spans: Sequence[Span]) -> list[Span]:
        for offset, local in spans:
            if offset < 0 or offset + len(local) > self._nbytes:
                raise ProtocolError(
                    f"{self._peer}: {len(local)} bytes from {offset} on are not in its pool of {self._nbytes} bytes"
                )
            begin, last = _extent(local)
            if len(local) and (begin < self._begin or last > self._end):
                raise ValueError("the local side of a span lies outside of the memory this importer was opened with")
        return [span for span in spans if len(span.local)]


class Stretch(NamedTuple):
    """``nbytes`` from ``offset`` of the remote pool to ``address`` in this process."""

    offset: int
    address: int
    nbytes: int


def stretches(spans: Sequence[Span], size: int) -> Iterator[Stretch]:
    """The bytes of ``spans`` in pieces of at most ``size``; neighbours on both sides are joined before."""
    offset = address = count = 0
    for span in spans:
        begin = address_of(span.local)
        if span.offset != offset + count or begin != address + count:
            yield from _cut(offset, address, count, size)
            offset, address, count = span.offset, begin, 0
        count += len(span.local)
    yield from _cut(offset, address, count, size)


def _cut(offset: int, address: int, count: int, size: int) -> Iterator[Stretch]:
    for start in range(0, count, size):
        yield Stretch(offset + start, address + start, min(size, count - start))


def address_of(memory: npt.NDArray[np.uint8]) -> int:
    """Where it begins."""
    return int(memory.__array_interface__["data"][0])


def _extent(memory: npt.NDArray[np.uint8]) -> tuple[int, int]:
    if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous or not memory.flags.writeable:
        raise ValueError("transports read into writable, contiguous, flat uint8 memory only")
    return address_of(memory), address_of(memory) + len(memory)
