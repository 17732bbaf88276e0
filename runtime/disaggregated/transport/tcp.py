"""Any two machines: the language side asks for pieces of the pool and gets their bytes, straight to where they belong.

A request is a count (4 bytes), then as many pairs of offset and length (8 bytes each, all big-endian); its answer is
``D`` and 63 zeros, then the bytes, one piece after the other. The reader puts the bytes where they go, so nothing can
land after it has closed its socket. TLS is optional.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Mapping
from itertools import islice

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.disaggregated.errors import PeerLost
from deepstitch.runtime.disaggregated.transport import Span
from deepstitch.runtime.disaggregated.transport.exporter import GatedExporter
from deepstitch.runtime.disaggregated.transport.gate import Guest, check_news, knock, receive_exactly
from deepstitch.runtime.disaggregated.transport.reader import Reader
from deepstitch.runtime.disaggregated.transport.sockets import connect, keep_alive, listen, new_memory, number_in

__all__ = ["TcpExporter", "TcpImporter", "open_exporter", "open_importer"]

_COUNT = struct.Struct("!I")
_PAIR = struct.Struct("!QQ")
_DATA = b"D".ljust(64, b"\0")  # whole cache lines: both sides copy misaligned bytes at half the speed
_MAX_SPANS = 4096  # of one request
_VECTOR = 256  # buffers of one system call; Linux takes 1,024
_TICKS = 16  # looks at the clock within one timeout


def open_exporter(nbytes: int, where: str, *, context: ssl.SSLContext | None = None) -> TcpExporter:
    """A pool of ``nbytes`` that is served at host ``where``.

    Raises:
        InputError: that is no address of this machine, or there is no such memory.
    """
    return TcpExporter(nbytes, where, context)


def open_importer(
    endpoint: Mapping[str, str], ticket: str, local: npt.NDArray[np.uint8], *, context: ssl.SSLContext | None = None
) -> TcpImporter:
    """Connect to the pool at ``endpoint``; ``context`` for one that speaks TLS.

    Raises:
        PeerLost: nobody answers there.
        PeerHung: no answer to the ticket.
        HandshakeRefused: the ticket is not taken.
        ProtocolError: the endpoint is not of this transport.
    """
    nbytes = number_in(endpoint, "nbytes")
    peer = f"encode process at {endpoint.get('host')}:{endpoint.get('port')}"
    connection = connect(endpoint, peer)
    if context is not None:
        try:
            connection = context.wrap_socket(connection, server_hostname=endpoint["host"])
        except OSError as error:
            connection.close()
            raise PeerLost(f"{peer}: no TLS connection ({error})") from None
    knock(connection, ticket, peer=peer)
    return TcpImporter(connection, nbytes, local, peer)


class TcpExporter(GatedExporter):
    """Encode side; see :class:`~deepstitch.runtime.disaggregated.transport.Exporter`."""

    def __init__(self, nbytes: int, where: str, context: ssl.SSLContext | None = None) -> None:
        super().__init__(new_memory(nbytes), listen(where), where, serve=self._serve, context=context)

    def _serve(self, guest: Guest) -> None:
        keep_alive(guest.connection)
        pool = self.memory.data
        while True:
            head = receive_exactly(guest.connection, _COUNT.size)
            count = _COUNT.unpack(head)[0] if len(head) == _COUNT.size else 0
            if not 0 < count <= _MAX_SPANS:
                return  # the end, or nonsense
            body = receive_exactly(guest.connection, count * _PAIR.size)
            pairs = list(_PAIR.iter_unpack(body)) if len(body) == count * _PAIR.size else []
            if not pairs or any(offset + length > len(pool) for offset, length in pairs):
                return
            with guest.reply():
                _send(guest.connection, [memoryview(_DATA), *(pool[at : at + length] for at, length in pairs)])


class TcpImporter(Reader):
    """Language side; see :class:`~deepstitch.runtime.disaggregated.transport.Importer`."""

    def _read(self, spans: list[Span], timeout: float) -> None:
        _set_patience(self._connection, timeout)
        remaining = iter(spans)
        while batch := list(islice(remaining, _MAX_SPANS)):
            pairs = b"".join(_PAIR.pack(offset, len(local)) for offset, local in batch)
            self._connection.sendall(_COUNT.pack(len(batch)) + pairs)
            head = bytearray(len(_DATA))
            views = [memoryview(head), *(span.local.data for span in batch)]
            whole = _fill(self._connection, views, timeout)
            if head[:1] != _DATA[:1]:  # then this one byte is all that came, or none
                check_news(bytes(head[:1]), self._peer)
            if not whole:
                raise PeerLost(f"{self._peer}: the connection ended in the middle of a transfer")


def _set_patience(connection: socket.socket, timeout: float) -> None:
    """Python's own timeouts cost a poll and a turn of the interpreter lock per piece; the kernel's cost neither."""
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(timeout)
        return
    connection.settimeout(None)
    for option, seconds in ((socket.SO_RCVTIMEO, timeout / _TICKS), (socket.SO_SNDTIMEO, timeout)):
        whole = int(seconds)
        value = struct.pack("ll", whole, max(1, int((seconds - whole) * 1e6)))  # all zeros would be for ever
        connection.setsockopt(socket.SOL_SOCKET, option, value)


def _fill(connection: socket.socket, views: list[memoryview], timeout: float) -> bool:
    """Receive until all views are full; False where the connection ends before.

    Raises:
        TimeoutError: nothing came for ``timeout`` seconds, or up to an eighth less.
    """
    first, last_progress = 0, time.monotonic()
    while first < len(views):
        try:
            count = _receive(connection, views[first : first + _VECTOR])
        except BlockingIOError:
            if time.monotonic() - last_progress >= timeout * (1 - 2 / _TICKS):
                raise TimeoutError from None
            continue
        if not count:
            return False
        last_progress = time.monotonic()
        first = _advance(views, first, count)
    return True


def _receive(connection: socket.socket, views: list[memoryview]) -> int:
    if isinstance(connection, ssl.SSLSocket):
        return connection.recv_into(views[0])
    return connection.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]


def _send(connection: socket.socket, views: list[memoryview]) -> None:
    if isinstance(connection, ssl.SSLSocket):
        for view in views:
            connection.sendall(view)
        return
    first = 0
    while first < len(views):
        first = _advance(views, first, connection.sendmsg(views[first : first + _VECTOR]))


def _advance(views: list[memoryview], first: int, count: int) -> int:
    """Cut ``count`` bytes off the views from ``first`` on; returns the first that is not used up."""
    while first < len(views) and count >= len(views[first]):
        count -= len(views[first])
        first += 1
    if count:
        views[first] = views[first][count:]
    return first
