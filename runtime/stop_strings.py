"""Stop strings in a stream of text, also where one is spread over several tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Passes text on until a stop string is complete; holds back what might become one.

    Attributes:
        matched: a stop string was found; everything from its beginning on is dropped.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched = False

    def push(self, piece: str) -> str:
        """Add text; returns what can no longer be part of a stop string."""
        if not self._stop:
            return piece
        text = self._held + piece
        found = [place for place in (text.find(each) for each in self._stop) if place >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)]
        safe = len(text) - self._possible_start(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """The text held back, at the end of the answer."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(max(map(len, self._stop)) - 1, len(text))
        for size in range(longest, 0, -1):
            if any(each.startswith(text[-size:]) for each in self._stop):
                return size
        return 0
