"""How bytes of a pool get from the encode to the language process: one interface, several ways.

The language side reads; nobody ever writes into another process's memory. So a sender that was stopped and goes on late
can spoil nothing, and a destination is free again as soon as its own reader has ended. The reader checks block
generations, stamps and checksums itself (:mod:`deepstitch.runtime.disaggregated.conn_multimodal`); a transport only
moves bytes, and says how it failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import ssl

__all__ = ["TRANSPORTS", "Exporter", "Importer", "Span", "open_exporter", "open_importer"]

TRANSPORTS = ("shm", "tcp", "mooncake", "nixl")


class Span(NamedTuple):
    """``len(local)`` bytes from ``offset`` of the remote pool, and where they go."""

    offset: int
    local: npt.NDArray[np.uint8]


class Exporter(Protocol):
    """Encode side: a pool that others may read.

    Attributes:
        memory: ``(nbytes,)`` uint8, zeros at the beginning; the pool itself.
        endpoint: what a reader needs to find it; strings by name.
    """

    memory: npt.NDArray[np.uint8]
    endpoint: Mapping[str, str]

    def admit(self, ticket: str) -> None:
        """Let whoever shows ``ticket`` read."""
        ...

    def revoke(self, ticket: str) -> None:
        """End the connections that came with ``ticket``, and take no more."""
        ...

    def close(self) -> None:
        """Stop serving and free everything; may be called twice."""
        ...


class Importer(Protocol):
    """Language side: reads the pool of one encode process. One thread reads at a time; any thread may close.

    Attributes:
        immediate: reading is copying memory, which never waits for the other process.
    """

    immediate: bool

    def read(self, spans: Sequence[Span], *, timeout: float) -> None:
        """Fill the local side of every span.

        Raises:
            PeerLost: the other process ended.
            PeerHung: no progress for ``timeout`` seconds.
            StaleTransfer: the ticket was revoked, or the pool is not the announced one.
            ProtocolError: a span is not in the pool; nothing was read, and the connection stands.
            ValueError: the local side of a span is not a piece of the memory the importer was opened with.
        """
        ...

    def close(self) -> None:
        """End the connection; a read under way in another thread fails.

        After this returned and that read has failed, no local memory changes any more. May be called twice.
        """
        ...


def open_exporter(name: str, nbytes: int, *, where: str, context: ssl.SSLContext | None = None) -> Exporter:
    """Make a pool of ``nbytes`` that can be read over transport ``name``.

    Args:
        name: one of :data:`TRANSPORTS`.
        nbytes: size.
        where: ``shm``: folder for the socket; others: host or address to listen at.
        context: TLS, for ``tcp`` only.

    Raises:
        InputError: no such transport, or it cannot be had there.
        MissingDependency: its package is not installed.
    """
    return _module(name, context).open_exporter(nbytes, where, **({"context": context} if context else {}))


def open_importer(
    name: str,
    endpoint: Mapping[str, str],
    ticket: str,
    *,
    local: npt.NDArray[np.uint8],
    context: ssl.SSLContext | None = None,
) -> Importer:
    """Connect to the pool at ``endpoint``.

    Args:
        name: one of :data:`TRANSPORTS`.
        endpoint: as the encode side announced it.
        ticket: as the encode side gave it to this connection.
        local: the memory that the spans lie in, for transports that must register it.
        context: TLS, for ``tcp`` only.

    Raises:
        PeerLost: nobody answers there, or the connection ended.
        PeerHung: no answer to the ticket.
        PeerBusy: too many connections there.
        HandshakeRefused: the ticket is not taken.
        StaleTransfer: the pool is not the announced one.
        ProtocolError: the endpoint is not one of this transport.
        InputError: no such transport.
        MissingDependency: its package is not installed.
    """
    return _module(name, context).open_importer(endpoint, ticket, local, **({"context": context} if context else {}))


def _module(name: str, context: ssl.SSLContext | None) -> Any:
    import importlib

    from deepstitch.errors import InputError, did_you_mean

    if name not in TRANSPORTS:
        hint = did_you_mean(name, TRANSPORTS)
        raise InputError(f"transport {name!r} does not exist{hint}; use one of {', '.join(TRANSPORTS)}")
    if context is not None and name != "tcp":
        raise InputError(f"transport {name} has no TLS; use transport tcp, or leave the certificate out")
    return importlib.import_module(f"deepstitch.runtime.disaggregated.transport.{name}")
