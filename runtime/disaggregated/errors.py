"""What can go wrong between an encode and a language process. Each error has a code that crosses the wire."""

from __future__ import annotations

from deepstitch.errors import DeepstitchError

__all__ = [
    "DeadlineExceeded",
    "DisaggregationError",
    "EncodeFailed",
    "HandshakeRefused",
    "NoEncoder",
    "PeerBusy",
    "PeerHung",
    "PeerLost",
    "ProtocolError",
    "RequestRefused",
    "RequestTooLarge",
    "StaleTransfer",
    "TransferCorrupt",
    "error_from_code",
]


class DisaggregationError(DeepstitchError):
    """A request could not be served by the pair of processes.

    Attributes:
        code: what it is called in messages between the processes and in answers to clients.
        retryable: another attempt, or another encoder, may succeed.
    """

    code = "error"
    retryable = False


class ProtocolError(DisaggregationError):
    """The other side sent something that is not a valid message here; the connection is closed."""

    code = "protocol"
    retryable = True


class HandshakeRefused(DisaggregationError):
    """The two sides do not fit: token, protocol version or model differ."""

    code = "handshake"


class RequestRefused(DisaggregationError):
    """The prompt or a picture cannot be used; no encoder would take it."""

    code = "refused"


class RequestTooLarge(DisaggregationError):
    """The request does not fit the pool of blocks, however long it waits."""

    code = "too_large"


class EncodeFailed(DisaggregationError):
    """The encoder failed on this request for a reason of its own."""

    code = "encode_failed"
    retryable = True


class PeerBusy(DisaggregationError):
    """The other side has as many requests as it admits."""

    code = "busy"
    retryable = True


class PeerLost(DisaggregationError):
    """The connection ended: the other process died, or closed it."""

    code = "peer_lost"
    retryable = True


class PeerHung(DisaggregationError):
    """The other process holds the connection but does not answer."""

    code = "peer_hung"
    retryable = True


class StaleTransfer(DisaggregationError):
    """The blocks were given to another request before they were read to the end."""

    code = "stale"
    retryable = True


class TransferCorrupt(DisaggregationError):
    """What arrived is not what was sent."""

    code = "corrupt"
    retryable = True


class NoEncoder(DisaggregationError):
    """No encode process can be reached and there is no vision encoder in this process."""

    code = "no_encoder"


class DeadlineExceeded(DisaggregationError):
    """The request took longer than it may."""

    code = "deadline"


_BY_CODE = {
    kind.code: kind
    for kind in (
        ProtocolError,
        HandshakeRefused,
        RequestRefused,
        RequestTooLarge,
        EncodeFailed,
        PeerBusy,
        PeerLost,
        PeerHung,
        StaleTransfer,
        TransferCorrupt,
        NoEncoder,
        DeadlineExceeded,
    )
}


def error_from_code(code: str, text: str) -> DisaggregationError:
    """The error a peer reported; an unknown code is a failure of that peer."""
    return _BY_CODE.get(code, EncodeFailed)(text)
