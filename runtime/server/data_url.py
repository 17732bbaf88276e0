"""Pictures and clips that come inside a request. Nothing is fetched and no file is opened for a client."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from deepstitch.errors import InputError

__all__ = ["data_url", "decode_data_url"]


def decode_data_url(url: Any, medium: str, where: str) -> bytes:
    """The bytes of ``data:image/png;base64,…``.

    Args:
        url: what the client sent.
        medium: ``image`` or ``video``.
        where: the part, for messages.

    Raises:
        InputError: another kind of URL or of content, or not base64.
    """
    if not isinstance(url, str):
        raise InputError(f"{where}: the url must be a string, not {type(url).__name__}")
    if url[:5].lower() != "data:":
        scheme = url.partition(":")[0][:20] if ":" in url[:20] else ""
        kind = f"an address ({scheme}:…)" if scheme else "no data: URL"
        raise InputError(
            f"{where}: {kind}; this server fetches and opens nothing for clients, "
            f"so send the {medium} itself as data:{medium}/…;base64,…"
        )
    head, comma, body = url.partition(",")
    media_type, *parameters = head[5:].split(";")
    if not comma or not media_type.lower().startswith(f"{medium}/"):
        raise InputError(f"{where}: {head[:60]!r} is no {medium}; send data:{medium}/…;base64,…")
    if not parameters or parameters[-1].strip().lower() != "base64":
        raise InputError(f"{where}: the data must be base64; send data:{media_type};base64,…")
    try:
        content = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: not valid base64 ({error})") from None
    if not content:
        raise InputError(f"{where}: the {medium} is empty")
    return content


def data_url(content: bytes, media_type: str) -> str:
    """The reverse, for clients."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
