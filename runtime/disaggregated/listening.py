"""The socket a server listens at, and its file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.config import Address
from deepstitch.runtime.disaggregated.socket_path import short_path

__all__ = ["SocketFile", "bound_socket"]


class SocketFile(NamedTuple):
    """A socket's file, and how to know it again: numbers of inodes are given out anew."""

    path: Path
    device: int
    inode: int
    made_ns: int

    @classmethod
    def of(cls, address: Address) -> SocketFile | None:
        """The file of a socket that was just bound; None for TCP."""
        if not address.path:
            return None
        path = Path(address.path).absolute()
        with contextlib.suppress(OSError):
            return cls(path, *_marks(path))
        return None

    def remove(self) -> None:
        """Unlink it, unless another process has put its own there."""
        with contextlib.suppress(OSError):
            if _marks(self.path) == (self.device, self.inode, self.made_ns):
                self.path.unlink()


def _marks(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def bound_socket(address: Address) -> socket.socket:
    """Take the address and listen, before the long work of loading begins: from now on nobody else can have it.

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
            listening.listen()  # two sockets that reuse an address may both be bound; only one may listen
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
        with _alone_in(Path(path).absolute().parent), short_path(path) as name:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    probe.settimeout(1.0)
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
            listening.listen()  # else the next one would take it for a dead process's
    except OSError:
        listening.close()
        raise
    return listening


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two processes that find the file of a dead one do not both replace it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be read, or a file system without locks
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
