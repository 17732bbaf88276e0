"""The tables of both machines, and everything that can happen to requests that move by them.

``WORLDS`` are searched to the end: about 200,000 states. ``MISTAKES`` are the same with something wrong in one place: a
table, a decision, a rule. Each has to be found, by the rule it breaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from deepstitch.runtime.disaggregated.states import (
    RECEIVER,
    SENDER,
    Machine,
    ReceiverEvent,
    ReceiverState,
    SenderEvent,
    SenderState,
    TransitionError,
)

from . import contract
from .contract import Answer, Decision, Record
from .explorer import Broken, Explored, Step, explore
from .model import LANDING_HELD, OFFERED_HELD, Rules
from .steps import search

NETWORK = ("loss", "duplicate")
DEATHS = ("connection", "encode dies", "language dies")
# States of each world, so that one that is searched less than before is noticed.
WORLDS: dict[str, tuple[dict[str, Any], int]] = {
    "encode pool smaller than a transfer": (
        {"faults": 0, "tokens": (2, 3), "first_tokens": 2, "landing_pool": (2, 1)},
        640,
    ),
    "room for one and a half": (
        {"faults": 0, "tokens": (2, 3), "first_tokens": 2, "encode_pool": (4, 2), "landing_pool": (3, 2)},
        598,
    ),
    "landing blocks are short": ({"tokens": (1, 1), "encode_pool": (2, 2), "kinds": ("read", "give up")}, 37_799),
    "three parts": ({"tokens": (3,)}, 3_134),
    "careless network": ({"faults": 2, "attempts": 1, "kinds": NETWORK}, 7_814),
    "encode blocks are short": (
        {"tokens": (1, 1), "landing_pool": (2, 2), "kinds": ("lease", "read", "give up")},
        20_487,
    ),
    "two faults": ({"faults": 2, "tokens": (2,), "survives": False}, 28_348),
    "both pools are short": ({"tokens": (1, 1)}, 111_717),
    "nobody hears of a death": ({"tokens": (2,), "half_open": True, "kinds": ("connection", "language dies")}, 941),
}
LARGE: dict[str, tuple[dict[str, Any], int]] = {
    "two rooms in parts": ({"tokens": (1, 2)}, 258_927),
    "two rooms side by side": ({"tokens": (1, 1), "landing_pool": (2, 2)}, 112_653),
    "two faults, three attempts": ({"faults": 2, "tokens": (2,), "attempts": 3}, 86_041),
}


def without(table: Mapping[Any, Any], state: Any, event: Any) -> dict[Any, Any]:
    """A table that lacks one entry."""
    return {key: target for key, target in table.items() if key != (state, event)}


def stages_again(record: Record | None, start: int) -> Decision:
    """Takes a late TransferInit for a new one."""
    if record and record.state is SenderState.WAITING_FOR_INPUT:
        return Decision(Answer.PENDING, SenderEvent.INIT)
    return contract.on_transfer(record, start)


def blames_early(record: Record | None, start: int) -> Decision:
    """Takes a TransferInit that comes while it encodes for a breach of the protocol."""
    if record and record.state is SenderState.BOOTSTRAPPING:
        return Decision(Answer.PROTOCOL)
    return contract.on_transfer(record, start)


def frees_again(record: Record | None, tokens: int) -> Decision:
    """Takes any Received for that of the part that is being read."""
    if record and record.state is SenderState.TRANSFERRING:
        return Decision(Answer.RELEASED, SenderEvent.RECEIVED)
    return contract.on_received(record, tokens)


def forgets(record: Record | None, *, abandoned: bool) -> Decision:
    """Leaves no tombstone of a room that was released before its request came."""
    return contract.on_release(record, abandoned=abandoned) if record else Decision(Answer.RELEASED)


def begins_again(record: Record | None) -> Decision:
    """Takes a late EncodeRequest for a new one."""
    over = record is None or record.state in contract.TERMINAL
    return Decision(Answer.PENDING, becomes=SenderState.BOOTSTRAPPING) if over else contract.on_encode(record)


def half_open(table: Mapping[Any, Any]) -> dict[str, Any]:
    return {"half_open": True, "kinds": ("language dies",), "sender": table}


STUCK = "stuck: nothing can happen any more, and it is not an end"
WRITTEN = "a landing block is not given back while a read may write it"
BLAMED = "a well-behaved peer is told that it broke the protocol"
ANSWERED = "every request is answered, but where the client gave up"
S, SE, R, RE = SenderState, SenderEvent, ReceiverState, ReceiverEvent
ALONE: dict[str, Any] = {"faults": 0, "attempts": 1}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "landing blocks are held while waiting for more": (
        {
            **ALONE,
            "tokens": (2, 2),
            "landing_pool": (2, 2),
            "landing_held": LANDING_HELD | {R.CONFIRMING, R.WAITING_FOR_INPUT, R.TRANSFERRING},
        },
        STUCK,
    ),
    "one takes landing blocks before its rows are ready": (
        {
            **ALONE,
            "tokens": (1, 1),
            "landing_first": frozenset({0}),
            "landing_held": LANDING_HELD | {R.WAITING_FOR_INPUT, R.TRANSFERRING},
        },
        STUCK,
    ),
    "blocks are held until the next part is asked for": (
        {
            **ALONE,
            "tokens": (2, 2),
            "encode_pool": (2, 2),
            "offered_held": OFFERED_HELD | {S.WAITING_FOR_INPUT, S.STAGING},
        },
        STUCK,
    ),
    "the encode side does not know what to do about a lost peer": (
        {"sender": without(SENDER, S.TRANSFERRING, SE.PEER_LOST)},
        "no place in the table for 'peer lost' in state 'transferring'",
    ),
    "the language side does not know what to do about a lost peer": (
        {"receiver": without(RECEIVER, R.BOOTSTRAPPING, RE.PEER_LOST)},
        "no place in the table for 'peer lost' in state 'bootstrapping'",
    ),
    "the language side does not know what to do about a lost peer while it waits for landing blocks": (
        {"receiver": without(RECEIVER, R.TRANSFERRING, RE.PEER_LOST)},
        "no place in the table for 'peer lost' in state 'transferring'",
    ),
    "the language side cannot be refused what it confirms": (
        {"receiver": without(RECEIVER, R.CONFIRMING, RE.REFUSED)},
        "no place in the table for 'refused' in state 'confirming'",
    ),
    "a lease does not end what is being read": (
        half_open(without(SENDER, S.TRANSFERRING, SE.LEASE_EXPIRED)),
        "no place in the table for 'lease expired' in state 'transferring'",
    ),
    "giving up ends a read": ({"receiver": {**RECEIVER, (R.READING, RE.GAVE_UP): R.FAILED}}, WRITTEN),
    "a lost peer ends a read": ({"receiver": {**RECEIVER, (R.READING, RE.PEER_LOST): R.FAILED}}, WRITTEN),
    "a failed read is not quarantined": ({"receiver": {**RECEIVER, (R.READING, RE.READ_FAILED): R.FAILED}}, WRITTEN),
    "the end of a room does not wait for its writer": (
        {"waits_for_writer": False},
        "a block is not given back while a thread fills it",
    ),
    "generations are not compared": (
        {"tokens": (1, 1), "landing_pool": (2, 2), "kinds": ("lease",), "checks_generations": False},
        "no bytes of another transfer are taken for one's own",
    ),
    "an early TransferInit is refused": ({**ALONE, "on_transfer": blames_early}, BLAMED),
    "a late TransferInit is staged": ({**ALONE, "faults": 1, "kinds": NETWORK, "on_transfer": stages_again}, BLAMED),
    "a late Received frees blocks": ({**ALONE, "faults": 1, "kinds": NETWORK, "on_received": frees_again}, ANSWERED),
    "a room that was released early is begun": ({"on_release": forgets}, STUCK),
    "a room that is over is begun again": ({"on_encode": begins_again}, STUCK),
    "a failed attempt is not released": ({"says_farewell": False}, STUCK),
    "the end of an old connection ends a new attempt": ({"by_connection": False}, ANSWERED),
}


def checked(explored: Explored, states: int) -> None:
    assert explored.violation is None, str(explored.violation)
    assert (explored.states, explored.ends > 0) == (states, True)


@pytest.mark.parametrize("world", WORLDS)
def test_whatever_happens_all_ends_well(world: str) -> None:
    options, states = WORLDS[world]
    checked(search(Rules(**options)), states)


@pytest.mark.slow
@pytest.mark.parametrize("world", LARGE)
def test_whatever_happens_in_a_larger_world(world: str) -> None:
    options, states = LARGE[world]
    checked(search(Rules(**options)), states)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    options, rule = MISTAKES[mistake]
    found = search(Rules(**{"tokens": (2,), **options})).violation
    assert found is not None
    assert found.rule == rule, str(found)


def test_a_mistake_is_shown_in_the_fewest_steps() -> None:
    found = search(Rules(tokens=(1,), receiver={**RECEIVER, (R.READING, RE.READ_FAILED): R.FAILED})).violation
    assert found is not None
    assert found.trace == (
        "arrives: encode 0 of 0.0",
        "encode 0.0: encoded",
        "arrives: encode 0 of 0.0",
        "arrives: encode 0 of 0.0: announcement",
        "arrives: transfer 0 of 0.0",
        "encode 0: blocks",
        "encode 0.0: blocks filled",
        "arrives: transfer 0 of 0.0",
        "arrives: transfer 0 of 0.0: ready",
        "language 0: landing blocks",
        "language 0: read fails, and may still write; that ends the connection",
    )


def walk(edges: Mapping[int, tuple[int, ...]], ends: set[int], bad: int | None = None) -> Explored:
    """Search a graph of numbers, where minus means a fault."""

    def successors(state: int) -> list[Step]:
        if 99 in edges.get(state, ()):
            raise Broken("ninety-nine")
        return [Step(f"to {abs(target)}", abs(target), target > 0) for target in edges.get(state, ())]

    return explore(
        0, successors, broken=lambda state: "bad" if state == bad else None, is_end=lambda state: state in ends
    )


def test_the_explorer_sees_all_and_takes_the_shortest_way() -> None:
    edges = {0: (1, 2), 1: (3,), 2: (4,), 3: (5,), 4: (3, 5)}
    assert walk(edges, {5}) == (6, 7, 1, None)
    found = walk(edges, {5}, bad=5).violation
    assert found is not None and found.rule == "bad" and len(found.trace) == 3


@pytest.mark.parametrize(
    ("edges", "rule", "trace"),
    [
        ({0: (1, 2), 1: (3,)}, STUCK, ("to 2",)),
        ({0: (1,), 1: (-2,)}, STUCK, ("to 1",)),  # a fault is no way out
        ({0: (1, 3), 1: (2,), 2: (1, 3)}, "in circles: the same comes again without a fault", ("to 1",)),
        ({0: (1,), 1: (99,)}, "ninety-nine", ("to 1",)),
    ],
)
def test_the_explorer_finds(edges: Mapping[int, tuple[int, ...]], rule: str, trace: tuple[str, ...]) -> None:
    assert walk(edges, {3}).violation == (rule, trace)


def test_a_circle_through_a_fault_is_none() -> None:
    assert walk({0: (1,), 1: (2, 3), 2: (-1, 3)}, {3}).violation is None


@pytest.mark.parametrize(("table", "start", "states"), [(SENDER, S.BOOTSTRAPPING, S), (RECEIVER, R.BOOTSTRAPPING, R)])
def test_every_state_is_reached_and_left(table: Mapping[Any, Any], start: Any, states: Any) -> None:
    reached = {start, *table.values()}
    assert reached == set(states)
    assert set(states) - {state for state, _ in table} == {states.SUCCESS, states.FAILED}


@pytest.mark.parametrize("state", [state for state in S if state not in contract.TERMINAL])
@pytest.mark.parametrize("event", [SE.ABANDON, SE.PEER_LOST, SE.LEASE_EXPIRED])
def test_the_encode_side_can_end_at_any_time(state: SenderState, event: SenderEvent) -> None:
    assert SENDER[state, event] is S.FAILED


def test_a_machine_moves_by_its_table_only() -> None:
    machine = Machine(SENDER, S.BOOTSTRAPPING)
    assert machine.can(SE.ENCODED) and not machine.can(SE.STAGED) and not machine.terminal
    with pytest.raises(TransitionError, match="'staged' in state 'bootstrapping'"):
        machine.on(SE.STAGED)
    assert machine.state is S.BOOTSTRAPPING
    assert machine.on(SE.ENCODED) is S.WAITING_FOR_INPUT
    assert machine.on(SE.PEER_LOST) is S.FAILED and machine.terminal
    assert not any(machine.can(event) for event in SE)
