"""The real receiver takes every way of its table, and no other; whichever it takes, its blocks are free again."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from deepstitch.runtime.disaggregated.buffers import BufferLayout
from deepstitch.runtime.disaggregated.config import Address
from deepstitch.runtime.disaggregated.conn_multimodal.receiver import Receiver, ReceiverTools
from deepstitch.runtime.disaggregated.errors import DisaggregationError, PeerLost, ProtocolError, RequestRefused
from deepstitch.runtime.disaggregated.faults import Faults
from deepstitch.runtime.disaggregated.messages import (
    Announcement,
    EncodeRequest,
    Item,
    Received,
    Release,
    Released,
    TransferInit,
    TransferReady,
    TransferResume,
)
from deepstitch.runtime.disaggregated.pool import BlockPool
from deepstitch.runtime.disaggregated.states import RECEIVER, Machine, ReceiverEvent, ReceiverState

LAYOUT = BufferLayout(hidden_size=4, num_deepstack=1, block_tokens=1, num_blocks=1, num_deepstack_blocks=1)
REQUEST = EncodeRequest(seq=0, room="ab" * 16, attempt=0, images=(b"x",))
NAMES = {"seq": 0, "room": REQUEST.room, "attempt": 0}
STAGES = {EncodeRequest: "encode", TransferInit: "init", TransferResume: "resume", Received: "received"}
WAYS: list[tuple[str, str]] = [("nowhere", "")]
WAYS += [(stage, how) for stage in ("encode", "init", "blocks", "received", "release") for how in ("lost", "cancelled")]
WAYS += [(stage, "refused") for stage in ("encode", "sizes", "init", "blocks", "received")]
WAYS += [("read", how) for how in ("lost", "cancelled")]


class FarSide:
    """A link whose other side fails at one stage: it refuses, is lost, or says nothing until the client goes away."""

    address, lease, epoch, layout = Address(path="none"), 10.0, "e", LAYOUT

    def __init__(self, stage: str, how: str) -> None:
        self.caller, self.stage, self.how = self, stage, how
        self.lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.reached = asyncio.Event()
        self.farewells: list[Release] = []
        self.released: asyncio.Task[None] | None = None

    async def call(self, message: Any) -> Any:
        await self.at(STAGES.get(type(message), "release"))
        if isinstance(message, EncodeRequest):
            rows = 2 if self.stage == "sizes" else 1  # there is one block
            item = Item(key="00", grid=(1, 2, 2))
            return Announcement(**NAMES, total_tokens=2, deepstack_rows=rows, rope_delta=0, items=(item,))
        if isinstance(message, (TransferInit, TransferResume)):
            start = getattr(message, "sent_tokens", 0)
            if self.stage == "blocks":
                asyncio.get_running_loop().call_later(0.02, self.go)
            blocks = () if start else (0,)
            words = (1,) * (1 + len(blocks))
            return TransferReady(
                **NAMES, start=start, count=1, blocks=(0,), deepstack_blocks=blocks, generations=words, checksums=()
            )
        return Released(**NAMES)

    def reads_at_once(self, spans: Any) -> bool:
        return False

    async def read(self, spans: Any, *, accept: Any, timeout: float, limit: float, wanted: asyncio.Future[None]) -> Any:
        if self.stage == "read" and self.how == "cancelled":
            self.reached.set()
            await asyncio.wait({wanted})
            raise DisaggregationError("not begun")
        await self.at("read")
        accept(np.ones(2, np.uint64))

    async def at(self, stage: str) -> None:
        if stage != self.stage:
            return
        self.reached.set()
        if self.how == "cancelled":
            await asyncio.Event().wait()
        raise PeerLost("on purpose") if self.how == "lost" else RequestRefused("on purpose")

    def go(self) -> None:
        self.reached.set()
        if self.how != "cancelled":
            self.lost.set_result(PeerLost("on purpose") if self.how == "lost" else ProtocolError("on purpose"))

    def attend(self, farewell: Any) -> None:
        self.released = asyncio.create_task(farewell())

    def dismiss(self, message: Release) -> None:
        self.farewells.append(message)


async def take(stage: str, how: str, monkeypatch: pytest.MonkeyPatch) -> set[tuple[ReceiverState, ReceiverEvent]]:
    """The entries of the table that were used on this way."""
    used = []
    move = Machine.on
    monkeypatch.setattr(Machine, "on", lambda self, event: (used.append((self.state, event)), move(self, event))[1])
    monkeypatch.setattr(Receiver, "_accept", lambda *_: None)
    pool = BlockPool(LAYOUT, np.zeros(LAYOUT.nbytes, np.uint8))
    if stage == "blocks":
        pool.tokens.allocate("stranger", 1)
    far: Any = FarSide(stage, how)
    tools = ReceiverTools(
        pool=pool, first_tokens=1, hang=1.0, deadline=0.0, faults=Faults(), mark=lambda name, begin, end: None
    )
    receiver = Receiver(tools, far, REQUEST)
    running = asyncio.create_task(receiver.run())
    if how == "cancelled":
        await far.reached.wait()
        (far.released or running).cancel()
    (outcome,) = await asyncio.wait_for(asyncio.gather(running, return_exceptions=True), 5)
    if far.released:  # the prompt is there before
        await asyncio.wait({far.released})
    monkeypatch.undo()
    fine = stage in ("nowhere", "release")
    assert isinstance(outcome, BaseException) is not fine
    assert bool(far.farewells) is not fine and all(each.abandoned for each in far.farewells)
    assert receiver.machine.state is (ReceiverState.SUCCESS if fine else ReceiverState.FAILED)
    pool.release("stranger")
    await asyncio.sleep(0)
    assert pool.idle
    return set(used)


def test_every_entry_of_the_table_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set().union(*[asyncio.run(take(stage, how, monkeypatch)) for stage, how in WAYS])
    assert used == set(RECEIVER)
