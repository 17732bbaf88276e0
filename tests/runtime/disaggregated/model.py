"""Requests, both machines of each, two pools and a careless network, as states that ``explorer`` can search.

Every room is one request. The real tables move both machines, ``contract`` decides what the encode side answers.
Besides what the processes do by themselves there are faults, ``faults`` of them in all, at any point: a message is
lost, a request arrives twice, the connection ends, either process dies, a lease runs out, encoding or a read fails, the
client goes away. Without a fault, too, messages overtake each other, the end of a connection is noticed late, and
messages of an earlier attempt are still under way when the next one runs.

What is simplified: a block holds one token, or all DeepStack rows. A generation is kept as what it is good for: an
offer is ``fresh`` until its blocks are given back. Whether the data are right is ``clean``: until somebody writes into
these blocks. Sizes are known as soon as encoding begins: where they are not yet, a request might as well come later. A
request whose answer is Pending stays under way, which is asking again. An answer that nobody waits for vanishes, which
is what ``seq`` does. A read in QUARANTINED may write until the transport is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deepstitch.runtime.disaggregated.states import RECEIVER, SENDER, TransitionError
from deepstitch.runtime.disaggregated.states import ReceiverEvent as RE
from deepstitch.runtime.disaggregated.states import ReceiverState as R
from deepstitch.runtime.disaggregated.states import SenderEvent as SE
from deepstitch.runtime.disaggregated.states import SenderState as S

from . import contract
from .contract import TERMINAL, Answer, Decision, Record

LANDING_HELD = frozenset({R.READING, R.QUARANTINED})
OFFERED_HELD = frozenset({S.TRANSFERRING})
OVER = (R.SUCCESS, R.FAILED)
UNINTERRUPTED = (R.READING, R.QUARANTINED)  # PEER_LOST and GAVE_UP wait until nothing writes any more
ASKS = {R.BOOTSTRAPPING: "encode", R.WAITING_FOR_INPUT: "transfer", R.CONFIRMING: "received", R.RELEASING: "release"}
FAULTS = ("loss", "duplicate", "connection", "encode dies", "language dies", "lease", "encode fails", "read", "give up")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is searched. The defaults are the protocol; tests put something wrong in one place."""

    tokens: tuple[int, ...] = (1, 2)  # of each room
    first_tokens: int = 1  # most of one transfer
    encode_pool: tuple[int, int] = (1, 1)  # blocks of tokens, and of DeepStack rows
    landing_pool: tuple[int, int] = (1, 1)
    faults: int = 1
    kinds: tuple[str, ...] = FAULTS
    attempts: int = 2
    survives: bool = True  # every request is answered, but where the client gave up
    half_open: bool = False  # the encode side never hears that a connection ended; leases run out
    sender: Mapping[tuple[S, SE], S] = field(default_factory=lambda: SENDER)
    receiver: Mapping[tuple[R, RE], R] = field(default_factory=lambda: RECEIVER)
    landing_held: frozenset[R] = LANDING_HELD
    offered_held: frozenset[S] = OFFERED_HELD
    on_encode: Callable[..., Decision] = contract.on_encode
    on_transfer: Callable[..., Decision] = contract.on_transfer
    on_received: Callable[..., Decision] = contract.on_received
    on_release: Callable[..., Decision] = contract.on_release
    checks_generations: bool = True
    waits_for_writer: bool = True  # blocks are given back only when the thread that fills them has ended
    says_farewell: bool = True  # a failed attempt is released too, and the release repeated until it is answered
    by_connection: bool = True  # the end of a connection concerns its own attempts only
    landing_first: frozenset[int] = frozenset()  # rooms that take landing blocks before rows are ready for them


class Offer(NamedTuple):
    """A staged part, as announced and as it is read; ``blocks`` is empty once the encode process is dead."""

    room: int
    attempt: int
    start: int
    count: int
    blocks: tuple[int, ...]
    fresh: bool = True
    clean: bool = True


class Message(NamedTuple):
    """A request, or with ``answer`` the reply to it."""

    connection: int
    room: int
    attempt: int
    ask: str
    number: int
    answer: Answer | None = None
    offer: Offer | None = None


