"""A transport inside one process, for tests, and faults for any transport.

Not among the transports that can be chosen by name: a test makes a :class:`FakeTransport`, or puts :class:`Faulty`
around the importer of another.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.disaggregated.errors import (
    DisaggregationError,
    HandshakeRefused,
    PeerHung,
    PeerLost,
    ProtocolError,
    StaleTransfer,
)
from deepstitch.runtime.disaggregated.transport import Importer, Span
from deepstitch.runtime.disaggregated.transport.sockets import new_memory, text_in

__all__ = ["FakeExporter", "FakeImporter", "FakeTransport", "Fault", "FaultKind", "Faulty", "Schedule", "at_random"]


class FaultKind(Enum):
    """What goes wrong with a read."""

    FAIL_BEFORE = "fails before a byte moved"
    FAIL_MIDWAY = "fails when about half has arrived"
    SHORT = "leaves out the last byte, and says nothing"
    CORRUPT = "flips a bit, and says nothing"
    STALE = "delivers what the pool was like when the reader connected, and says nothing"
    DELAY = "takes longer"
    HANG = "does not come back until it is closed, or times out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        error: raised by the kinds that fail.
        seconds: of a delay.
    """

    kind: FaultKind
    error: type[DisaggregationError] = PeerLost
    seconds: float = 0.01


Schedule = Callable[[int], "Fault | None"]  # from the number of a read, 0 for the first, to its fault


def at_random(
    probability: float, *, seed: int, kinds: Sequence[FaultKind] = (FaultKind.FAIL_BEFORE, FaultKind.FAIL_MIDWAY)
) -> Schedule:
    """Every read fails with ``probability``, in one of ``kinds``; the same reads for the same seed."""

    def schedule(number: int) -> Fault | None:
        generator = random.Random(f"{seed}:{number}")
        return Fault(kind=generator.choice(kinds)) if generator.random() < probability else None

    return schedule


