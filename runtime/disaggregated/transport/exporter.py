"""What the pools behind a TCP port have in common: the gate in front of them, and how they end."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.disaggregated.transport.gate import Gate, Guest

__all__ = ["GatedExporter"]


class GatedExporter:
    """Base of the exporters that a reader finds at a host and port; see the protocol ``Exporter``.

    Attributes:
        memory: the pool.
        endpoint: ``host``, ``port`` of the gate, and ``nbytes``.
    """

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        listener: socket.socket,
        host: str,
        *,
        serve: Callable[[Guest], None] | None = None,
        greeting: bytes = b"",
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Open the gate at ``listener``; the rest is as for :class:`Gate`."""
        self.memory = memory
        self._gate = Gate(listener, serve, greeting=greeting, context=context)
        self.endpoint: Mapping[str, str] = {
            "host": host,
            "port": str(self._gate.address[1]),
            "nbytes": str(len(memory)),
        }

    def admit(self, ticket: str) -> None:
        """Let whoever shows ``ticket`` read."""
        self._gate.admit(ticket)

    def revoke(self, ticket: str) -> None:
        """End its connections.

        Over tcp, not a byte more leaves for them. A reader that was told an engine's address could go on reading from
        it, but not unnoticed.
        """
        self._gate.revoke(ticket)

    def close(self) -> None:
        """Stop serving; the memory itself goes with its last array."""
        self._gate.close()
        self._free()
        self.memory = np.zeros(0, np.uint8)

    def _free(self) -> None:
        """Give up what holds the memory."""
