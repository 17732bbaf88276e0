"""All transports through the same tests: bytes, tickets, and whatever may happen to the process on the other side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from deepstitch.runtime.disaggregated.errors import HandshakeRefused, PeerHung, PeerLost, ProtocolError, StaleTransfer
from deepstitch.runtime.disaggregated.transport import Span, open_exporter, open_importer
from deepstitch.runtime.disaggregated.transport.sockets import new_memory

from .transport_cases import (
    KINDS,
    ONE_SIDED,
    PATIENCE,
    POOL,
    TICKET,
    Background,
    Peer,
    name_of,
    pattern,
    peer_of,
    resources,
    skip_if_missing,
    spans_of,
    wait_until,
)

EXPECTED = pattern()
FOREIGN = 0xEE


@pytest.fixture(scope="module", params=KINDS)
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    """One process per transport, for the tests that leave it well."""
    skip_if_missing(request.param)
    with peer_of(request.param) as started:
        yield started


@pytest.fixture(params=KINDS)
def victim(request: pytest.FixtureRequest) -> Iterator[Peer]:
    """A process of its own for a test that does not."""
    skip_if_missing(request.param)
    with peer_of(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def local() -> np.ndarray:
    return new_memory(POOL)


def read_again_and_again(importer: object, spans: list[Span], timeout: float = 30.0) -> Callable[[], None]:
    def loop() -> None:
        while True:
            importer.read(spans, timeout=timeout)  # type: ignore[attr-defined]

    return loop


def test_bytes_arrive_where_they_belong_and_nowhere_else(peer: Peer, local: np.ndarray) -> None:
    importer = peer.connect(local)
    for count in (0, 1, 7, 5000):
        local.fill(0)
        spans = spans_of(local, count, seed=count)
        importer.read(spans, timeout=10.0)
        for offset, landed in spans:
            assert np.array_equal(landed, EXPECTED[offset : offset + len(landed)])
            landed.fill(0)
        assert not local.any()
    importer.read([Span(0, local)], timeout=10.0)
    assert np.array_equal(local, EXPECTED)
    importer.close()


def test_two_readers_at_once(peer: Peer) -> None:
    halves = new_memory(POOL // 2), new_memory(POOL // 2)
    importers = [peer.connect(half) for half in halves]
    reads = [
        Background(lambda place=place: importers[place].read([Span(place * POOL // 2, halves[place])], timeout=10.0))
        for place in (0, 1)
    ]
    for place, each in enumerate(reads):
        each.wait()
        assert each.error is None
        importers[place].close()
        assert np.array_equal(halves[place], EXPECTED[place * POOL // 2 :][: POOL // 2])


def test_spans_outside_of_the_pool_are_refused_and_nothing_moves(peer: Peer, local: np.ndarray) -> None:
    local.fill(0)
    importer = peer.connect(local)
    for offset, count in ((POOL - 9, 10), (POOL, 1), (-1, 1), (1 << 62, 1)):
        with pytest.raises(ProtocolError, match="not in its pool"):
            importer.read([Span(0, local[:100]), Span(offset, local[200 : 200 + count])], timeout=1.0)
    assert not local.any()
    with pytest.raises(ValueError, match="outside of the memory"):
        importer.read([Span(0, np.zeros(10, np.uint8))], timeout=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        importer.read([Span(0, local[::2])], timeout=1.0)
    importer.read([Span(POOL - 10, local[:10])], timeout=1.0)
    assert np.array_equal(local[:10], EXPECTED[-10:])
    importer.close()


def test_a_wrong_ticket_is_refused(peer: Peer, local: np.ndarray) -> None:
    for ticket in ("", "0", TICKET[:-1], TICKET + "0", "f" * 128):
        with pytest.raises(HandshakeRefused, match="ticket"):
            peer.connect(local, ticket)


def test_a_revoked_ticket_ends_its_connections_only(peer: Peer, local: np.ndarray) -> None:
    other = peer.connect(local)
    peer.tell("admit", "beef")
    importer = peer.connect(local, "beef")
    importer.read([Span(0, local[:10])], timeout=1.0)
    peer.tell("revoke", "beef")
    time.sleep(0.02)
    # under TLS nothing can be said any more once reading was shut down
    with pytest.raises(PeerLost if peer.kind == "tls" else StaleTransfer):
        importer.read([Span(0, local[:10])], timeout=1.0)
    importer.close()
    with pytest.raises(HandshakeRefused):
        peer.connect(local, "beef")
    other.read([Span(0, local[:10])], timeout=1.0)
    other.close()


def test_a_revoked_ticket_ends_a_read_under_way(peer: Peer, local: np.ndarray) -> None:
    peer.tell("admit", "beef")
    importer = peer.connect(local, "beef")
    read = Background(read_again_and_again(importer, [Span(0, local)]))
    time.sleep(0.05)
    peer.tell("revoke", "beef")
    read.wait()
    assert isinstance(read.error, StaleTransfer | PeerLost)
    importer.close()


def test_closing_ends_a_read_under_way(peer: Peer, local: np.ndarray) -> None:
    importer = peer.connect(local)
    if peer.kind not in ONE_SIDED:
        peer.stop()
    try:
        read = Background(read_again_and_again(importer, [Span(0, local)]))
        time.sleep(0.05)
        started = time.monotonic()
        importer.close()
        assert time.monotonic() - started < 2.0
    finally:
        peer.go_on()
    read.wait()
    assert isinstance(read.error, PeerLost)
    assert "on this side" in str(read.error)
    with pytest.raises(PeerLost, match="on this side"):
        importer.read([], timeout=1.0)
    importer.close()


def test_a_process_killed_before_is_lost_at_once(victim: Peer, local: np.ndarray) -> None:
    importer = victim.connect(local)
    victim.end()
    started = time.monotonic()
    with pytest.raises(PeerLost):
        importer.read([Span(0, local[:10])], timeout=5.0)
    assert time.monotonic() - started < 0.1
    importer.close()
    with pytest.raises(PeerLost, match="cannot connect"):
        victim.connect(local)


def test_a_process_killed_in_mid_transfer_is_noticed_in_100_ms(victim: Peer, local: np.ndarray) -> None:
    importer = victim.connect(local)
    read = Background(read_again_and_again(importer, [Span(0, local)]))
    time.sleep(0.1)
    assert read.error is None
    victim.process.kill()
    victim.process.wait()
    dead = time.monotonic()
    read.wait()
    assert isinstance(read.error, PeerLost)
    assert read.ended - dead < 0.1
    importer.close()


def test_a_stopped_process_hangs_or_does_not_matter(peer: Peer, local: np.ndarray) -> None:
    importer = peer.connect(local)
    importer.read([Span(0, local[:10])], timeout=PATIENCE)
    local.fill(0)
    peer.stop()
    try:
        started = time.monotonic()
        if peer.kind in ONE_SIDED:
            importer.read([Span(0, local)], timeout=PATIENCE)
            assert np.array_equal(local, EXPECTED)
        else:
            with pytest.raises(PeerHung, match=f"{PATIENCE:g} s"):
                importer.read([Span(0, local)], timeout=PATIENCE)
            assert 0.8 * PATIENCE < time.monotonic() - started < PATIENCE + 0.1
            with pytest.raises(PeerLost):
                importer.read([Span(0, local)], timeout=PATIENCE)
    finally:
        peer.go_on()
    importer.close()


def test_a_late_writer_writes_nothing(peer: Peer, local: np.ndarray) -> None:
    """Stopped in mid-transfer; the reader gives up; its memory belongs to someone else; the sender goes on."""
    local.fill(0)
    importer = peer.connect(local)
    read = Background(lambda: importer.read([Span(0, local)], timeout=PATIENCE))
    wait_until(lambda: local[1 << 20] or read.ended)
    peer.stop()
    try:
        read.wait()
        assert read.error is None or isinstance(read.error, PeerHung)
        if peer.kind == "shm":  # NIXL may still be setting up its connection
            assert read.error is None
        importer.close()
        local.fill(FOREIGN)
    finally:
        peer.go_on()
    time.sleep(0.3)
    assert np.count_nonzero(local != FOREIGN) == 0
    again = peer.connect(local)
    again.read([Span(0, local)], timeout=10.0)
    assert np.array_equal(local, EXPECTED)
    again.close()


def test_nothing_is_left_of_importers(peer: Peer, local: np.ndarray) -> None:
    def once() -> None:
        importer = peer.connect(local)
        importer.read([Span(0, local)], timeout=10.0)
        importer.close()
        importer.close()

    once()  # what a library keeps from its first use
    before = resources()
    for _ in range(2):
        once()
        with pytest.raises(HandshakeRefused):
            peer.connect(local, "wrong")
    wait_until(lambda: resources() == before, 3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_exporters(kind: str, tmp_path: Path) -> None:
    skip_if_missing(kind)
    local = new_memory(1 << 20)

    def once() -> None:
        exporter = open_exporter(name_of(kind), 1 << 20, where=str(tmp_path) if kind == "shm" else "127.0.0.1")
        exporter.admit(TICKET)
        exporter.memory[:] = 7
        importer = open_importer(name_of(kind), exporter.endpoint, TICKET, local=local)
        importer.read([Span(0, local)], timeout=5.0)
        assert (local == 7).all()
        exporter.close()
        with pytest.raises(PeerLost):
            importer.read([Span(0, local)], timeout=5.0)
        importer.close()
        exporter.close()
        with pytest.raises(PeerLost):
            open_importer(name_of(kind), exporter.endpoint, TICKET, local=local)

    once()
    before = resources()
    for _ in range(2):
        once()
    wait_until(lambda: resources() == before, 3.0)
    assert list(tmp_path.iterdir()) == []
