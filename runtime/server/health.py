"""Whether a server works: found out by letting it work, not by whether it answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from deepstitch.errors import DeepstitchError
from deepstitch.runtime.disaggregated.errors import DeadlineExceeded
from deepstitch.runtime.server.refusals import refusal

__all__ = ["Health"]

Check = Callable[[], Awaitable[dict[str, Any]]]
_MAX_AGE = 2.0
_TIMEOUT = 10.0


class Health:
    """The last result of ``check``, renewed when somebody asks and it is too old. Who asks meanwhile waits for it."""

    def __init__(self, check: Check, *, max_age: float = _MAX_AGE, timeout: float = _TIMEOUT) -> None:
        """Ask ``check`` for real work; it raises where the work cannot be done.

        Args:
            check: see above.
            max_age: seconds since a check began for which its result stands.
            timeout: seconds it may take.
        """
        self._check, self._max_age, self._timeout = check, max_age, timeout
        self._lock = asyncio.Lock()
        self._began = float("-inf")
        self._report: tuple[int, dict[str, Any]] = (503, {})

    async def __call__(self) -> tuple[int, dict[str, Any]]:
        """Status 200 or 503, and the details or the reason."""
        async with self._lock:  # many who ask cost one check
            if time.monotonic() - self._began > self._max_age:
                began = time.monotonic()
                self._report = await self._run(began)
                self._began = began
            status, details = self._report
            return status, {**details, "checked_seconds_ago": round(time.monotonic() - self._began, 3)}

    async def _run(self, began: float) -> tuple[int, dict[str, Any]]:
        try:
            details = await asyncio.wait_for(self._check(), self._timeout)
        except asyncio.TimeoutError:
            return _failing(DeadlineExceeded(f"the check did not end within {self._timeout:g} s"))
        except DeepstitchError as error:
            return _failing(error)
        except Exception as error:
            logging.getLogger(__name__).exception("the health check failed")
            return _failing(error)
        return 200, {"status": "ok", **details, "check_seconds": round(time.monotonic() - began, 4)}


def _failing(error: Exception) -> tuple[int, dict[str, Any]]:
    told = refusal(error)
    return 503, {"status": "failing", "code": told.code, "reason": told.message}
