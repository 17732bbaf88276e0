"""Socket files in folders of any depth: the system takes paths of 107 bytes only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["short_path"]

_LONGEST = 107  # bytes of sockaddr_un.sun_path, without the zero at the end


@contextlib.contextmanager
def short_path(path: str | Path) -> Iterator[str]:
    """A name under which ``bind`` and ``connect`` reach ``path``, as long as the context lasts.

    Raises:
        OSError: there is no such folder.
    """
    whole = Path(path)
    if len(os.fsencode(whole)) <= _LONGEST:
        yield str(whole)
        return
    folder = os.open(whole.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{whole.name}"
    finally:
        os.close(folder)
