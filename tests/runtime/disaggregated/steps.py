"""What can happen next in a state of ``model``: what both sides do by themselves, what messages do, and faults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from deepstitch.runtime.disaggregated.states import ReceiverEvent as RE
from deepstitch.runtime.disaggregated.states import ReceiverState as R
from deepstitch.runtime.disaggregated.states import SenderEvent as SE
from deepstitch.runtime.disaggregated.states import SenderState as S
from deepstitch.runtime.disaggregated.states import TransitionError

from .contract import TERMINAL, Answer, Decision, Record
from .explorer import Broken, Explored, Step, explore
from .model import (
    OVER,
    UNINTERRUPTED,
    Draft,
    Encode,
    Language,
    Message,
    Offer,
    Rules,
    State,
    broken,
    is_end,
    start,
    taken,
)

EXPECTED = {"encode": Answer.ANNOUNCEMENT, "transfer": Answer.READY}
HEARD = {"encode": RE.ANNOUNCED, "transfer": RE.READY, "received": RE.CONFIRMED, "release": RE.RELEASED}


def search(rules: Rules, *, limit: int = 2_000_000) -> Explored:
    """Everything that can happen by these rules."""
    return explore(
        start(rules),
        lambda state: Steps(rules, state).all(),
        broken=partial(broken, rules),
        is_end=partial(is_end, rules),
        limit=limit,
    )


class Steps:
    """All steps from one state."""

    def __init__(self, rules: Rules, state: State) -> None:
        self.rules, self.state = rules, state
        self.found: list[Step] = []

    def all(self) -> list[Step]:
        """Fair ones and faults.

        Raises:
            Broken: a step that must be possible is not.
        """
        try:
            for room in range(len(self.state.language)):
                self.language(room)
                for attempt, encode in enumerate(self.state.encode[room]):
                    if encode:
                        self.encode(room, attempt, encode)
            for message in self.state.net:
                self.deliver(message)
            self.shared()
        except TransitionError as error:
            raise Broken(f"no place in the table for {error}") from None
        return self.found

    def take(self, label: str, fair: bool, change: Callable[[Draft], Any]) -> None:
        """Note a step; a fault only while there are faults left."""
        draft = Draft(self.rules, self.state)
        draft.faults -= not fair
        if draft.faults >= 0:
            change(draft)
            self.found.append(Step(label, draft.frozen(), fair))

    def fault(self, kind: str, label: str, change: Callable[[Draft], Any]) -> None:
        """Note a fault of a kind that is searched."""
        if kind in self.rules.kinds and self.state.faults:
            self.take(label, False, change)

    def language(self, room: int) -> None:
        """What the language side of a room does, and what becomes of it."""
        rules, state, here = self.rules, self.state, self.state.language[room]
        if here.state is None:
            return
        lost = here.connection < state.connection or not state.up
        for event, comes in ((RE.PEER_LOST, lost), (RE.GAVE_UP, here.over)):
            waits = here.state in OVER or here.state in UNINTERRUPTED
            if comes and (not waits or (here.state, event) in rules.receiver):
                label = f"language {room}: {event.value}"
                self.take(label, True, lambda draft, event=event: draft.move_language(room, event))
        if here.reading:
            self.reading(room, here, lost)
        if here.state not in OVER and not here.over:
            self.fault("give up", f"language {room}: the client goes away", lambda draft: draft.set(room, over=True))
        if here.state is R.FAILED and not here.over and here.attempt + 1 < rules.attempts and not here.reading:
            self.take(f"language {room}: next attempt", True, lambda draft: next_attempt(draft, room))
        if not lost:
            self.repeat(room, here)
        elif here.farewells:
            self.take(f"language {room}: nobody to say farewell to", True, lambda draft: draft.set(room, farewells=()))

    def repeat(self, room: int, here: Language) -> None:
        """Requests of which nothing is under way any more are sent again."""
        asked = [(here.attempt, here.question)] if here.question else []
        for attempt, (ask, number) in asked + [(attempt, ("abandon", 0)) for attempt in here.farewells]:
            message = Message(here.connection, room, attempt, ask, number)
            if not any(each[1:5] == message[1:5] for each in self.state.net):
                again = f"language {room}: sends {ask} {number} of attempt {attempt} again"
                self.take(again, True, lambda draft, message=message: draft.net.add(message))

    def reading(self, room: int, here: Language, lost: bool) -> None:
        """A read ends well or badly; then its transport is closed."""
        if here.state is R.QUARANTINED:
            self.take(f"language {room}: transport closed", True, lambda draft: closed(draft, room))
        elif here.state is not R.READING:  # only in tables that are wrong
            self.take(f"language {room}: a late read ends", True, lambda draft: ended(draft, room))
        else:
            self.take(f"language {room}: read ends", True, lambda draft: read(draft, room))
            failed = f"language {room}: read fails, and may still write"
            if lost:
                self.take(failed, True, lambda draft: draft.move_language(room, RE.READ_FAILED))
            else:
                self.fault("read", f"{failed}; that ends the connection", lambda draft: read_fails(draft, room))

    def encode(self, room: int, attempt: int, here: Encode) -> None:
        """What the encode side of an attempt does, and what becomes of it."""
        rules, state, name = self.rules, self.state, f"encode {room}.{attempt}"

        def event(event: SE) -> Callable[[Draft], None]:
            return lambda draft: draft.move_encode(room, attempt, event)

        if here.record.state is S.BOOTSTRAPPING:
            self.take(f"{name}: encoded", True, event(SE.ENCODED))
            self.fault("encode fails", f"{name}: encoding fails", event(SE.ENCODE_FAILED))
        if here.writing:
            self.take(f"{name}: blocks filled", True, lambda draft: filled(draft, room, attempt))
        lost = here.connection < state.connection or not state.up
        concerned = lost if rules.by_connection else lost or state.connection > 0
        if here.record.state in TERMINAL:
            return
        if concerned and not rules.half_open:
            self.take(f"{name}: peer lost", True, event(SE.PEER_LOST))
        if lost and rules.half_open:
            self.take(f"{name}: lease expired", True, event(SE.LEASE_EXPIRED))
        else:
            self.fault("lease", f"{name}: lease expired", event(SE.LEASE_EXPIRED))

    def deliver(self, message: Message) -> None:
        """A message arrives, arrives and stays under way, or is lost."""
        name = f"{message.ask} {message.number} of {message.room}.{message.attempt}"
        name = f"{name}: {message.answer.value}" if message.answer else name
        self.fault("loss", f"lost: {name}", lambda draft: draft.net.discard(message))
        if message.answer:
            self.take(f"arrives: {name}", True, lambda draft: hear(draft, message))
            return
        decision = decide(self.rules, self.state, message)
        if decision.answer is Answer.PENDING and not (decision.event or decision.becomes):
            return
        self.take(f"arrives: {name}", True, lambda draft: answer(draft, message, decision))
        if decision.answer is not Answer.PENDING:
            twice = f"arrives, and will again: {name}"
            self.fault("duplicate", twice, lambda draft: (answer(draft, message, decision), draft.net.add(message)))

    def shared(self) -> None:
        """The pools' queues, the connection, and the processes."""
        state = self.state
        if state.landing_queue and (step := landing_grant(self.rules, state)):
            self.take(f"language {state.landing_queue[0]}: landing blocks", True, step)
        if state.encode_queue and (grant := encode_grant(self.rules, state)):
            self.take(f"encode {state.encode_queue[0][0]}: blocks", True, grant)
        alive = any(language.state for language in state.language)
        if state.up and alive:
            self.fault("connection", "the connection ends", lambda draft: setattr(draft, "up", False))
            self.fault("encode dies", "the encode process dies", encode_dies)
            self.fault("language dies", "the language process dies", language_dies)


