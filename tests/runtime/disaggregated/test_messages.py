"""Messages and their frames: what is valid comes back, all else is refused, and nothing worse happens."""

from __future__ import annotations

import asyncio
import math
import random
import struct
import time
import tracemalloc
from typing import Any

import msgspec
import pytest
import xxhash

from deepstitch.runtime.disaggregated.errors import PeerLost, ProtocolError
from deepstitch.runtime.disaggregated.framing import HANDSHAKE_LIMIT, pack, read_frame, unpack
from deepstitch.runtime.disaggregated.messages import (
    EncodeRequest,
    Message,
    Ping,
    Pong,
    Received,
    TransferInit,
    TransferReady,
    decode,
    encode,
)

from .fuzzing import TYPES, corpus, feed, handmade, hints, misfit, mutants, sample

MUTANTS = 100_000
ROOM = {"seq": 7, "room": "0123456789abcdef" * 2, "attempt": 0}
READY: dict[str, Any] = {
    "type": "ready",
    **ROOM,
    "start": 0,
    "count": 1,
    "blocks": [0],
    "deepstack_blocks": [],
    "generations": [1],
    "checksums": [],
}
RECEIVED: dict[str, Any] = {"type": "received", **ROOM, "tokens": 1}


def fits(message: Any) -> str | None:
    """A message whose values are in range, and which is the same when it is sent on."""
    if not isinstance(message, Message):
        return f"{type(message).__name__} is no message"
    again = encode(message)
    return misfit(message, type(message)) or (None if encode(decode(again)) == again else "changes when sent on")


def unframed(data: bytes) -> Any:
    return decode(unpack(data, 1 << 20))


@pytest.mark.parametrize("kind", TYPES)
def test_every_message_comes_back(kind: type[Message]):
    order = random.Random(kind.__name__)
    for _ in range(50):
        message = sample(kind, order)
        assert misfit(message, kind) is None
        assert decode(encode(message)) == decode(memoryview(encode(message))) == message
        assert unframed(pack(encode(message))) == message


def test_types_are_told_apart_by_a_name_each():
    tags = [kind.__struct_config__.tag for kind in TYPES]
    assert len(set(tags)) == len(tags) == 15
    assert all(kind.__struct_config__.forbid_unknown_fields and kind.__struct_config__.frozen for kind in TYPES)


@pytest.mark.parametrize("kind", TYPES)
def test_no_field_may_be_missing_of_another_type_or_new(kind: type[Message]):
    message = msgspec.msgpack.decode(encode(sample(kind, random.Random(3))))
    optional = {field.name for field in msgspec.structs.fields(kind) if not field.required}
    for name in message:
        if name not in optional:
            refuse({key: value for key, value in message.items() if key != name})
        refuse({**message, name: {"a": {"b": []}}})
        refuse({**message, name: [None]})
        if name not in ("image_token_id", "video_token_id"):
            refuse({**message, name: None})
    refuse({**message, "surprise": 1})
    refuse({**message, "type": "surprise"})
    refuse({**message, "type": "item"})
    assert hints(kind).keys() | {"type"} >= message.keys()


def refuse(value: Any) -> None:
    with pytest.raises(ProtocolError, match="not a valid message"):
        decode(msgspec.msgpack.encode(value))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 0},
        {"tokens": -1},
        {"tokens": 1 << 31},  # does not fit the stamp's int32
        {"tokens": 1.5},
        {"tokens": True},
        {"tokens": "1"},
        {"attempt": -1},
        {"attempt": 1 << 31},
        {"seq": -1},
        {"seq": 0.5},
        {"room": "0123456789abcdef" * 2 + "\n"},  # "$" would let it pass
        {"room": "0123456789ABCDEF" * 2},
        {"room": "0" * 31},
        {"room": "0" * 33},
        {"room": b"0" * 32},
        {"room": ""},
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, Any]):
    assert decode(msgspec.msgpack.encode(RECEIVED)) == Received(**ROOM, tokens=1)
    refuse({**RECEIVED, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": [-1]},
        {"blocks": [1 << 20]},
        {"blocks": [0.0]},
        {"blocks": [[0]]},
        {"blocks": 0},
        {"blocks": {"0": 0}},
        {"generations": [-1]},
        {"generations": [None]},
        {"checksums": [0] * 6},
        {"count": 0},
        {"start": -1},
    ],
)
def test_lists_are_checked_item_by_item(change: dict[str, Any]):
    assert isinstance(decode(msgspec.msgpack.encode(READY)), TransferReady)
    refuse({**READY, **change})


def test_long_lists_texts_and_bytes_are_refused():
    request = {"type": "encode", **ROOM}
    assert decode(msgspec.msgpack.encode(request)) == EncodeRequest(**ROOM)
    refuse({**request, "images": [b""] * 1025})
    refuse({**request, "videos": [b""] * 65})
    refuse({"type": "failure", "seq": 1, "code": "a" * 4097, "text": ""})
    refuse({"type": "challenge", "seq": 1, "version": 1, "epoch": ROOM["room"], "nonce": "a" * 129})
    announcement = {
        "type": "announcement",
        **ROOM,
        "total_tokens": 1,
        "deepstack_rows": 0,
        "rope_delta": 0,
        "items": [],
    }
    assert decode(msgspec.msgpack.encode(announcement)).seconds == {}
    refuse({**announcement, "seconds": {str(number): 1.0 for number in range(65)}})
    for never in (math.nan, math.inf):
        refuse({**announcement, "seconds": {"encode": never}})
        refuse({**announcement, "items": [{"key": "ab", "grid": [1, 1, 1], "timestamps": [never]}]})
        refuse({"type": "pong", "seq": 1, "waiting": 0, "clock": never})
    refuse({**announcement, "items": [{"key": "ab", "grid": [1, 1]}]})
    refuse({**announcement, "items": [{"key": "ab", "grid": [1, 1, 0]}]})


