"""The transport for tests: honest without faults, and each fault does what it says and nothing else."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from deepstitch.runtime.disaggregated.errors import HandshakeRefused, PeerHung, PeerLost, ProtocolError, StaleTransfer
from deepstitch.runtime.disaggregated.transport import Importer, Span
from deepstitch.runtime.disaggregated.transport.fake import (
    FakeExporter,
    FakeTransport,
    Fault,
    FaultKind,
    Faulty,
    Schedule,
    at_random,
)

from .transport_cases import Background, pattern

NBYTES = 10_000
EXPECTED = pattern(NBYTES)


def pair(schedule: Schedule | None = None) -> tuple[FakeExporter, Importer, np.ndarray]:
    fake, local = FakeTransport(schedule), np.zeros(NBYTES, np.uint8)
    exporter = fake.open_exporter(NBYTES, "here")
    with pytest.raises(HandshakeRefused):
        fake.open_importer(exporter.endpoint, "ab", local)
    exporter.admit("ab")
    exporter.memory[:] = 1
    importer = fake.open_importer(exporter.endpoint, "ab", local)
    exporter.memory[:] = EXPECTED
    return exporter, importer, local


def first_read(fault: Fault) -> Schedule:
    return lambda number: fault if number == 0 else None


def halves(local: np.ndarray) -> list[Span]:
    return [Span(0, local[:5000]), Span(5000, local[5000:5000]), Span(5000, local[5000:])]


def test_without_faults() -> None:
    exporter, importer, local = pair()
    importer.read(halves(local), timeout=1.0)
    assert np.array_equal(local, EXPECTED)
    importer.read([], timeout=1.0)
    with pytest.raises(ProtocolError, match="not in the pool"):
        importer.read([Span(NBYTES - 1, local[:2])], timeout=1.0)
    exporter.revoke("ab")
    with pytest.raises(StaleTransfer):
        importer.read(halves(local), timeout=1.0)
    exporter.close()
    with pytest.raises(PeerLost):
        importer.read(halves(local), timeout=1.0)
    with pytest.raises(PeerLost):
        FakeTransport().open_importer(exporter.endpoint, "ab", local)


@pytest.mark.parametrize("error", [PeerLost, PeerHung, StaleTransfer])
def test_failing_reads(error: type[PeerLost]) -> None:
    _, importer, local = pair(first_read(Fault(kind=FaultKind.FAIL_BEFORE, error=error)))
    with pytest.raises(error, match="for a test"):
        importer.read(halves(local), timeout=1.0)
    assert not local.any()
    with pytest.raises(PeerLost):  # as with the real ones, an error is the end
        importer.read(halves(local), timeout=1.0)
    _, importer, local = pair(first_read(Fault(kind=FaultKind.FAIL_MIDWAY, error=error)))
    with pytest.raises(error, match="in the middle"):
        importer.read(halves(local), timeout=1.0)
    assert 0 < np.count_nonzero(local) < NBYTES


@pytest.mark.parametrize("kind", [FaultKind.SHORT, FaultKind.CORRUPT, FaultKind.STALE])
def test_reads_that_are_wrong_and_say_nothing(kind: FaultKind) -> None:
    _, importer, local = pair(first_read(Fault(kind=kind)))
    importer.read(halves(local), timeout=1.0)
    wrong = np.flatnonzero(local != EXPECTED)
    if kind is FaultKind.SHORT:
        assert wrong.tolist() == [NBYTES - 1]
    elif kind is FaultKind.CORRUPT:
        assert len(wrong) == 1
        assert int((local ^ EXPECTED)[wrong[0]]) in (1 << np.arange(8)).tolist()
    else:
        assert (local == 1).all()
    importer.read(halves(local), timeout=1.0)
    assert np.array_equal(local, EXPECTED)


def test_slow_reads() -> None:
    _, importer, local = pair(first_read(Fault(kind=FaultKind.DELAY, seconds=0.05)))
    started = time.monotonic()
    importer.read(halves(local), timeout=1.0)
    assert time.monotonic() - started >= 0.05
    assert np.array_equal(local, EXPECTED)


@pytest.mark.parametrize("closed", [False, True])
def test_hanging_reads(closed: bool) -> None:
    _, importer, local = pair(first_read(Fault(kind=FaultKind.HANG)))
    read = Background(lambda: importer.read(halves(local), timeout=5.0 if closed else 0.05))
    if closed:
        importer.close()
    read.wait(2.0)
    assert isinstance(read.error, PeerLost if closed else PeerHung)
    assert not local.any()


def test_random_faults_are_the_same_for_the_same_seed() -> None:
    schedule, again, other = (at_random(0.25, seed=seed) for seed in (1, 1, 2))
    faults = [schedule(number) for number in range(2000)]
    assert faults == [again(number) for number in range(2000)]
    assert faults != [other(number) for number in range(2000)]
    counts = Counter(fault.kind if fault else None for fault in faults)
    assert set(counts) == {None, FaultKind.FAIL_BEFORE, FaultKind.FAIL_MIDWAY}
    assert 400 < 2000 - counts[None] < 600


def test_faults_around_another_importer() -> None:
    fake, local = FakeTransport(), np.zeros(NBYTES, np.uint8)
    exporter = fake.open_exporter(NBYTES, "here")
    exporter.admit("ab")
    exporter.memory[:] = EXPECTED
    importer = Faulty(fake.open_importer(exporter.endpoint, "ab", local), first_read(Fault(kind=FaultKind.STALE)))
    importer.read(halves(local), timeout=1.0)
    assert not local.any()
    importer.read(halves(local), timeout=1.0)
    assert np.array_equal(local, EXPECTED)
    importer.close()
    with pytest.raises(PeerLost):
        importer.read(halves(local), timeout=1.0)
