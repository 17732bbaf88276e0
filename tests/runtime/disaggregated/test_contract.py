"""The encode side decides as ``contract`` says, which is what the model in ``model`` was searched with.

A room is brought into every state a record can have; there every message is sent, in time, late or out of turn, and the
answer and the new state are compared.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepstitch.runtime.disaggregated.buffers import BufferLayout
from deepstitch.runtime.disaggregated.config import Address, EncodeConfig
from deepstitch.runtime.disaggregated.conn_multimodal import sender
from deepstitch.runtime.disaggregated.conn_multimodal.sender import PreparedSizes, SenderTools
from deepstitch.runtime.disaggregated.errors import DisaggregationError, EncodeFailed, PeerLost
from deepstitch.runtime.disaggregated.faults import Faults
from deepstitch.runtime.disaggregated.messages import (
    Announcement,
    EncodeRequest,
    Pending,
    Received,
    Release,
    Released,
    RoomMessage,
    TransferInit,
    TransferReady,
    TransferResume,
)
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.pool import BlockPool
from deepstitch.runtime.disaggregated.states import SENDER, SenderEvent, SenderState

from . import contract
from .contract import Answer, Decision, Record

TOKENS = 3
NAMES: dict[str, Any] = {"seq": 1, "room": "0123456789abcdef" * 2, "attempt": 2}
KINDS = {
    Pending: Answer.PENDING,
    Announcement: Answer.ANNOUNCEMENT,
    TransferReady: Answer.READY,
    Released: Answer.RELEASED,
}
MESSAGES: dict[str, RoomMessage] = {
    "encode": EncodeRequest(**NAMES),
    "poll": EncodeRequest(**NAMES, poll=True),
    "init": TransferInit(**NAMES, tokens=1),
    **{f"resume {at}": TransferResume(**NAMES, sent_tokens=at, tokens=1) for at in (1, 2, 3)},
    **{f"received {tokens}": Received(**NAMES, tokens=tokens) for tokens in (1, 2, 3)},
    "release": Release(**NAMES),
    "abandon": Release(**NAMES, abandoned=True),
}
# "prepared": the sizes are known; "encoded", "fails": the encoder ends; "starve": a stranger takes all blocks;
# "lease", "gone": the room is ended
WAYS: dict[str, tuple[str, ...]] = {
    "never heard of": (),
    "released before it came": ("abandon",),
    "being encoded": ("encode",),
    "failed": ("encode", "fails"),
    "announced, and being encoded": ("encode", "prepared"),
    "asked for while it is encoded": ("encode", "prepared", "init"),
    "failed after its announcement": ("encode", "prepared", "init", "fails"),
    "announced": ("encode", "encoded"),
    "waiting for blocks": ("encode", "encoded", "starve", "init"),
    "ready": ("encode", "encoded", "init"),
    "received": ("encode", "encoded", "init", "received 1"),
    "waiting for blocks again": ("encode", "encoded", "init", "received 1", "starve", "resume 1"),
    "ready again": ("encode", "encoded", "init", "received 1", "resume 1"),
    "released": ("encode", "encoded", "init", "release"),
    "abandoned while encoding": ("encode", "abandon"),
    "abandoned": ("encode", "encoded", "init", "abandon"),
    "expired": ("encode", "encoded", "init", "lease"),
    "alone": ("encode", "encoded", "init", "gone"),
}


class Room:
    """A server with one room, and what the contract keeps of it."""

    def __init__(self) -> None:
        layout = BufferLayout(hidden_size=4, num_deepstack=1, block_tokens=1, num_blocks=2, num_deepstack_blocks=2)
        self.pool = BlockPool(layout, np.zeros(layout.nbytes, np.uint8))
        self.server = EncodeServer(EncodeConfig(bundle=Path("none"), listen=Address.parse("unix:none")))
        self.encoded: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.prepared: Any = None
        self.server._tools = SenderTools(
            encode=self.encode,
            pool=self.pool,
            epoch=NAMES["room"],
            checksums=True,
            faults=Faults(),
            finished=lambda outcome, sent, seconds: None,
        )
        self.record: Record | None = None
        self.slow = False  # blocks are not filled before the test says so

    async def encode(self, request: EncodeRequest, prepared: Any) -> Any:
        self.prepared = prepared
        return await self.encoded

    async def go(self, step: str) -> None:
        """One step of a way."""
        if step in MESSAGES:
            await self.send(step)
        elif step == "starve":
            assert self.pool.tokens.allocate("stranger", self.pool.tokens.free)
        elif step == "prepared":
            prompt = self.prompt()
            self.prepared(PreparedSizes(prompt=prompt.prompt, deepstack_rows=len(prompt.tokens.deepstack)))
            assert self.record
            self.record = self.record._replace(prepared=True)
        elif step == "encoded":
            await self.go("prepared")
            self.encoded.set_result(self.prompt())
            self.record = Record(SenderState.WAITING_FOR_INPUT)
        elif step == "fails":
            self.encoded.set_exception(EncodeFailed("on purpose"))
            self.record = Record(SenderState.FAILED)
        else:
            event = SenderEvent.LEASE_EXPIRED if step == "lease" else SenderEvent.PEER_LOST
            for room in self.server._rooms.values():
                room.end(event, PeerLost("on purpose"))
            self.record = Record(SenderState.FAILED)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def send(self, name: str) -> tuple[Answer, Decision]:
        """The answer of the server, and what was to be decided; the record follows."""
        decision = decide(self.record, MESSAGES[name])
        waits = self.slow or not self.encoded.done() or "stranger" in self.pool.tokens.owners
        sender._PATIENCE = 0.02 if waits else 10.0  # what comes by itself is waited for
        try:
            reply = await self.server.reply_to("peer", MESSAGES[name])
            answer = KINDS[type(reply)]
        except DisaggregationError as error:
            answer = Answer.PROTOCOL if error.code == "protocol" else Answer.FAILURE
        self.record = followed(self.record, MESSAGES[name], decision)
        if answer is Answer.READY and self.record and self.record.state is SenderState.STAGING:
            assert (reply.start, reply.count) == (self.record.start, 1)
            self.record = self.record._replace(state=SenderState.TRANSFERRING, count=reply.count)
        return answer, decision

    @property
    def state(self) -> SenderState | None:
        """Of the server's room; a tombstone counts as the terminal state it was."""
        rooms = list(self.server._rooms.values())
        if rooms:
            return rooms[0].machine.state
        terminal = self.record.state if self.record and self.record.state in contract.TERMINAL else SenderState.FAILED
        return terminal if self.server._tombstones else None

    @property
    def blocks(self) -> int:
        """Those of the room."""
        owners = [*self.pool.tokens.owners.items(), *self.pool.deepstack.owners.items()]
        return sum(len(blocks) for owner, blocks in owners if owner != "stranger")

    @staticmethod
    def prompt() -> Any:
        """Three tokens, one of them visual."""
        prompt = SimpleNamespace(
            input_ids=np.arange(TOKENS),
            position_ids=np.zeros((3, TOKENS), np.int64),
            rope_delta=0,
            vision=None,
            timestamps=(),
        )
        tokens = SimpleNamespace(embeds=np.ones((TOKENS, 4), np.float32), deepstack=np.ones((1, 4), np.float32))
        return SimpleNamespace(prompt=prompt, tokens=tokens, seconds={})