class Language(NamedTuple):
    """A room on the language side; ``state`` is None where the process is dead."""

    state: R | None = R.BOOTSTRAPPING
    attempt: int = 0
    connection: int = 0
    got: tuple[int, ...] = ()
    deepstacks: int = 0
    ready: Offer | None = None  # waits for landing blocks
    blocks: tuple[int, ...] = ()
    reading: Offer | None = None
    into: tuple[int, ...] = ()  # what the read may write
    over: bool = False  # the client has given up
    foreign: bool = False
    farewells: tuple[int, ...] = ()

    @property
    def question(self) -> tuple[str, int] | None:
        """What is asked in this state: a request, and the number in it."""
        ask = ASKS.get(self.state) if self.state else None
        return (ask, len(self.got) if ask in ("transfer", "received") else 0) if ask else None


class Encode(NamedTuple):
    """An attempt on the encode side."""

    record: Record
    connection: int
    asked: int = 0
    blocks: tuple[int, ...] = ()
    writing: tuple[int, ...] = ()  # what the thread that fills them may write


class State(NamedTuple):
    """All of it."""

    language: tuple[Language, ...]
    encode: tuple[tuple[Encode | None, ...], ...]  # by room and attempt
    landing: tuple[int, ...]  # free blocks; those of DeepStack have numbers after those of tokens
    offered: tuple[int, ...]
    landing_queue: tuple[int, ...]
    encode_queue: tuple[tuple[int, int], ...]
    net: frozenset[Message]
    connection: int = 0
    up: bool = True
    faults: int = 0


def start(rules: Rules) -> State:
    """All requests have just come."""
    rooms = range(len(rules.tokens))
    return State(
        language=(Language(),) * len(rooms),
        encode=((None,) * rules.attempts,) * len(rooms),
        landing=tuple(range(sum(rules.landing_pool))),
        offered=tuple(range(sum(rules.encode_pool))),
        landing_queue=(),
        encode_queue=(),
        net=frozenset(Message(0, room, 0, "encode", 0) for room in rooms),
        faults=rules.faults,
    )


def taken(free: tuple[int, ...], pool: tuple[int, int], tokens: int, deepstack: bool) -> tuple[int, ...] | None:
    """Blocks for a part, both kinds at once or none."""
    for_tokens = [block for block in free if block < pool[0]][:tokens]
    for_deepstack = [block for block in free if block >= pool[0]][:deepstack]
    fits = len(for_tokens) == tokens and len(for_deepstack) == deepstack
    return (*for_tokens, *for_deepstack) if fits else None


class Draft:
    """A state that is being changed into the next one."""

    def __init__(self, rules: Rules, state: State) -> None:
        self.rules = rules
        self.language = list(state.language)
        self.encode = [list(attempts) for attempts in state.encode]
        self.landing, self.offered = state.landing, state.offered
        self.landing_queue, self.encode_queue = state.landing_queue, state.encode_queue
        self.net = set(state.net)
        self.connection, self.up, self.faults = state.connection, state.up, state.faults

    def frozen(self) -> State:
        """The state it has become, without answers that nobody waits for."""
        net = frozenset(each for each in self.net if each.answer is None or self.awaited(each))
        encode = tuple(tuple(attempts) for attempts in self.encode)
        queues = self.landing_queue, self.encode_queue
        pools = tuple(sorted(self.landing)), tuple(sorted(self.offered))
        return State(tuple(self.language), encode, *pools, *queues, net, self.connection, self.up, self.faults)

    def awaited(self, message: Message) -> bool:
        """Whether the language side waits for the answer to this request."""
        room = self.language[message.room]
        if message.ask == "abandon":
            return message.attempt in room.farewells
        return room.attempt == message.attempt and room.question == (message.ask, message.number)

    def lost(self, connection: int) -> bool:
        """Whether a connection has ended."""
        return connection < self.connection or not self.up

    def set(self, room: int, **changes: Any) -> None:
        """Change the language side of a room."""
        self.language[room] = self.language[room]._replace(**changes)

    def move_language(self, room: int, event: RE) -> None:
        """Give an event to the language side's machine, and do what goes with its new state."""
        old = self.language[room]
        assert old.state is not None
        new = stepped(self.rules.receiver, old.state, event)
        self.set(room, state=new)
        if old.state in self.rules.landing_held and new not in self.rules.landing_held:
            self.landing += old.blocks
            self.set(room, blocks=())
        self.landing_queue = tuple(each for each in self.landing_queue if each != room)
        if new is R.TRANSFERRING or (new is R.WAITING_FOR_INPUT and room in self.rules.landing_first):
            self.landing_queue += (room,)
        if new is not R.TRANSFERRING:
            self.set(room, ready=None)
        if (new is R.FAILED or event is RE.GAVE_UP) and not self.lost(old.connection) and self.rules.says_farewell:
            self.set(room, farewells=(*old.farewells, old.attempt))
            self.net.add(Message(old.connection, room, old.attempt, "abandon", 0))
        question = self.language[room].question
        if question and not self.lost(old.connection):
            self.net.add(Message(old.connection, room, old.attempt, *question))

    def move_encode(self, room: int, attempt: int, event: SE, **changes: Any) -> None:
        """Give an event to the encode side's machine, and do what goes with its new state."""
        old = self.encode[room][attempt]
        assert old is not None
        new = stepped(self.rules.sender, old.record.state, event)
        self.encode[room][attempt] = old._replace(record=old.record._replace(state=new, **changes))
        held = new in self.rules.offered_held or (new is S.STAGING and old.blocks)
        if old.blocks and not held and (not old.writing or not self.rules.waits_for_writer):
            self.give_back(room, attempt)
        self.encode_queue = tuple(each for each in self.encode_queue if each != (room, attempt))
        if new is S.STAGING:
            self.encode_queue += ((room, attempt),)

    def give_back(self, room: int, attempt: int) -> None:
        """The encode side's blocks of an attempt; what was announced of them is not fresh any more."""
        old = self.encode[room][attempt]
        assert old is not None
        self.offered += old.blocks
        self.encode[room][attempt] = old._replace(blocks=())
        self.change_offers(lambda offer: offer._replace(fresh=offer.fresh and offer[:2] != (room, attempt)))

    def change_offers(self, change: Callable[[Offer], Offer]) -> None:
        """Apply to all offers under way and being read that lie in the memory of the encode process."""
        for message in list(self.net):
            if message.offer and message.offer.blocks:
                self.net.remove(message)
                self.net.add(message._replace(offer=change(message.offer)))
        for room, language in enumerate(self.language):
            for name in ("ready", "reading"):
                offer = getattr(language, name)
                if offer and offer.blocks:
                    self.set(room, **{name: change(offer)})


