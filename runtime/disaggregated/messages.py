"""Messages of the control connection between a language and an encode process: their schema and their bytes.

A message is MessagePack of one of the structs below, told apart by ``type``. Unknown fields, types and values out of
range are refused. Every request carries ``seq``; its reply repeats it, so that a request may be sent again and answers
that come late or twice are recognised. A room is one request of a client; its attempts are numbered.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from deepstitch.runtime.disaggregated.errors import ProtocolError

__all__ = [
    "PROTOCOL_VERSION",
    "Announcement",
    "Challenge",
    "EncodeRequest",
    "Failure",
    "Hello",
    "Item",
    "Message",
    "ModelIdentity",
    "Pending",
    "Ping",
    "Pong",
    "Received",
    "Release",
    "Released",
    "RoomMessage",
    "TransferInit",
    "TransferReady",
    "TransferResume",
    "Welcome",
    "decode",
    "encode",
    "seq_of",
]

PROTOCOL_VERSION = 2

_MAX_TOKENS = (1 << 31) - 1  # buffers hold them as int32
_MAX_BLOCKS = 1 << 20
Count = Annotated[int, Meta(ge=0, le=_MAX_TOKENS)]
Seq = Annotated[int, Meta(ge=0)]
Room = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{0,128}\Z")]
Text = Annotated[str, Meta(max_length=4096)]
Block = Annotated[int, Meta(ge=0, lt=_MAX_BLOCKS)]
Blocks = Annotated[tuple[Block, ...], Meta(max_length=_MAX_BLOCKS)]
Word = Annotated[int, Meta(ge=0)]
Words = Annotated[tuple[Word, ...], Meta(max_length=_MAX_BLOCKS)]
Sums = Annotated[tuple[Word, ...], Meta(max_length=5)]
Seconds = Annotated[float, Meta(ge=-1e12, le=1e12)]  # neither infinite nor no number
Positive = Annotated[int, Meta(ge=1, le=_MAX_TOKENS)]


class ModelIdentity(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What must be equal on both sides.

    Attributes:
        checkpoint: fingerprint of the weights both bundles were exported from; empty where a bundle has none.
        embedding: hash of rows of the token embedding, as they come out of the bundle's table.
        tokenizer: sha256 of tokenizer.json.
        chat_template: hash of the files that say how messages become text.
        preprocessing: hash of the files that say how pictures become patches.
        merge_size: patches per token along height and width; 0 where a bundle reads text only.
    """

    model_type: Text
    checkpoint: Hex
    embedding: Hex
    tokenizer: Hex
    chat_template: Hex
    preprocessing: Hex
    merge_size: Count
    hidden_size: Positive
    num_deepstack: Count
    vocab_size: Positive
    image_token_id: Count | None
    video_token_id: Count | None


