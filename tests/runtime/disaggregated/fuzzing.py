"""Random messages, and bytes that are almost one: what a decoder has to refuse, and nothing else may come of it."""

from __future__ import annotations

import math
import random
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec

from deepstitch.runtime.disaggregated import messages
from deepstitch.runtime.disaggregated.errors import ProtocolError
from deepstitch.runtime.disaggregated.messages import Message, encode

Target = Callable[[bytes], object]  # a decoder: a value, or ProtocolError
TYPES: tuple[type[Message], ...] = typing.get_args(messages.AnyMessage)
NESTED = 100_000  # levels: far more than any stack has
# Beginnings of MessagePack values that promise more than follows: strings, byte strings, arrays, maps, extensions.
PROMISES = tuple(
    bytes([code]) + size
    for code in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)
    for size in (b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\x00\x10\x00\x00", b"\x00\x0f\xff\xff")
)
NUMBERS = tuple(
    msgspec.msgpack.encode(value)
    for value in (-(1 << 63), -1, 0, 127, 128, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1, 0.5)
)
WORDS = tuple(msgspec.msgpack.encode(value) for value in (None, True, "", b"", "\x00" * 33, [], {}, [[]], {"": {}}))
_HEX = re.compile(r"[0-9a-f]*")


class Outcome(NamedTuple):
    """How many mutants were refused, and how many were taken for messages."""

    refused: int
    accepted: int


def bounds(kind: Any) -> tuple[Any, dict[str, Any]]:
    """A type without its annotation, and the limits in it."""
    limits: dict[str, Any] = {}
    while typing.get_origin(kind) is Annotated:
        kind, *metas = typing.get_args(kind)
        for meta in metas:
            found = {name: getattr(meta, name) for name in ("gt", "ge", "le", "lt", "pattern", "max_length")}
            limits |= {name: value for name, value in found.items() if value is not None}
    return kind, limits


def hints(struct: type[Any]) -> dict[str, Any]:
    """Types of a struct's fields, with their limits."""
    return typing.get_type_hints(struct, include_extras=True)


