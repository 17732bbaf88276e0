"""The life of one attempt of a request on either side, as tables; tests explore every interleaving of them.

Names follow the poll states of the prefill/decode disaggregation this design comes from. Terminal states are
tombstones: whatever arrives later changes nothing.

Which blocks are held follows from the state alone, but for one thing. The encode side holds blocks while TRANSFERRING:
they are staged, and the language side may be reading. A thread that fills blocks keeps them until it has ended, in
STAGING and in FAILED too. The language side holds landing blocks while READING and QUARANTINED: who waits for rows
keeps none from others, however long an encoder takes. It says ``Received`` before it asks for more. So blocks are taken
in one order, the encode side's before the language side's, and none are held while waiting for more of the same side;
else two requests could wait for each other's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Generic, TypeVar

__all__ = [
    "RECEIVER",
    "SENDER",
    "Machine",
    "ReceiverEvent",
    "ReceiverState",
    "SenderEvent",
    "SenderState",
    "TransitionError",
]


class TransitionError(RuntimeError):
    """An event came in a state that has no place for it: a bug on this side, or a peer that breaks the protocol."""


class SenderState(Enum):
    """Encode side."""

    BOOTSTRAPPING = "bootstrapping"  # accepted, being encoded; its sizes are announced as soon as they are known
    WAITING_FOR_INPUT = "waiting for input"  # encoded; holds no blocks
    STAGING = "staging"  # asked for, waiting for blocks
    TRANSFERRING = "transferring"  # blocks filled and announced; the other side reads
    SUCCESS = "success"
    FAILED = "failed"


class SenderEvent(Enum):
    """What happens to the encode side."""

    ENCODED = "encoded"
    ENCODE_FAILED = "encode failed"
    INIT = "init"  # TransferInit, or TransferResume after it
    STAGED = "staged"
    RECEIVED = "received"
    RELEASE = "release"
    ABANDON = "abandon"
    PEER_LOST = "peer lost"
    LEASE_EXPIRED = "lease expired"


class ReceiverState(Enum):
    """Language side."""

    BOOTSTRAPPING = "bootstrapping"  # request sent
    WAITING_FOR_INPUT = "waiting for input"  # announced, init or resume sent; holds no blocks
    TRANSFERRING = "transferring"  # rows lie ready on the other side; waiting for landing blocks
    READING = "reading"  # landing blocks held; the transport writes into them
    CONFIRMING = "confirming"  # copied out, blocks given back, Received sent; more is to come
    QUARANTINED = "quarantined"  # the attempt failed while its read went on, which may write until it has ended
    RELEASING = "releasing"  # all is here and used; Release is or will be sent
    SUCCESS = "success"
    FAILED = "failed"


class ReceiverEvent(Enum):
    """What happens to the language side."""

    ANNOUNCED = "announced"
    READY = "ready"
    ALLOCATED = "allocated"
    READ_PART = "read a part"
    READ_ALL = "read all"
    READ_FAILED = "read failed"
    CONFIRMED = "confirmed"
    TRANSPORT_CLOSED = "transport closed"  # or the read has come to an end of its own: nothing writes any more
    RELEASED = "released"
    REFUSED = "refused"
    PEER_LOST = "peer lost"
    GAVE_UP = "gave up"


_S, _SE, _R, _RE = SenderState, SenderEvent, ReceiverState, ReceiverEvent

SENDER: Mapping[tuple[SenderState, SenderEvent], SenderState] = MappingProxyType(
    {
        (_S.BOOTSTRAPPING, _SE.ENCODED): _S.WAITING_FOR_INPUT,
        (_S.BOOTSTRAPPING, _SE.ENCODE_FAILED): _S.FAILED,
        (_S.WAITING_FOR_INPUT, _SE.INIT): _S.STAGING,
        (_S.STAGING, _SE.STAGED): _S.TRANSFERRING,
        (_S.TRANSFERRING, _SE.RECEIVED): _S.WAITING_FOR_INPUT,
        (_S.TRANSFERRING, _SE.RELEASE): _S.SUCCESS,
        **{
            (state, event): _S.FAILED
            for state in (_S.BOOTSTRAPPING, _S.WAITING_FOR_INPUT, _S.STAGING, _S.TRANSFERRING)
            for event in (_SE.ABANDON, _SE.PEER_LOST, _SE.LEASE_EXPIRED)
        },
    }
)

RECEIVER: Mapping[tuple[ReceiverState, ReceiverEvent], ReceiverState] = MappingProxyType(
    {
        (_R.BOOTSTRAPPING, _RE.ANNOUNCED): _R.WAITING_FOR_INPUT,
        (_R.WAITING_FOR_INPUT, _RE.READY): _R.TRANSFERRING,
        (_R.TRANSFERRING, _RE.ALLOCATED): _R.READING,
        (_R.READING, _RE.READ_PART): _R.CONFIRMING,
        (_R.READING, _RE.READ_ALL): _R.RELEASING,
        (_R.READING, _RE.READ_FAILED): _R.QUARANTINED,
        (_R.CONFIRMING, _RE.CONFIRMED): _R.WAITING_FOR_INPUT,
        (_R.QUARANTINED, _RE.TRANSPORT_CLOSED): _R.FAILED,
        (_R.RELEASING, _RE.RELEASED): _R.SUCCESS,
        (_R.RELEASING, _RE.PEER_LOST): _R.SUCCESS,  # nothing of it is needed any more
        (_R.RELEASING, _RE.GAVE_UP): _R.SUCCESS,
        **{
            (state, event): _R.FAILED
            for state in (_R.BOOTSTRAPPING, _R.WAITING_FOR_INPUT, _R.TRANSFERRING, _R.CONFIRMING)
            for event in (_RE.REFUSED, _RE.PEER_LOST, _RE.GAVE_UP)
        },
    }
)

State = TypeVar("State", bound=Enum)
Event = TypeVar("Event", bound=Enum)


class Machine(Generic[State, Event]):
    """A state and the table it moves by.

    Attributes:
        state: where it is.
    """

    def __init__(self, table: Mapping[tuple[State, Event], State], start: State) -> None:
        self._table = table
        self._leaving = {state for state, _ in table}
        self.state = start

    @property
    def terminal(self) -> bool:
        """Nothing moves it any more."""
        return self.state not in self._leaving

    def can(self, event: Event) -> bool:
        """Whether the table has a place for ``event`` here."""
        return (self.state, event) in self._table

    def on(self, event: Event) -> State:
        """Move.

        Raises:
            TransitionError: the table has no such entry.
        """
        try:
            self.state = self._table[self.state, event]
        except KeyError:
            raise TransitionError(f"{event.value!r} in state {self.state.value!r}") from None
        return self.state