def stepped(table: Mapping[Any, Any], state: Any, event: Any) -> Any:
    """As :meth:`Machine.on` does."""
    try:
        return table[state, event]
    except KeyError:
        raise TransitionError(f"{event.value!r} in state {state.value!r}") from None


def broken(rules: Rules, state: State) -> str | None:
    """The invariant that does not hold."""
    attempts = [each for room in state.encode for each in room if each]
    pools = (
        ("encode", rules.encode_pool, state.offered, [each.blocks for each in attempts]),
        ("landing", rules.landing_pool, state.landing, [each.blocks for each in state.language]),
    )
    for name, pool, free, owned in pools:
        blocks = sorted([*free, *(block for each in owned for block in each)])
        if blocks != list(range(sum(pool))):
            return f"every {name} block is free or has one owner"
    if any(set(each.into) - set(each.blocks) for each in state.language):
        return "a landing block is not given back while a read may write it"
    if any(set(each.writing) - set(each.blocks) for each in attempts):
        return "a block is not given back while a thread fills it"
    landing = [(each.state in rules.landing_held, each.state in LANDING_HELD, each.blocks) for each in state.language]
    offered = [
        (each.record.state in rules.offered_held or each.writing, each.record.state in OFFERED_HELD, each.blocks)
        for each in attempts
    ]
    if any((blocks and not may) or (must and not blocks) for may, must, blocks in landing + offered):
        return "blocks are held in the states that say so, and in no other"
    for room, here in enumerate(state.language):
        if here.foreign:
            return "no bytes of another transfer are taken for one's own"
        if here.state is R.SUCCESS and (here.got != tuple(range(rules.tokens[room])) or here.deepstacks != 1):
            return "a success has every token once, and DeepStack once"
        if rules.survives and here.state is R.FAILED and here.attempt + 1 == rules.attempts and not here.over:
            return "every request is answered, but where the client gave up"
    return None


def is_end(rules: Rules, state: State) -> bool:
    """All requests are over and nothing is held."""
    for here in state.language:
        if here.state not in (None, *OVER) or here.reading or here.farewells:
            return False
        if here.state is R.FAILED and not here.over and here.attempt + 1 < rules.attempts:
            return False
    attempts = [each for room in state.encode for each in room if each]
    if any(each.record.state not in TERMINAL or each.writing for each in attempts):
        return False
    return len(state.landing) == sum(rules.landing_pool) and len(state.offered) == sum(rules.encode_pool)
