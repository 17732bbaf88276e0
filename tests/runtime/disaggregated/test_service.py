"""Whether the thread that computes works."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from deepstitch.runtime.disaggregated import service
from deepstitch.runtime.disaggregated.service import ComputeThread

CLOCK = pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="the platform has no such clock")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_LOOK_SECONDS", 0.05)


def probed(ahead: Callable[[threading.Event], object], *, timeout: float = 10.0, patience: float = 60.0) -> int | None:
    """What a probe finds while ``ahead`` is in the thread, until its event is set."""

    async def run() -> int | None:
        thread, end = ComputeThread("test"), threading.Event()
        first = asyncio.create_task(thread.run(lambda: ahead(end)))
        await asyncio.sleep(0.1)
        try:
            return await thread.probe(lambda: 7, timeout=timeout, patience=patience)
        finally:
            end.set()
            await first
            assert await thread.probe(lambda: 8, timeout=10.0, patience=0.0) == 8
            await thread.close()

    return asyncio.run(run())


def spin(end: threading.Event) -> None:
    while not end.is_set():
        sum(range(1000))


def look_now_and_then(end: threading.Event) -> None:
    while not end.is_set():
        time.sleep(0.01)


def test_its_turn_comes() -> None:
    assert probed(lambda _: None) == 7
    assert probed(lambda end: end.wait(0.15)) == 7


@CLOCK
def test_it_computes_for_somebody_else() -> None:
    assert probed(spin) is None


@pytest.mark.parametrize("ahead", [lambda end: end.wait(20), look_now_and_then], ids=["blocked", "sleeps"])
def test_it_stands_still(ahead: Callable[[threading.Event], object]) -> None:
    with pytest.raises(asyncio.TimeoutError):
        probed(ahead, timeout=0.3)


def test_patience_ends() -> None:
    with pytest.raises(asyncio.TimeoutError):
        probed(spin, timeout=0.3, patience=0.1)


def test_without_a_clock_only_results_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    with pytest.raises(asyncio.TimeoutError):
        probed(spin, timeout=0.3)
    assert probed(lambda _: None) == 7


def test_errors_of_the_work_are_raised() -> None:
    async def run() -> None:
        thread = ComputeThread("test")
        with pytest.raises(ZeroDivisionError):
            await thread.probe(lambda: 1 // 0, timeout=10.0, patience=1.0)
        await thread.close()

    asyncio.run(run())
