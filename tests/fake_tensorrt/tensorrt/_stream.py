"""Work on a stream: in the order of a stand-in libcuda's stream if there is one, else at once."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from typing import Any

_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_kept: list[Any] = []  # a captured graph may run them again at any time
_failures: list[BaseException] = []


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None


def enqueue(stream: int, work: Callable[[], None]) -> int:
    """Run ``work`` when everything before it on the stream has run; returns a code of CUDA's.

    ``int fake_cuda_enqueue(void *stream, void (*callback)(void *), void *data)`` of the stand-in puts it in order,
    makes device memory readable while it runs, and keeps it in a graph that is being captured.
    """
    entry = getattr(_driver(), "fake_cuda_enqueue", None)
    if entry is None:
        work()
        return 0

    def called(_: Any) -> None:
        try:
            work()
        except BaseException as error:  # ctypes would print and forget it
            traceback.print_exc()
            _failures.append(error)

    callback = _WORK(called)
    _kept.append(callback)
    entry.argtypes = [ctypes.c_void_p, _WORK, ctypes.c_void_p]
    status = entry(stream, callback, None)
    if _failures:
        raise RuntimeError(f"an earlier run failed: {_failures[0]!r}") from _failures[0]
    return status


def is_capturing(stream: int) -> bool:
    """Whether work on this stream goes into a graph instead of running."""
    asked = getattr(_driver(), "cuStreamIsCapturing", None)
    if asked is None:
        return False
    status = ctypes.c_int()
    return asked(ctypes.c_void_p(stream), ctypes.byref(status)) == 0 and status.value == 1
