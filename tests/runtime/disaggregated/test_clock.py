"""The clock of a process on another machine, and spans of a request that begin there."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepstitch.runtime.disaggregated import guests, multimodal_embedding
from deepstitch.runtime.disaggregated.clock import PeerClock
from deepstitch.runtime.disaggregated.conn_multimodal import sender
from deepstitch.runtime.disaggregated.trace import ENCODE, LANGUAGE, Span, Trace

from .pair import ask, pair, png

AHEAD = 1000.0


def test_the_quickest_of_the_last_answers_counts() -> None:
    clock = PeerClock(shared=False)
    clock.observe(10.0, 110.9, 11.0)
    assert (clock.here(200.0), clock.error) == (pytest.approx(99.6), 0.5)
    clock.observe(20.0, 120.11, 20.2)
    assert (clock.here(200.0), clock.error) == (pytest.approx(99.99), pytest.approx(0.1))
    for second in range(30, 60):  # one that drifts
        clock.observe(second, second + 101.5, second + 1.0)
    assert (clock.here(200.0), clock.error) == (99.0, 0.5)


def test_one_machine_has_one_clock() -> None:
    clock = PeerClock(shared=True)
    clock.observe(10.0, 17.0, 10.1)
    assert (clock.here(5.0), clock.error) == (5.0, 0.0)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_spans_of_both_processes_are_told_in_one_time(
    plain_bundle: Path, pictures: Any, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over tcp the encode process has the clock of another machine."""
    if transport == "tcp":
        shifted = SimpleNamespace(monotonic=lambda: time.monotonic() + AHEAD)
        for module in (guests, multimodal_embedding, sender):
            monkeypatch.setattr(module, "time", shifted)

    async def run() -> list[Span]:
        async with pair(plain_bundle, transport=transport) as (_, language):
            trace = Trace(LANGUAGE)
            await ask(language, "what is it?", [png(pictures[0])], trace=trace)
            return trace.spans

    spans = asyncio.run(run())
    named = {span.name: span for span in spans}
    error = named["encode"].detail.get("clock known to ms", 0.0) / 1000
    assert (error > 0) is (transport == "tcp") and error < 1
    assert [span.name for span in spans if span.process == ENCODE] == ["preprocess", "encode"]
    begin, end = named["wait for sizes"].begin - error, named["wait for rows"].end + error
    assert begin <= named["preprocess"].begin <= named["preprocess"].end == named["encode"].begin
    assert named["encode"].end <= end
