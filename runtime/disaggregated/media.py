"""Pictures and clips of a request, as the files they come in."""

from __future__ import annotations

from typing import Any

from deepstitch.runtime.disaggregated.errors import RequestRefused

__all__ = ["glimpse", "refuse_sources"]

_TOLD_APART_BY = 1 << 16  # bytes; the event loop has no time for all of a clip


def glimpse(file: bytes) -> int:
    """A number that is the same for equal files, and rarely for others; cheap however long the file is."""
    import xxhash

    return xxhash.xxh3_64_intdigest(file[:_TOLD_APART_BY], seed=len(file))


def refuse_sources(messages: Any) -> None:
    """Media come as bytes: a part that names a file or an address would have this process open it.

    Raises:
        RequestRefused: a part for a picture or a clip has anything but its type.
    """
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") == "text" or (not part.get("type") and "text" in part):
                continue
            if more := sorted(set(part) - {"type"}):
                raise RequestRefused(f"a part of the messages has {more[0]!r}; pictures and clips are sent as bytes")