def next_attempt(draft: Draft, room: int) -> None:
    """Begin anew, over a new connection if the old one has ended."""
    if not draft.up:
        draft.connection, draft.up = draft.connection + 1, True
    old = draft.language[room]
    farewells = old.farewells if old.connection == draft.connection else ()
    draft.language[room] = Language(attempt=old.attempt + 1, connection=draft.connection, farewells=farewells)
    draft.net.add(Message(draft.connection, room, old.attempt + 1, "encode", 0))


def read(draft: Draft, room: int) -> None:
    """A read has ended; what it brought counts if the generations are still those announced."""
    offer = draft.language[room].reading
    assert offer is not None
    if draft.rules.checks_generations and not offer.fresh:
        draft.move_language(room, RE.READ_FAILED)
        return
    got = (*draft.language[room].got, *range(offer.start, offer.start + offer.count))
    deepstacks = draft.language[room].deepstacks + (offer.start == 0)
    foreign = draft.language[room].foreign or not offer.clean
    draft.set(room, reading=None, into=(), got=got, deepstacks=deepstacks, foreign=foreign)
    draft.move_language(room, RE.READ_ALL if len(got) >= draft.rules.tokens[room] else RE.READ_PART)


def read_fails(draft: Draft, room: int) -> None:
    """A transport that failed is not used again, nor the connection that it came with."""
    draft.move_language(room, RE.READ_FAILED)
    draft.up = False


def closed(draft: Draft, room: int) -> None:
    """Nothing writes any more."""
    draft.set(room, reading=None, into=())
    draft.move_language(room, RE.TRANSPORT_CLOSED)


def ended(draft: Draft, room: int) -> None:
    """A read ended that nobody waited for."""
    draft.set(room, reading=None, into=())


def filled(draft: Draft, room: int, attempt: int) -> None:
    """The thread that fills blocks has ended."""
    here = draft.encode[room][attempt]
    assert here is not None
    draft.encode[room][attempt] = here._replace(writing=())
    if here.record.state is S.STAGING:
        draft.move_encode(room, attempt, SE.STAGED, count=here.asked)
    elif here.blocks:
        draft.give_back(room, attempt)


