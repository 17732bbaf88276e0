"""What the encode side does with a message, where the table of states leaves it open.

Pure functions from what is kept of an attempt to the event its machine gets and the answer that is sent. The model in
``model.py`` runs on them, and ``test_contract.py`` holds the server to them.

The encode side keeps a record per connection, room and attempt: None is one it has never heard of, a terminal one is a
tombstone. So the end of a connection concerns only attempts that came by it, and a late message of an earlier attempt
finds that attempt, never a newer one.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from deepstitch.runtime.disaggregated.states import SenderEvent, SenderState

TERMINAL = (SenderState.SUCCESS, SenderState.FAILED)


class Record(NamedTuple):
    """What the encode side keeps of an attempt.

    Attributes:
        start: first token of the part that was asked for last.
        count: tokens of it; 0 before it is staged.
        confirmed: tokens the language side has.
        prepared: its sizes are known, though it may still be being encoded.
    """

    state: SenderState
    start: int = 0
    count: int = 0
    confirmed: int = 0
    prepared: bool = False


class Answer(Enum):
    """What goes back, with the seq of the request."""

    PENDING = "pending"  # the other side asks again
    ANNOUNCEMENT = "announcement"
    READY = "ready"  # the staged part, the same each time
    RELEASED = "released"  # to Received and to Release
    FAILURE = "failure"  # what the attempt failed of, or "stale"
    PROTOCOL = "protocol"  # Failure(code="protocol"): no well-behaved peer gets here


class Decision(NamedTuple):
    """``event`` goes to the record's machine, or a record in state ``becomes`` is made; then ``answer`` is sent."""

    answer: Answer
    event: SenderEvent | None = None
    becomes: SenderState | None = None


def on_encode(record: Record | None, *, poll: bool = False) -> Decision:
    """``EncodeRequest``; a poll never begins anything."""
    if record is None:
        return Decision(Answer.FAILURE) if poll else Decision(Answer.PENDING, becomes=SenderState.BOOTSTRAPPING)
    if record.state in TERMINAL:
        return Decision(Answer.FAILURE)
    unknown = record.state is SenderState.BOOTSTRAPPING and not record.prepared
    return Decision(Answer.PENDING if unknown else Answer.ANNOUNCEMENT)


def on_transfer(record: Record | None, start: int) -> Decision:
    """``TransferInit``, where ``start`` is 0, and ``TransferResume``, where it is ``sent_tokens``.

    Who knows the sizes may ask for the rows: the answer comes when they are encoded and staged.
    """
    if record is None or record.state in TERMINAL:
        return Decision(Answer.FAILURE)
    if start < record.confirmed:
        return Decision(
            Answer.FAILURE
        )  # of an earlier part, come twice: nothing is staged, nobody waits for the answer
    if record.state is SenderState.BOOTSTRAPPING and record.prepared and not start:
        return Decision(Answer.PENDING)
    if record.state is SenderState.BOOTSTRAPPING or start > record.confirmed:
        return Decision(Answer.PROTOCOL)
    if record.state is SenderState.WAITING_FOR_INPUT:
        return Decision(Answer.PENDING, SenderEvent.INIT)
    if start != record.start:
        return Decision(Answer.PROTOCOL)
    return Decision(Answer.READY if record.state is SenderState.TRANSFERRING else Answer.PENDING)


def on_received(record: Record | None, tokens: int) -> Decision:
    """``Received``: it frees blocks only if it speaks of the part that lies in them."""
    if record is None or record.state in TERMINAL:
        return Decision(Answer.FAILURE)
    if tokens <= record.confirmed:
        return Decision(Answer.RELEASED)
    if record.state is SenderState.TRANSFERRING and tokens == record.start + record.count:
        return Decision(Answer.RELEASED, SenderEvent.RECEIVED)
    return Decision(Answer.PROTOCOL)


def on_release(record: Record | None, *, abandoned: bool) -> Decision:
    """``Release``: answered with ``Released`` whatever became of the attempt.

    Where the attempt is not known, its ``EncodeRequest`` may still be under way, and would begin work that nobody waits
    for: a tombstone stops it.
    """
    if record is None:
        return Decision(Answer.RELEASED, becomes=SenderState.FAILED)
    if record.state in TERMINAL:
        return Decision(Answer.RELEASED)
    whole = record.state is SenderState.TRANSFERRING and not abandoned
    return Decision(Answer.RELEASED, SenderEvent.RELEASE if whole else SenderEvent.ABANDON)
