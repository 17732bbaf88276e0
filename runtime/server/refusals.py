"""Errors as HTTP: a status, a body in OpenAI's format, and when to come back."""

from __future__ import annotations

from typing import Any, NamedTuple

from deepstitch.errors import DeepstitchError, InputError
from deepstitch.runtime.disaggregated.errors import (
    DeadlineExceeded,
    DisaggregationError,
    NoEncoder,
    PeerBusy,
    PeerHung,
    PeerLost,
    RequestRefused,
    RequestTooLarge,
    error_from_code,
)

__all__ = ["INVALID", "Refusal", "error_of", "refusal"]

INVALID = "invalid_request"
_RETRY_SECONDS = 1
# The first class that fits
_STATUS: tuple[tuple[type[DeepstitchError], int], ...] = (
    (InputError, 400),
    (RequestRefused, 400),
    (RequestTooLarge, 400),
    (PeerBusy, 503),
    (NoEncoder, 503),
    (PeerLost, 502),
    (PeerHung, 502),
    (DeadlineExceeded, 504),
)


class Refusal(NamedTuple):
    """What a client gets instead of an answer.

    Attributes:
        status: of HTTP.
        code: of a :class:`DisaggregationError`, or ``invalid_request``, ``not_found``, ….
        message: what was wrong and what to do.
    """

    status: int
    code: str
    message: str

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's servers write it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": None}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come back, where that may help."""
        return {"Retry-After": str(_RETRY_SECONDS)} if self.status == 503 else {}


def refusal(error: Exception) -> Refusal:
    """How to tell a client about ``error``; a bug is not described to strangers."""
    if not isinstance(error, DeepstitchError):
        return Refusal(500, "internal", "this is a bug in deepstitch, not in the request; the server's log has more")
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    code = error.code if isinstance(error, DisaggregationError) else INVALID if status == 400 else "failed"
    return Refusal(status, code, " ".join(str(error).split()))


def error_of(status: int, body: Any) -> DeepstitchError:
    """The error that a server of ours described with ``body``."""
    told = body.get("error") if isinstance(body, dict) else None
    if not isinstance(told, dict):
        return DeepstitchError(f"the server answered with status {status} and no reason")
    code, message = str(told.get("code")), str(told.get("message"))
    if code == INVALID:
        return InputError(message)
    if code in ("failed", "internal"):
        return DeepstitchError(message)
    return error_from_code(code, message)
