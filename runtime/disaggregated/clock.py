"""What time it is in another process, from the times it tells when it is asked."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

__all__ = ["PeerClock"]

_KEPT = 16  # of the last answers; clocks of two machines drift apart


class _Reading(NamedTuple):
    error: float
    ahead: float


class PeerClock:
    """The monotonic clock of the process at the other end of a connection.

    What it told lies between asking and hearing it. So the offset is known to half the time that took, and the quickest
    of the last answers says most (as in Cristian, 1989). Processes of one machine share the clock.
    """

    def __init__(self, *, shared: bool) -> None:
        """``shared``: the other process is on this machine."""
        self._readings: deque[_Reading] = deque([_Reading(0.0, 0.0)] if shared else [], maxlen=_KEPT)
        self._shared = shared

    def observe(self, asked: float, told: float, heard: float) -> None:
        """It told its time between two times of this process; seconds."""
        if not self._shared:
            self._readings.append(_Reading((heard - asked) / 2, told - (asked + heard) / 2))

    @property
    def error(self) -> float:
        """Seconds by which :meth:`here` may be wrong."""
        return min(self._readings).error

    def here(self, there: float) -> float:
        """The time of this process's clock when it was ``there`` by the other's."""
        return there - min(self._readings).ahead