class FakeTransport:
    """Pools of this process, found by name.

    Attributes:
        schedule: faults of the reads of every importer, counted together; None: none.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        self.schedule = schedule
        self._exporters: dict[str, FakeExporter] = {}
        self._reads = 0
        self._lock = threading.Lock()

    def open_exporter(self, nbytes: int, where: str) -> FakeExporter:
        """A pool of ``nbytes``; ``where`` is part of its name only."""
        exporter = FakeExporter(nbytes, where)
        self._exporters[exporter.endpoint["name"]] = exporter
        return exporter

    def open_importer(
        self, endpoint: Mapping[str, str], ticket: str, local: npt.NDArray[np.uint8]
    ) -> FakeImporter | Faulty:
        """Connect to a pool made by this object.

        Raises:
            PeerLost: no such pool, or it was closed.
            HandshakeRefused: the ticket is not taken.
        """
        exporter = self._exporters.get(text_in(endpoint, "name"))
        if exporter is None:
            raise PeerLost(f"no pool {endpoint['name']!r}")
        importer = FakeImporter(exporter, ticket)
        if self.schedule is None:
            return importer
        return Faulty(importer, lambda _: self._next_fault(), snapshot=exporter.memory.copy())

    def _next_fault(self) -> Fault | None:
        with self._lock:
            number, self._reads = self._reads, self._reads + 1
        return self.schedule(number) if self.schedule is not None else None


class FakeExporter:
    """Encode side; see :class:`~deepstitch.runtime.disaggregated.transport.Exporter`."""

    def __init__(self, nbytes: int, where: str = "") -> None:
        self.memory = new_memory(nbytes)
        self.endpoint: Mapping[str, str] = {"name": f"{where}#{secrets.token_hex(4)}", "nbytes": str(nbytes)}
        self.tickets: set[str] = set()
        self.closed = False

    def admit(self, ticket: str) -> None:
        """Let whoever shows ``ticket`` read."""
        self.tickets.add(ticket)

    def revoke(self, ticket: str) -> None:
        """Take it no more."""
        self.tickets.discard(ticket)

    def close(self) -> None:
        """Readers find the peer lost."""
        self.closed = True


class FakeImporter:
    """Language side; see :class:`~deepstitch.runtime.disaggregated.transport.Importer`."""

    immediate = True

    def __init__(self, exporter: FakeExporter, ticket: str) -> None:
        self._exporter = exporter
        self._ticket = ticket
        self._closed = False
        if exporter.closed:
            raise PeerLost("the pool was closed")
        if ticket not in exporter.tickets:
            raise HandshakeRefused("the ticket is not taken")

    def read(self, spans: Sequence[Span], *, timeout: float) -> None:
        """See :class:`~deepstitch.runtime.disaggregated.transport.Importer`."""
        memory = self._exporter.memory
        if any(offset < 0 or offset + len(local) > len(memory) for offset, local in spans):
            raise ProtocolError(f"a span is not in the pool of {len(memory)} bytes")
        for offset, local in spans:
            self._check()
            local[:] = memory[offset : offset + len(local)]
        self._check()

    def close(self) -> None:
        """Later reads fail."""
        self._closed = True

    def _check(self) -> None:
        if self._closed or self._exporter.closed:
            raise PeerLost("the connection was closed")
        if self._ticket not in self._exporter.tickets:
            raise StaleTransfer("the ticket was revoked")


class Faulty:
    """An importer whose reads go wrong as scheduled. Any error ends it, as with the real ones."""

    immediate = False

    def __init__(
        self, importer: Importer, schedule: Schedule, *, snapshot: npt.NDArray[np.uint8] | None = None
    ) -> None:
        """``snapshot`` is what stale reads deliver; without one, they leave local memory as it is."""
        self._importer = importer
        self._schedule = schedule
        self._snapshot = snapshot
        self._reads = 0
        self._closed = threading.Event()

    def read(self, spans: Sequence[Span], *, timeout: float) -> None:
        """See :class:`~deepstitch.runtime.disaggregated.transport.Importer`."""
        fault, self._reads = self._schedule(self._reads), self._reads + 1
        try:
            if fault is None:
                self._importer.read(spans, timeout=timeout)
            else:
                self._fail(fault, [span for span in spans if len(span.local)], timeout)
        except DisaggregationError:
            self.close()
            raise

    def close(self) -> None:
        """End it; a hanging read comes back."""
        self._closed.set()
        self._importer.close()

    def _fail(self, fault: Fault, spans: list[Span], timeout: float) -> None:
        kind = fault.kind
        if kind is FaultKind.FAIL_BEFORE:
            raise fault.error("a fault for a test, before the read")
        if kind is FaultKind.HANG:
            self._hang(timeout)
        if kind is FaultKind.DELAY and self._closed.wait(fault.seconds):
            raise PeerLost("closed while it waited")
        if kind is FaultKind.STALE:
            self._deliver_snapshot(spans)
            return
        if kind in (FaultKind.FAIL_MIDWAY, FaultKind.SHORT):
            spans = _shortened(spans, half=kind is FaultKind.FAIL_MIDWAY)
        self._importer.read(spans, timeout=timeout)
        if kind is FaultKind.FAIL_MIDWAY:
            raise fault.error("a fault for a test, in the middle of the read")
        if kind is FaultKind.CORRUPT and spans:
            local = spans[len(spans) // 2].local
            local[len(local) // 2] ^= 1

    def _hang(self, timeout: float) -> None:
        if self._closed.wait(timeout):
            raise PeerLost("closed while it hung")
        raise PeerHung(f"nothing arrived for {timeout:g} s")

    def _deliver_snapshot(self, spans: list[Span]) -> None:
        if self._snapshot is not None:
            for offset, local in spans:
                local[:] = self._snapshot[offset : offset + len(local)]


def _shortened(spans: list[Span], *, half: bool) -> list[Span]:
    if not spans:
        return spans
    kept = spans[: len(spans) // 2 + 1] if half else spans
    offset, local = kept[-1]
    return [*kept[:-1], Span(offset, local[: len(local) // 2 if half else len(local) - 1])]
