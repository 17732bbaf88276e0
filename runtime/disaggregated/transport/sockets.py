"""Addresses, endpoints and memory: what the transports need besides their own way of moving bytes."""

from __future__ import annotations

import contextlib
import mmap
import socket
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.errors import PeerLost, ProtocolError
from deepstitch.runtime.disaggregated.transport.gate import KNOCK_SECONDS

__all__ = ["connect", "keep_alive", "listen", "new_memory", "number_in", "text_in"]

# An idle connection to a machine that is gone ends after 5 + 3 * 2 seconds.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))


def listen(host: str) -> socket.socket:
    """Listen on a free port of ``host``.

    Raises:
        InputError: that is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server((str(address[0]), 0), family=family, backlog=64)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen at {host!r} ({error}); pass an address of this machine") from None


def connect(endpoint: Mapping[str, str], peer: str) -> socket.socket:
    """Connect to the host and port of ``endpoint``.

    Raises:
        PeerLost: nobody answers there.
        ProtocolError: the endpoint has none.
    """
    address = text_in(endpoint, "host"), number_in(endpoint, "port")
    try:
        connection = socket.create_connection(address, timeout=KNOCK_SECONDS)
    except (OSError, OverflowError, UnicodeError) as error:
        raise PeerLost(f"{peer}: cannot connect ({error})") from None
    keep_alive(connection)
    return connection


def keep_alive(connection: socket.socket) -> None:
    """No waiting for more to send; notice a machine that is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def text_in(endpoint: Mapping[str, str], name: str) -> str:
    """An entry of ``endpoint``, which is another process's word.

    Raises:
        ProtocolError: it is missing.
    """
    if name not in endpoint:
        raise ProtocolError(f"the other side announced a pool without {name!r}: {sorted(endpoint)}")
    return endpoint[name]


def number_in(endpoint: Mapping[str, str], name: str) -> int:
    """An entry that is a whole number.

    Raises:
        ProtocolError: it is missing or none.
    """
    text = text_in(endpoint, name)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ProtocolError(f"the other side announced a pool with {name} {text!r}, which is no number")
    return int(text)


def new_memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """``(nbytes,)`` zeros from the beginning of a page on, all of it really there.

    Raises:
        InputError: there is no such memory.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"cannot make a pool of {nbytes} bytes ({error}); ask for fewer or smaller blocks") from None
    with contextlib.suppress(OSError):  # a kernel without
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    memory.fill(0)  # now, not in the middle of the first transfer
    return memory
