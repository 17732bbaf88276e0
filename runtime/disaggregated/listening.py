"""The socket an encode process listens at."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.config import Address
from deepstitch.runtime.disaggregated.socket_path import short_path

__all__ = ["bound_socket"]


def bound_socket(address: Address) -> socket.socket:
    """Take the address, before the long work of loading begins.

    Raises:
        InputError: it is taken, or cannot be had.
    """
    try:
        if address.path:
            return _unix_socket(address.path)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address.host, address.port))
        except OSError:
            listening.close()
            raise
        return listening
    except OSError as error:
        raise InputError(f"cannot listen at {address}: {error.strerror or error}; use a free address") from None


def _unix_socket(path: str) -> socket.socket:
    """A socket file that only this user can open; one that a dead process left is replaced."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(path) as name:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    probe.connect(name)
                raise OSError("another process listens there")
            if Path(path).exists() and not Path(path).is_socket():
                raise OSError("the file there is no socket")
            Path(path).unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                listening.bind(name)
            finally:
                os.umask(before)
    except OSError:
        listening.close()
        raise
    return listening