class Message(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    """Anything on the control connection."""

    seq: Seq


class Challenge(Message, frozen=True, tag="challenge"):
    """Encode side, first message: prove that you have the token."""

    version: Count
    epoch: Room
    nonce: Hex


class Hello(Message, frozen=True, tag="hello"):
    """Language side: who I am. ``proof`` is an HMAC over both nonces with the shared token."""

    version: Count
    epoch: Room
    nonce: Hex
    proof: Hex
    model: ModelIdentity
    transports: Annotated[tuple[Text, ...], Meta(max_length=8)]


class Welcome(Message, frozen=True, tag="welcome"):
    """Encode side: you may ask. ``transport`` and ``endpoint`` say where the pool can be read, with ``ticket``.

    A room that is not spoken of for ``lease_seconds`` is forgotten. ``clock`` is the time by its monotonic clock.
    """

    epoch: Room
    proof: Hex
    model: ModelIdentity
    transport: Text
    endpoint: Annotated[dict[Text, Text], Meta(max_length=16)]
    ticket: Hex
    block_tokens: Positive
    num_blocks: Positive
    num_deepstack_blocks: Count
    lease_seconds: Annotated[float, Meta(gt=0)]
    clock: Seconds


class RoomMessage(Message, frozen=True, tag=False):
    """A message about one attempt of one request."""

    room: Room
    attempt: Count


class EncodeRequest(RoomMessage, frozen=True, tag="encode"):
    """Language side: prepare and encode this conversation. Media bytes are in the order of their placeholders.

    ``poll`` asks only for news of a request that was accepted.
    """

    messages: Annotated[bytes, Meta(max_length=64 << 20)] = b""
    images: Annotated[tuple[bytes, ...], Meta(max_length=1024)] = ()
    videos: Annotated[tuple[bytes, ...], Meta(max_length=64)] = ()
    poll: bool = False


class Item(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One picture or clip: its content key and its patches along time, height and width.

    ``timestamps`` are the seconds of a clip's time steps, as its prompt spells them; a picture has none.
    """

    key: Hex
    grid: tuple[Positive, Positive, Positive]
    timestamps: Annotated[tuple[Seconds, ...], Meta(max_length=1 << 16)] = ()


class Announcement(RoomMessage, frozen=True, tag="announcement"):
    """Encode side: prepared; these are the sizes of what will be sent, though it may still be being encoded.

    ``seconds`` are those of preparing it, and ``began`` by the clock of the encode process.
    """

    total_tokens: Positive
    deepstack_rows: Count
    rope_delta: Annotated[int, Meta(ge=-_MAX_TOKENS, le=_MAX_TOKENS)]
    items: Annotated[tuple[Item, ...], Meta(max_length=2048)]
    seconds: Annotated[dict[Text, Seconds], Meta(max_length=64)] = {}


class TransferInit(RoomMessage, frozen=True, tag="init"):
    """Language side: offer all DeepStack rows and at most the first ``tokens`` tokens."""

    tokens: Positive


class TransferResume(RoomMessage, frozen=True, tag="resume"):
    """Language side: I have the first ``sent_tokens`` tokens; offer at most ``tokens`` more."""

    sent_tokens: Positive
    tokens: Positive


class TransferReady(RoomMessage, frozen=True, tag="ready"):
    """Encode side: tokens ``start…start+count-1`` lie in these blocks.

    ``deepstack_blocks`` is empty in a resumed transfer. ``generations`` are those of the blocks, DeepStack's last.
    ``checksums`` are XXH3-64 of each buffer's rows in the order of the buffers, empty where the pool is not summed.
    ``seconds`` are those of encoding and staging; the initial transfer alone has them.
    """

    start: Count
    count: Positive
    blocks: Blocks
    deepstack_blocks: Blocks
    generations: Words
    checksums: Sums
    seconds: Annotated[dict[Text, Seconds], Meta(max_length=64)] = {}


class Received(RoomMessage, frozen=True, tag="received"):
    """Language side: the first ``tokens`` tokens have arrived; their blocks are not needed any more."""

    tokens: Positive


class Release(RoomMessage, frozen=True, tag="release"):
    """Language side: done, or given up; forget the room."""

    abandoned: bool = False


class Released(RoomMessage, frozen=True, tag="released"):
    """Encode side: the room holds nothing any more."""


class Pending(RoomMessage, frozen=True, tag="pending"):
    """Encode side: alive, but not ready; ask again."""


class Failure(Message, frozen=True, tag="failure"):
    """Encode side: refused or failed, with the code of an error of :mod:`deepstitch.runtime.disaggregated.errors`."""

    code: Text
    text: Text


class Ping(Message, frozen=True, tag="ping"):
    """Language side: are you there?"""


class Pong(Message, frozen=True, tag="pong"):
    """Encode side: yes; ``waiting`` requests are ahead of a new one, and it is ``clock`` by its monotonic clock."""

    waiting: Count
    clock: Seconds


AnyMessage = (
    Challenge
    | Hello
    | Welcome
    | EncodeRequest
    | Announcement
    | TransferInit
    | TransferResume
    | TransferReady
    | Received
    | Release
    | Released
    | Pending
    | Failure
    | Ping
    | Pong
)
Kind = TypeVar("Kind", bound=Message)


class _Numbered(Struct):
    """What all messages have; other fields are passed over."""

    seq: Seq


def encode(message: Message) -> bytes:
    """Bytes of one message."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes | memoryview) -> Any:
    """The message in ``data``.

    Raises:
        ProtocolError: not a message of this version, or a field of it is out of range.
    """
    try:
        return msgspec.msgpack.decode(data, type=AnyMessage)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a valid message: {error}") from None


def seq_of(data: bytes | memoryview) -> int | None:
    """The number of something that is no message of this version, so that it can be refused; None: it has none."""
    try:
        return msgspec.msgpack.decode(data, type=_Numbered).seq
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
