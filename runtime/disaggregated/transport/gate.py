"""The connection that every transport keeps besides, or instead of, its own: ticket first, then a sign of life.

The reader connects, sends its ticket (one byte of length, then the ticket) and gets one byte back: ``A`` admitted, with
a greeting behind it (four bytes of length, then the bytes); ``N`` no such ticket; ``B`` too many connections. From then
on the connection stands for the life of the pool: its end is the death of the other process, and ``R`` on it says that
the ticket was revoked.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from deepstitch.runtime.disaggregated.errors import HandshakeRefused, PeerBusy, PeerHung, PeerLost, StaleTransfer

__all__ = ["KNOCK_SECONDS", "Gate", "Guest", "check_alive", "check_news", "end", "knock", "receive_exactly"]

KNOCK_SECONDS = 5.0
_MAX_GUESTS = 256
_ADMITTED, _REFUSED, _BUSY, _REVOKED = b"A", b"N", b"B", b"R"
_LENGTH = struct.Struct("!I")
_DESCRIPTOR = struct.Struct("i")
_MAX_GREETING = 1 << 20
_MAX_DESCRIPTORS = 1


def end(connection: socket.socket) -> None:
    """Make every call on ``connection``, under way in other threads too, see its end.

    Below TLS: shutting down an ``SSLSocket`` would make its later calls read and write in the clear.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def receive_exactly(connection: socket.socket, count: int, deadline: float | None = None) -> bytes:
    """``count`` bytes, or fewer where the connection ends before.

    Raises:
        TimeoutError: ``deadline`` (of ``time.monotonic``) passed, however often a byte dripped in.
    """
    data = bytearray()
    while len(data) < count:
        if deadline is not None:
            _set_deadline(connection, deadline)
        piece = connection.recv(count - len(data))
        if not piece:
            break
        data += piece
    return bytes(data)


def _set_deadline(connection: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)


class Guest:
    """One connection on the encode side.

    Attributes:
        connection: its socket.
        ticket: what it showed; empty before.
        revoked: that ticket is not good any more.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.ticket = ""
        self.revoked = False
        self._replying = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def reply(self) -> Iterator[None]:
        """While inside, bytes of the pool are on their way out; a revoked guest does not get in.

        Raises:
            ConnectionError: revoked.
        """
        with self._lock:
            if self.revoked:
                raise ConnectionAbortedError
            self._replying = True
        try:
            yield
        finally:
            with self._lock:
                self._replying = False

    def revoke(self) -> None:
        """End it: in the middle of a reply at once, else its thread says so first."""
        with self._lock:
            self.revoked = True
            if self._replying:
                end(self.connection)
            else:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self.connection, socket.SHUT_RD)


class Gate:
    """Lets in who shows an admitted ticket, each in a thread of its own.

    Attributes:
        address: of the listening socket.
    """

    def __init__(
        self,
        listener: socket.socket,
        serve: Callable[[Guest], None] | None = None,
        *,
        greeting: bytes = b"",
        descriptors: Sequence[int] = (),
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Start to accept.

        Args:
            listener: listening; closed with the gate.
            serve: what is done for an admitted guest, until it returns; None: wait for the connection's end.
            greeting: sent to every admitted guest.
            descriptors: file descriptors handed out with it, over unix sockets.
            context: TLS.
        """
        self.address = listener.getsockname()
        self._listener = listener
        self._serve = serve or _wait_for_end
        self._greeting = _ADMITTED + _LENGTH.pack(len(greeting)) + greeting
        self._descriptors = list(descriptors)
        self._context = context
        self._lock = threading.Lock()
        self._closed = False
        self._tickets: set[str] = set()
        self._guests: dict[Guest, threading.Thread] = {}
        self._thread = threading.Thread(target=self._accept, name="deepstitch-gate", daemon=True)
        self._thread.start()

    def admit(self, ticket: str) -> None:
        """Take ``ticket`` from now on."""
        with self._lock:
            self._tickets.add(ticket)

    def revoke(self, ticket: str) -> None:
        """Take it no more, and end the connections that came with it."""
        with self._lock:
            self._tickets.discard(ticket)
            for guest in self._guests:
                if guest.ticket == ticket:
                    guest.revoke()

    def close(self) -> None:
        """End everything; returns when no thread is left."""
        with self._lock:
            first, self._closed = not self._closed, True
            guests = dict(self._guests)
        if not first:
            return
        end(self._listener)  # wakes the thread in accept()
        self._listener.close()
        for guest in guests:
            end(guest.connection)
        for thread in (self._thread, *guests.values()):
            thread.join()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                time.sleep(0 if self._closed else 0.02)  # out of file descriptors, or the caller went away
                continue
            with self._lock:
                if self._closed or len(self._guests) >= _MAX_GUESTS:
                    with contextlib.suppress(OSError):
                        connection.send(_BUSY, socket.MSG_DONTWAIT)
                    connection.close()
                    continue
                guest = Guest(connection)
                thread = threading.Thread(target=self._host, args=(guest,), name="deepstitch-guest", daemon=True)
                self._guests[guest] = thread
                thread.start()

    def _host(self, guest: Guest) -> None:
        try:
            if self._context is not None:
                guest.connection.settimeout(KNOCK_SECONDS)
                secured = self._context.wrap_socket(guest.connection, server_side=True, do_handshake_on_connect=False)
                guest.connection = secured
                if self._closed:  # close() may have ended the socket that went into this one
                    return
                secured.do_handshake()
            if self._lets_in(guest):
                self._serve(guest)
            if guest.revoked:
                guest.connection.settimeout(1.0)
                guest.connection.sendall(_REVOKED)
        except OSError:
            pass  # TLS errors and timeouts included: whoever it was sees the connection end
        finally:
            with self._lock:
                del self._guests[guest]
            guest.connection.close()

    def _lets_in(self, guest: Guest) -> bool:
        deadline = time.monotonic() + KNOCK_SECONDS
        length = receive_exactly(guest.connection, 1, deadline)
        ticket = receive_exactly(guest.connection, length[0], deadline) if length else b""
        with self._lock:
            known = [each for each in self._tickets if hmac.compare_digest(each.encode(), ticket)]
            guest.ticket = known[0] if known else ""
        guest.connection.settimeout(KNOCK_SECONDS)
        if not known:
            guest.connection.sendall(_REFUSED)
        elif self._descriptors:
            socket.send_fds(guest.connection, [self._greeting], self._descriptors)
        else:
            guest.connection.sendall(self._greeting)
        guest.connection.settimeout(None)
        return bool(known)