def sample(kind: Any, order: random.Random, *, length: int = 4) -> Any:
    """A value of a type, often one at the edge of what is allowed."""
    kind, limits = bounds(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    count = order.randrange(1 + min(length, limits.get("max_length", length)))
    if kind is int:
        low, high = limits.get("ge", -(1 << 31)), limits.get("le", limits.get("lt", 1 << 64) - 1)
        return order.choice((low, high, order.randint(low, high), min(high, max(low, order.randrange(300)))))
    if kind is str:
        if "pattern" in limits:
            exactly = re.search(r"\{(\d+,)?(\d+)\}", limits["pattern"])
            assert exactly is not None
            digits = order.randrange(int(exactly[2]) + 1) if exactly[1] else int(exactly[2])
            return "".join(order.choices("0123456789abcdef", k=digits))
        return "".join(order.choices("abc \x00é漢🙂", k=count * 3))
    if kind in (bool, float, bytes):
        return {
            bool: order.random() < 0.5,
            float: order.uniform(limits.get("gt", -9), 9),
            bytes: order.randbytes(count * 9),
        }[kind]
    if origin in (typing.Union, types.UnionType):
        return sample(order.choice(inner), order)
    if kind is type(None):
        return None
    if origin is dict:
        return {sample(inner[0], order): sample(inner[1], order) for _ in range(count)}
    if origin is tuple:
        parts = (inner[0],) * count if inner[-1] is Ellipsis else inner
        return tuple(sample(each, order) for each in parts)
    return kind(**{name: sample(each, order) for name, each in hints(kind).items()})


def corpus(seed: int, each: int = 4) -> list[Message]:
    """Some messages of every type."""
    order = random.Random(seed)
    return [sample(kind, order) for kind in TYPES for _ in range(each)]


def misfit(value: Any, kind: Any) -> str | None:
    """What is out of range, judged without the schema's own decoder; None where nothing is."""
    kind, limits = bounds(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if any(misfit(value, each) is None for each in inner) else f"{value!r} is none of {inner}"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        found = [misfit(getattr(value, name), each) for name, each in hints(kind).items()]
        return next((f"{kind.__name__}: {each}" for each in found if each), None)
    if type(value) is not (origin or kind):
        return f"{value!r} is no {kind}"
    if kind is int and not limits.get("ge", -math.inf) <= value <= limits.get("le", limits.get("lt", 1 << 64) - 1):
        return f"{value} is out of range"
    if kind is float and not value > limits.get("gt", -math.inf) and not math.isnan(value):
        return f"{value} is out of range"
    if hasattr(value, "__len__") and len(value) > limits.get("max_length", math.inf):
        return f"{len(value)} items"
    if "pattern" in limits and not _HEX.fullmatch(value):
        return f"{value!r} is not hexadecimal"
    if "pattern" in limits and len(value) not in ((32,) if "{32}" in limits["pattern"] else range(129)):
        return f"{value!r} has a wrong length"
    if origin is tuple:
        parts = (inner[0],) * len(value) if inner[-1] is Ellipsis else inner
        return next(filter(None, map(misfit, value, parts)), None)
    if origin is dict:
        pairs = [pair for item in value.items() for pair in zip(item, inner, strict=True)]
        return next(filter(None, (misfit(each, part) for each, part in pairs)), None)
    return None


def mutated(data: bytes, order: random.Random, others: Sequence[bytes]) -> bytes:
    """``data`` with one to four things wrong with it."""
    changed = bytearray(data)
    for _ in range(order.choice((1, 1, 1, 2, 4))):
        at = order.randrange(len(changed) + 1)
        end = min(len(changed), at + order.choice((1, 1, 2, 4, 8, 32)))
        choice = order.randrange(10)
        if choice == 0 and at < len(changed):
            changed[at] ^= 1 << order.randrange(8)
        elif choice == 1 and at < len(changed):
            changed[at] = order.randrange(256)
        elif choice == 2:
            del changed[at:end]
        elif choice == 3:
            changed[at:at] = order.randbytes(order.randrange(1, 9))
        elif choice == 4:
            changed[at:at] = changed[at:end]
        elif choice == 5:
            changed[at:end] = order.choice(PROMISES)
        elif choice == 6:
            changed[at : at + 1] = order.choice(NUMBERS)
        elif choice == 7:
            changed[at : at + 1] = order.choice(WORDS)
        elif choice == 8:
            changed[at:] = order.choice(others)[order.randrange(len(data) + 1) :]
        else:
            del changed[at:]
    return bytes(changed)


def mutants(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """``count`` of them, none of which is one of ``seeds``."""
    order, known = random.Random(seed), set(seeds)
    while count:
        mutant = mutated(order.choice(seeds), order, seeds)
        if mutant not in known:
            count -= 1
            yield mutant


def handmade() -> dict[str, bytes]:
    """What a random change hardly ever comes to."""
    ping = encode(messages.Ping(seq=1))
    room = msgspec.msgpack.encode({"type": "received", "seq": 1, "room": "0" * 32, "attempt": 0})
    values = {
        "nothing": b"",
        "nil": b"\xc0",
        "never used": b"\xc1",
        "two messages": ping + ping,
        "a byte too many": ping + b"\x00",
        "a message in an array": b"\x91" + ping,
        "nested arrays": b"\x91" * NESTED + b"\xc0",
        "nested maps": b"\x81\xa1a" * NESTED + b"\xc0",
        "nested arrays under an unknown name": b"\x82\xa4type\xa4ping\xa1x" + b"\x91" * NESTED + b"\xc0",
        "nested arrays before the type": b"\x82\xa1x" + b"\x91" * NESTED + b"\xc0\xa4type\xa4ping",
        "nested maps in a field": room[:-1].replace(b"\x84", b"\x85", 1) + b"\x00\xa6tokens" + b"\x81\xa1a" * NESTED,
        "an extension": b"\xc7\x05\x01hello",
        "text that is not UTF-8": b"\x82\xa4type\xa4ping\xa3seq\xa2\xff\xfe",
    }
    return (
        values
        | {f"promise {promise.hex()}": promise for promise in PROMISES}
        | {
            f"blocks: promise {promise.hex()}": b"\x86\xa4type\xa5ready\xa3seq\x01\xa6blocks" + promise
            for promise in PROMISES
        }
    )


def feed(target: Target, inputs: Iterator[bytes], *, fits: Callable[[Any], str | None]) -> Outcome:
    """Give every input to ``target``.

    Raises:
        AssertionError: one was neither refused with ProtocolError nor a value that ``fits`` has nothing against.
    """
    refused = accepted = 0
    for data in inputs:
        try:
            value = target(data)
        except ProtocolError:
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}, from {data[:200]!r}") from error
        complaint = fits(value)
        assert complaint is None, f"{complaint}, from {data[:200]!r}"
        accepted += 1
    return Outcome(refused, accepted)
