"""Frames of the control connection: magic, length, XXH3-64 of the payload, payload."""

from __future__ import annotations

import asyncio
import struct

from deepstitch.runtime.disaggregated.errors import PeerLost, ProtocolError

__all__ = ["HANDSHAKE_LIMIT", "REPLY_LIMIT", "REQUEST_LIMIT", "pack", "read_frame", "unpack"]

_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"DSM1"
HANDSHAKE_LIMIT = 16 << 10  # bytes anyone may send before they have proved themselves
REPLY_LIMIT = 64 << 20
REQUEST_LIMIT = 512 << 20  # pictures and clips as files


def pack(payload: bytes) -> bytes:
    """One frame."""
    return _HEADER.pack(_MAGIC, len(payload), _digest(payload)) + payload


def unpack(frame: bytes, limit: int = REPLY_LIMIT) -> bytes:
    """The payload of exactly one frame.

    Raises:
        ProtocolError: it is none, or more than one, or its checksum is wrong.
    """
    if len(frame) < _HEADER.size:
        raise ProtocolError(f"a frame has at least {_HEADER.size} bytes, this one {len(frame)}")
    length, digest = _parse(frame[: _HEADER.size], limit)
    return _checked(frame[_HEADER.size :], length, digest)


async def read_frame(reader: asyncio.StreamReader, limit: int) -> bytes:
    """The payload of the next frame.

    Raises:
        PeerLost: the connection ended, inside a frame or between two.
        ProtocolError: not a frame, larger than ``limit`` bytes, or its checksum is wrong.
    """
    try:
        length, digest = _parse(await reader.readexactly(_HEADER.size), limit)
        payload = await reader.readexactly(length)
    except (asyncio.IncompleteReadError, OSError):
        raise PeerLost("the connection ended") from None
    return _checked(payload, length, digest)


def _parse(header: bytes, limit: int) -> tuple[int, int]:
    magic, length, digest = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ProtocolError(f"frame begins with {magic!r}: the other side does not speak this protocol")
    if length > limit:
        raise ProtocolError(f"frame of {length} bytes, {limit} are allowed here")
    return length, digest


def _checked(payload: bytes, length: int, digest: int) -> bytes:
    if len(payload) != length:
        raise ProtocolError(f"frame of {length} bytes holds {len(payload)}")
    if _digest(payload) != digest:
        raise ProtocolError("frame with a wrong checksum")
    return payload


def _digest(payload: bytes) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(payload)