def _wait_for_end(guest: Guest) -> None:
    guest.connection.recv(1)  # nothing may come, so a byte is an end too


def knock(connection: socket.socket, ticket: str, *, peer: str) -> tuple[bytes, list[int]]:
    """Show ``ticket`` at a gate; returns its greeting and file descriptors. Closes ``connection`` on any error.

    Args:
        connection: connected.
        ticket: hex digits.
        peer: who that is, for messages.

    Raises:
        HandshakeRefused: the ticket is not taken.
        PeerBusy: too many connections there.
        PeerLost: the connection ended.
        PeerHung: no answer.
    """
    descriptors: list[int] = []
    try:
        return _knock(connection, ticket, peer, descriptors), descriptors
    except BaseException as error:
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, TimeoutError):
            raise PeerHung(f"{peer}: no answer to the ticket within {KNOCK_SECONDS:g} s") from None
        if isinstance(error, OSError):
            raise PeerLost(f"{peer}: the connection ended before the ticket was taken ({error})") from None
        raise


def _knock(connection: socket.socket, ticket: str, peer: str, descriptors: list[int]) -> bytes:
    deadline = time.monotonic() + KNOCK_SECONDS
    connection.settimeout(KNOCK_SECONDS)
    shown = ticket.encode()
    connection.sendall(bytes([len(shown)]) + shown)
    if connection.family == socket.AF_UNIX:
        # socket.recv_fds() does not hand its flags on, and a child process must not inherit these
        room = socket.CMSG_LEN(_MAX_DESCRIPTORS * _DESCRIPTOR.size)
        head, ancillary, _, _ = connection.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(data) - len(data) % _DESCRIPTOR.size
                descriptors.extend(number for (number,) in _DESCRIPTOR.iter_unpack(data[:whole]))
    else:
        head = connection.recv(1)
    if head == _REFUSED:
        raise HandshakeRefused(f"{peer}: the ticket is not taken; it belongs to another connection or was revoked")
    if head == _BUSY:
        raise PeerBusy(f"{peer}: holds as many connections as it admits")
    length = receive_exactly(connection, _LENGTH.size, deadline)
    if head != _ADMITTED or len(length) < _LENGTH.size:
        raise PeerLost(f"{peer}: the connection ended before the ticket was taken")
    (size,) = _LENGTH.unpack(length)
    greeting = receive_exactly(connection, min(size, _MAX_GREETING), deadline)
    if len(greeting) < size:
        raise PeerLost(f"{peer}: the connection ended in the middle of the greeting")
    return greeting


def check_alive(connection: socket.socket, peer: str) -> None:
    """Look at a connection on which nothing is to come; it must not block.

    Raises:
        PeerLost: it ended.
        StaleTransfer: the ticket was revoked.
    """
    try:
        news = connection.recv(1)
    except (BlockingIOError, InterruptedError):
        return
    except OSError as error:
        raise PeerLost(f"{peer}: the connection ended ({error})") from None
    check_news(news, peer)


def check_news(news: bytes, peer: str) -> None:
    """What a byte, or none, instead of silence means.

    Raises:
        PeerLost: it ended.
        StaleTransfer: the ticket was revoked.
    """
    if news == _REVOKED:
        raise StaleTransfer(f"{peer}: the ticket was revoked")
    raise PeerLost(f"{peer}: the process ended, or closed the connection")
