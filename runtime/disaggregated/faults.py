"""Named steps of the protocol at which a test may kill or stop the process.

``encode.staged=kill`` ends the process with SIGKILL when it reaches that step for the first time, ``…=stop`` suspends
it with SIGSTOP, ``…=kill@3`` at the third time. Several are separated by commas. Nothing happens without being told to.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

from deepstitch.errors import InputError, did_you_mean

__all__ = ["STEPS", "Faults"]

STEPS = (
    "encode.accepted",
    "encode.encoded",
    "encode.announced",
    "encode.staging",
    "encode.staged",
    "encode.ready",
    "encode.received",
    "encode.released",
    "language.requested",
    "language.announced",
    "language.init_sent",
    "language.allocated",
    "language.reading",
    "language.read",
    "language.received_sent",
    "language.resume_sent",
    "language.release_sent",
    "language.decoding",
)
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Faults:
    """What to do at which step."""

    def __init__(self, text: str = "") -> None:
        """Read a list of ``step=action`` or ``step=action@n``.

        Raises:
            InputError: no such step or action.
        """
        self._plan: dict[str, tuple[signal.Signals, int]] = {}
        self._seen: Counter[str] = Counter()
        for each in filter(None, text.split(",")):
            step, _, action = each.partition("=")
            name, _, turn = action.partition("@")
            if step not in STEPS or name not in _SIGNALS or not (turn or "1").isdigit():
                hint = did_you_mean(step, STEPS)
                raise InputError(f"fault {each!r}: expected STEP=kill or STEP=stop, with STEP a known one{hint}")
            self._plan[step] = (_SIGNALS[name], int(turn or 1))

    def reached(self, step: str) -> None:
        """Say that the process is at ``step``."""
        if step in self._plan:
            self._seen[step] += 1
            number, turn = self._plan[step]
            if self._seen[step] == turn:
                os.kill(os.getpid(), number)