def hear(draft: Draft, message: Message) -> None:
    """The language side takes an answer it waited for."""
    draft.net.discard(message)
    room, good = message.room, EXPECTED.get(message.ask, Answer.RELEASED)
    if message.ask == "abandon":
        farewells = tuple(each for each in draft.language[room].farewells if each != message.attempt)
        draft.set(room, farewells=farewells)
    elif message.answer is good:
        if message.offer:
            draft.set(room, ready=message.offer)
        draft.move_language(room, HEARD[message.ask])
        if message.offer and draft.language[room].blocks and room in draft.rules.landing_first:
            begin_reading(draft, room)
    else:
        releasing = draft.language[room].state is R.RELEASING
        draft.move_language(room, RE.PEER_LOST if releasing else RE.REFUSED)


def decide(rules: Rules, state: State, message: Message) -> Decision:
    """What the contract says to a request."""
    encode = state.encode[message.room][message.attempt]
    record = encode.record if encode else None
    if message.ask == "encode":
        return rules.on_encode(record)
    if message.ask == "transfer":
        return rules.on_transfer(record, message.number)
    if message.ask == "received":
        return rules.on_received(record, message.number)
    return rules.on_release(record, abandoned=message.ask == "abandon")


def answer(draft: Draft, message: Message, decision: Decision) -> None:
    """The encode side does what was decided."""
    room, attempt = message.room, message.attempt
    if decision.answer is Answer.PROTOCOL:
        raise Broken("a well-behaved peer is told that it broke the protocol")
    if decision.becomes:
        draft.encode[room][attempt] = Encode(Record(decision.becomes, prepared=True), message.connection)
    if decision.event is SE.INIT:
        draft.move_encode(room, attempt, SE.INIT, start=message.number, count=0)
    elif decision.event is SE.RECEIVED:
        draft.move_encode(room, attempt, SE.RECEIVED, confirmed=message.number)
    elif decision.event:
        draft.move_encode(room, attempt, decision.event)
    if decision.answer is not Answer.PENDING:
        here, offer = draft.encode[room][attempt], None
        if decision.answer is Answer.READY and here:
            offer = Offer(room, attempt, here.record.start, here.record.count, here.blocks)
        draft.net.discard(message)
        draft.net.add(message._replace(answer=decision.answer, offer=offer))


def landing_grant(rules: Rules, state: State) -> Callable[[Draft], None] | None:
    """Landing blocks for the room at the head of the queue, if there are enough."""
    room = state.landing_queue[0]
    here, ready = state.language[room], state.language[room].ready
    tokens = ready.count if ready else min(rules.tokens[room] - len(here.got), rules.first_tokens)
    blocks = taken(state.landing, rules.landing_pool, tokens, not here.got)
    if blocks is None:
        return None

    def step(draft: Draft) -> None:
        draft.landing = tuple(set(draft.landing) - set(blocks))
        draft.set(room, blocks=here.blocks + blocks)
        if ready:
            begin_reading(draft, room)
        else:
            draft.landing_queue = draft.landing_queue[1:]

    return step


def begin_reading(draft: Draft, room: int) -> None:
    """What lies ready is read into the landing blocks."""
    here = draft.language[room]
    draft.set(room, reading=here.ready, into=here.blocks)
    draft.move_language(room, RE.ALLOCATED)


def encode_grant(rules: Rules, state: State) -> Callable[[Draft], None] | None:
    """Blocks for the attempt at the head of the queue, if there are enough; a thread begins to fill them."""
    room, attempt = state.encode_queue[0]
    here = state.encode[room][attempt]
    assert here is not None
    left = rules.tokens[room] - here.record.start
    tokens = min(left, rules.first_tokens, rules.encode_pool[0])
    blocks = taken(state.offered, rules.encode_pool, tokens, here.record.start == 0)
    if blocks is None:
        return None

    def step(draft: Draft) -> None:
        draft.offered = tuple(set(draft.offered) - set(blocks))
        draft.encode_queue = draft.encode_queue[1:]
        draft.encode[room][attempt] = here._replace(asked=tokens, blocks=here.blocks + blocks, writing=blocks)
        draft.change_offers(lambda offer: offer._replace(clean=offer.clean and not set(offer.blocks) & set(blocks)))

    return step


def encode_dies(draft: Draft) -> None:
    """Its rooms and its pool are gone; a new process comes up. What was sent before may still be heard."""
    rooms = range(len(draft.encode))
    draft.change_offers(lambda offer: offer._replace(blocks=()))
    draft.encode = [[None] * draft.rules.attempts for _ in rooms]
    draft.offered, draft.encode_queue = tuple(range(sum(draft.rules.encode_pool))), ()
    draft.net = {each for each in draft.net if each.answer}
    draft.up = False


def language_dies(draft: Draft) -> None:
    """Its requests and its pool are gone. What was sent before may still be heard."""
    draft.language = [Language(state=None) for _ in draft.language]
    draft.landing, draft.landing_queue = tuple(range(sum(draft.rules.landing_pool))), ()
    draft.up = False
