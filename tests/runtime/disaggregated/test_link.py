"""The link to an encode process: where its pool is looked for, and reads that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepstitch.runtime.disaggregated.config import Address
from deepstitch.runtime.disaggregated.conn_multimodal import link as links
from deepstitch.runtime.disaggregated.conn_multimodal.link import Link
from deepstitch.runtime.disaggregated.errors import DisaggregationError, PeerHung, PeerLost

NOBODY = Address.parse("unix:/nonexistent/encode.sock")


@pytest.mark.parametrize(
    ("transport", "endpoint", "dialled", "expected"),
    [
        ("tcp", {"host": "elsewhere", "port": "5"}, "tcp://here:7000", {"host": "here", "port": "5"}),
        ("nixl", {"host": "elsewhere"}, "tcp://here:7000", {"host": "elsewhere"}),
        ("nixl", {"host": "0.0.0.0"}, "tcp://here:7000", {"host": "here"}),
        ("shm", {"path": "run/pool.sock"}, "unix:/there/run/e.sock", {"path": "/there/run/pool.sock"}),
        ("shm", {"path": "/run/pool.sock"}, "unix:/there/run/e.sock", {"path": "/there/run/pool.sock"}),
    ],
)
def test_the_pool_is_where_the_encode_process_was_found(
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
    endpoint: dict[str, str],
    dialled: str,
    expected: dict[str, str],
) -> None:
    monkeypatch.setattr(links, "open_importer", lambda name, found, *_, **__: found)
    welcome: Any = SimpleNamespace(transport=transport, endpoint=endpoint, ticket="")
    found: Any = links._importer(welcome, Address.parse(dialled), np.zeros(1, np.uint8), None)
    assert found == expected


class SlowImporter:
    """Reads that last until they are let go, or it is closed."""

    immediate = False

    def __init__(self) -> None:
        self.go_on, self.closed, self.reads = threading.Event(), False, 0

    def read(self, spans: Any, *, timeout: float) -> None:
        self.reads += 1
        assert self.go_on.wait(10)
        if self.closed:
            raise PeerLost("closed")

    def close(self) -> None:
        self.closed = True
        self.go_on.set()


def link_with(importer: Any) -> Link:
    caller: Any = SimpleNamespace(address=NOBODY, lost=asyncio.get_running_loop().create_future())
    caller.fail = lambda error: caller.lost.done() or caller.lost.set_result(error)
    layout = SimpleNamespace(model=SimpleNamespace(hidden_size=4, num_deepstack=1), block_tokens=1)
    welcome: Any = SimpleNamespace(**vars(layout), num_blocks=1, num_deepstack_blocks=1, epoch="e", lease_seconds=1.0)
    return Link(caller, welcome, importer, np.zeros(links.SCRATCH_BYTES, np.uint8))


def test_a_read_that_nobody_wants_any_more_does_not_begin() -> None:
    async def run() -> None:
        importer = SlowImporter()
        link, wanted = link_with(importer), [asyncio.get_running_loop().create_future() for _ in range(2)]
        first, second = [
            asyncio.create_task(link.read([], accept=len, timeout=9, limit=9, wanted=each)) for each in wanted
        ]
        await asyncio.sleep(0.05)
        wanted[1].cancel()
        importer.go_on.set()
        await first
        with pytest.raises(DisaggregationError, match="nobody waits"):
            await second
        assert importer.reads == 2  # data and generations of the first
        assert not link.caller.lost.done()

    asyncio.run(run())


def test_a_read_that_never_ends_is_ended() -> None:
    async def run() -> None:
        importer = SlowImporter()
        link = link_with(importer)
        with pytest.raises(PeerHung, match="did not end within"):
            await link.read([], accept=len, timeout=9, limit=0.1, wanted=asyncio.get_running_loop().create_future())
        assert importer.closed

    asyncio.run(run())


def test_a_failed_read_ends_the_link_even_if_it_is_cancelled_meanwhile() -> None:
    class Gone(SlowImporter):
        immediate = True

        def read(self, spans: Any, *, timeout: float) -> None:
            raise PeerLost("gone")

        def close(self) -> None:
            assert self.go_on.wait(10)

    async def run() -> None:
        importer = Gone()
        link = link_with(importer)
        wanted = asyncio.get_running_loop().create_future()
        reading = asyncio.create_task(link.read([], accept=len, timeout=9, limit=9, wanted=wanted))
        await asyncio.sleep(0.05)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        importer.go_on.set()
        assert link.caller.lost.done()

    asyncio.run(run())