@pytest.mark.parametrize("name", handmade())
def test_traps_are_refused_at_once_and_cost_no_memory(name: str):
    data = handmade()[name]
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(ProtocolError):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (16 << 20) + len(data)
    assert time.monotonic() - began < 1.0


def test_every_beginning_of_a_message_is_refused():
    for message in corpus(5, each=1):
        data = encode(message)
        for length in range(len(data)) if len(data) < 2_000 else range(0, len(data), 97):
            with pytest.raises(ProtocolError):
                decode(data[:length])


def test_mutated_messages_are_refused_or_in_range():
    seeds = [encode(message) for message in corpus(0)]
    outcome = feed(decode, mutants(seeds, MUTANTS, seed=0), fits=fits)
    assert sum(outcome) == MUTANTS
    assert 0 < outcome.accepted < MUTANTS // 4  # another number, text or block: no decoder can know it


def test_mutated_frames_are_refused():
    """Whatever changes on the way: the checksum finds it."""
    seeds = [pack(encode(message)) for message in corpus(1)]
    assert feed(unframed, mutants(seeds, 20_000, seed=1), fits=fits) == (20_000, 0)


def test_messages_mutated_before_they_are_framed():
    """What an evil peer would do: the checksum is right."""
    seeds = [encode(message) for message in corpus(2)]
    outcome = feed(unframed, map(pack, mutants(seeds, 10_000, seed=2)), fits=fits)
    assert outcome.accepted < outcome.refused


def test_the_fuzzer_notices():
    """Decoders that let something through, and one that falls over."""
    seeds = [encode(TransferInit(**ROOM, tokens=3)), encode(Pong(seq=1, waiting=2, clock=0.5))]

    def lax(data: bytes) -> Any:
        try:
            value = msgspec.msgpack.decode(data)
            kind = {"init": TransferInit, "pong": Pong}[value.pop("type")]
            return kind(**{name: value[name] for name in hints(kind)})
        except (msgspec.MsgspecError, KeyError, TypeError, AttributeError, UnicodeDecodeError, ValueError):
            raise ProtocolError("no") from None

    with pytest.raises(AssertionError, match=r"is out of range|is no |wrong length|not hexadecimal|is none of"):
        feed(lax, mutants(seeds, 20_000, seed=3), fits=fits)
    with pytest.raises(AssertionError, match=r"DecodeError|ValidationError"):
        feed(msgspec.msgpack.decode, mutants(seeds, 1_000, seed=3), fits=lambda value: None)


def frame(payload: bytes, *, magic: bytes = b"DSM1", length: int | None = None, digest: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack("<4sIQ", magic, size, xxhash.xxh3_64_intdigest(payload) if digest is None else digest) + payload


PING = encode(Ping(seq=1))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "at least 16 bytes"),
        (frame(PING)[:15], "at least 16 bytes"),
        (frame(PING, magic=b"HTTP"), "HTTP"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "does not speak this protocol"),
        (frame(PING, length=0xFFFFFFFF), "4294967295 bytes, 1048576 are allowed"),
        (frame(PING, length=len(PING) + 1), "holds"),
        (frame(PING)[:-1], "holds"),
        (frame(PING) + b"\x00", "holds"),
        (frame(PING) + frame(PING), "holds"),
        (frame(PING, digest=0), "wrong checksum"),
        (frame(b""), "not a valid message"),
    ],
)
def test_frames_that_are_none(data: bytes, complaint: str):
    assert unframed(frame(PING)) == Ping(seq=1) and frame(PING) == pack(PING)
    with pytest.raises(ProtocolError, match=complaint):
        unframed(data)


def test_no_bit_of_a_frame_may_change():
    data = pack(encode(corpus(4)[0]))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            unpack(bytes(changed))


def test_a_stream_gives_frames_one_by_one():
    async def read(data: bytes, limit: int = HANDSHAKE_LIMIT) -> list[Any]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        found: list[Any] = []
        while True:
            try:
                found.append(decode(await read_frame(reader, limit)))
            except (PeerLost, ProtocolError) as error:
                return [*found, type(error)]

    both = pack(PING) + pack(encode(Pong(seq=2, waiting=0, clock=0.0)))
    assert asyncio.run(read(both)) == [Ping(seq=1), Pong(seq=2, waiting=0, clock=0.0), PeerLost]
    assert asyncio.run(read(both[:-1])) == [Ping(seq=1), PeerLost]
    assert asyncio.run(read(pack(PING)[:9])) == [PeerLost]
    assert asyncio.run(read(both, limit=4)) == [ProtocolError]
    assert asyncio.run(read(b"GET / HTTP/1.1\r\n\r\n" + both)) == [ProtocolError]
    promise = frame(PING, length=HANDSHAKE_LIMIT + 1)
    assert asyncio.run(read(promise)) == [ProtocolError], "refused before anything is waited for"
