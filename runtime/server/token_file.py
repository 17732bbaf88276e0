"""The secret that encode processes, language processes and clients share."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from deepstitch.errors import InputError

__all__ = ["read_token"]

_MIN_LENGTH = 16
_MAX_LENGTH = 1024


def read_token(path: Path) -> str:
    """The token in a file of one line that nobody else may read.

    Raises:
        InputError: no such file, others may read it, or there is no usable token in it.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_LENGTH + 1)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(f"token file {path}: {reason}; make one with {_recipe(path)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"token file {path}: not a regular file")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise InputError(f"token file {path}: others may read it (mode {mode:04o}); chmod 600 {path}")
    token = content.decode("ascii", "replace").strip()
    if not _MIN_LENGTH <= len(token) <= _MAX_LENGTH or not all("!" <= letter <= "~" for letter in token):
        raise InputError(
            f"token file {path}: a token is one line of {_MIN_LENGTH} to {_MAX_LENGTH} letters, digits and signs; "
            f"make one with {_recipe(path)}"
        )
    return token


def _recipe(path: Path) -> str:
    return f"(umask 077; openssl rand -hex 32 > {path})"