def decide(record: Record | None, message: RoomMessage) -> Decision:
    if isinstance(message, EncodeRequest):
        return contract.on_encode(record, poll=message.poll)
    if isinstance(message, TransferInit):
        return contract.on_transfer(record, 0)
    if isinstance(message, TransferResume):
        return contract.on_transfer(record, message.sent_tokens)
    if isinstance(message, Received):
        return contract.on_received(record, message.tokens)
    assert isinstance(message, Release)
    return contract.on_release(record, abandoned=message.abandoned)


def followed(record: Record | None, message: RoomMessage, decision: Decision) -> Record | None:
    """The record after a decision."""
    if decision.becomes:
        return Record(decision.becomes)
    if record is None or decision.event is None:
        return record
    record = record._replace(state=SENDER[record.state, decision.event])
    if decision.event is SenderEvent.INIT:
        return record._replace(start=getattr(message, "sent_tokens", 0), count=0)
    if decision.event is SenderEvent.RECEIVED:
        return record._replace(confirmed=message.tokens)  # type: ignore[attr-defined]
    return record


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests change it; this puts it back."""
    monkeypatch.setattr(sender, "_PATIENCE", sender._PATIENCE)


def run(body: Callable[[Room], Any]) -> None:
    async def main() -> None:
        room = Room()
        await body(room)
        for each in room.server._rooms.values():
            each.end(SenderEvent.PEER_LOST, PeerLost("the test is over"))
        for _ in range(100):
            if not room.blocks:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("blocks of a room that has ended are not free")

    asyncio.run(main())


@pytest.mark.parametrize("way", WAYS)
def test_the_server_follows_the_contract(way: str) -> None:
    async def body(room: Room, name: str) -> None:
        for step in WAYS[way]:
            await room.go(step)
        assert room.state is (room.record.state if room.record else None)
        answer, decision = await room.send(name)
        allowed = {decision.answer} | ({Answer.READY} if decision.event is SenderEvent.INIT else set())
        assert answer in allowed, (way, name)
        assert room.state is (room.record.state if room.record else None), (way, name)
        if room.record and room.record.state is not SenderState.TRANSFERRING:
            assert not room.blocks, (way, name)
        again, _ = await room.send(name)
        assert again is decide(room.record, MESSAGES[name]).answer, f"{way}: {name} for the second time"

    for name in MESSAGES:
        run(lambda room, name=name: body(room, name))


def test_the_same_part_is_offered_each_time() -> None:
    async def body(room: Room) -> None:
        for step in WAYS["ready"]:
            await room.go(step)
        first, second = [await room.server.reply_to("peer", MESSAGES["init"]) for _ in range(2)]
        assert first == second and room.blocks == 2

    run(body)


def test_every_attempt_and_every_connection_has_rooms_of_its_own() -> None:
    async def body(room: Room) -> None:
        for step in WAYS["ready"]:
            await room.go(step)
        newer = Release(**{**NAMES, "attempt": 3}, abandoned=True)
        for peer, message in (("peer", newer), ("other", MESSAGES["abandon"]), ("other", MESSAGES["release"])):
            assert isinstance(await room.server.reply_to(peer, message), Released)
        assert room.state is SenderState.TRANSFERRING and room.blocks == 2
        with pytest.raises(DisaggregationError, match="no such room"):
            await room.server.reply_to("other", MESSAGES["received 1"])
        with pytest.raises(DisaggregationError, match="no such room"):
            await room.server.reply_to("other", MESSAGES["encode"])  # its tombstone is there

    run(body)


def test_the_thread_that_fills_blocks_keeps_them_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    fill = sender.Sender._fill

    def slow(self: Any, *arguments: Any) -> Any:
        go_on.wait(10)
        return fill(self, *arguments)

    async def body(room: Room) -> None:
        monkeypatch.setattr(sender.Sender, "_fill", slow)
        monkeypatch.setattr(sender, "_AT_ONCE", 0)
        room.slow = True
        for step in ("encode", "encoded", "init", "gone"):
            await room.go(step)
        assert room.state is SenderState.FAILED and room.blocks == 2
        go_on.set()

    try:
        run(body)
    finally:
        go_on.set()
