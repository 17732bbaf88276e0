"""One machine, one piece of memory: the encode side's pool is mapped read-only by the language side, which copies.

The pool is a memfd that lives as long as the exporter: every page is there before the first transfer (a fresh one
costs more in page faults than the copy), its size is sealed, and so is writing by anybody but its maker. Who shows a
ticket at a unix socket gets the file descriptor. That connection stays open: its end is the other process's.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deepstitch.errors import InputError, UnsupportedError
from deepstitch.runtime.disaggregated.errors import PeerLost, ProtocolError, StaleTransfer
from deepstitch.runtime.disaggregated.socket_path import short_path
from deepstitch.runtime.disaggregated.transport import Span
from deepstitch.runtime.disaggregated.transport.gate import KNOCK_SECONDS, Gate, knock
from deepstitch.runtime.disaggregated.transport.reader import Reader
from deepstitch.runtime.disaggregated.transport.sockets import number_in, text_in

__all__ = ["ShmExporter", "ShmImporter", "open_exporter", "open_importer"]

_PREFIX, _SUFFIX = "deepstitch-pool-", ".sock"
_PIECE = 1 << 20  # bytes copied between two looks at the connection
_SEAL_FUTURE_WRITE = 0x10  # of linux/fcntl.h; not in Python's fcntl
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def open_exporter(nbytes: int, where: str) -> ShmExporter:
    """A pool of ``nbytes`` whose socket file lies in folder ``where``.

    Raises:
        InputError: the folder cannot be used, or there is no such memory.
        UnsupportedError: this system cannot share memory safely.
    """
    return ShmExporter(nbytes, where)


def open_importer(endpoint: Mapping[str, str], ticket: str, local: npt.NDArray[np.uint8]) -> ShmImporter:
    """Map the pool behind the socket file of ``endpoint``.

    Raises:
        PeerLost: nobody listens there.
        PeerHung: no answer.
        HandshakeRefused: the ticket is not taken.
        StaleTransfer: the pool is not the announced one.
        ProtocolError: the endpoint is not of this transport.
    """
    path, nbytes = text_in(endpoint, "path"), number_in(endpoint, "nbytes")
    peer = f"encode process at {path}"
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(KNOCK_SECONDS)
        with short_path(path) as name:
            connection.connect(name)
    except OSError as error:
        connection.close()
        raise PeerLost(f"{peer}: cannot connect ({error.strerror or error})") from None
    _, descriptors = knock(connection, ticket, peer=peer)
    try:
        return ShmImporter(connection, _map_readonly(descriptors, nbytes, peer), local, peer)
    except BaseException:
        connection.close()
        raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class ShmExporter:
    """Encode side; see :class:`~deepstitch.runtime.disaggregated.transport.Exporter`."""

    def __init__(self, nbytes: int, where: str) -> None:
        self.memory, descriptor = _new_pool(nbytes)
        self._descriptor = descriptor
        try:
            listener, self._path = _listen(Path(where))
        except BaseException:
            os.close(descriptor)
            raise
        self._gate = Gate(listener, descriptors=[descriptor])
        self.endpoint: Mapping[str, str] = {"path": str(self._path), "nbytes": str(nbytes)}

    def admit(self, ticket: str) -> None:
        """Let whoever shows ``ticket`` read."""
        self._gate.admit(ticket)

    def revoke(self, ticket: str) -> None:
        """End its connections. A reader that has mapped the pool already could go on reading, but not unnoticed."""
        self._gate.revoke(ticket)

    def close(self) -> None:
        """Stop serving; the memory itself goes with its last array."""
        self._gate.close()
        self._path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.memory = np.zeros(0, np.uint8)


class ShmImporter(Reader):
    """Language side; see :class:`~deepstitch.runtime.disaggregated.transport.Importer`.

    A stopped encode process does not hinder reading: what it has staged is there.
    """

    immediate = True

    def __init__(self, connection: socket.socket, pages: mmap.mmap, local: npt.NDArray[np.uint8], peer: str) -> None:
        super().__init__(connection, len(pages), local, peer)
        connection.setblocking(False)
        self._pages = pages

    def _read(self, spans: list[Span], timeout: float) -> None:
        self._check_alive()
        pool = np.frombuffer(self._pages, np.uint8)
        try:
            copied = 0
            for offset, local in spans:
                for start in range(0, len(local), _PIECE):
                    piece = local[start : start + _PIECE]
                    piece[:] = pool[offset + start : offset + start + len(piece)]
                    copied += len(piece)
                    if copied >= _PIECE:
                        copied = 0
                        self._check_alive()
            self._check_alive()
        finally:
            del pool  # an error on its way out would hold it, and the pages could not be unmapped

    def _free(self) -> None:
        self._pages.close()


def _new_pool(nbytes: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Its memory, writable, and a descriptor that can only be read."""
    try:
        descriptor = os.memfd_create("deepstitch-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        raise UnsupportedError(f"transport shm needs Linux with memfd ({error}); use transport tcp") from None
    try:
        os.ftruncate(descriptor, nbytes)
        pages = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        seals = _SIZE_SEALS | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return np.frombuffer(pages, np.uint8), os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"cannot make a shared pool of {nbytes} bytes ({error}); ask for fewer or smaller blocks, or use transport "
            "tcp; Linux 5.1 or later is needed"
        ) from None
    finally:
        os.close(descriptor)


def _map_readonly(descriptors: list[int], nbytes: int, peer: str) -> mmap.mmap:
    """The pool, once it is sure that nobody can make it shorter: reading beyond its end would kill this process."""
    if len(descriptors) != 1:
        raise ProtocolError(f"{peer}: sent no memory")
    try:
        seals = fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS)
        size = os.fstat(descriptors[0]).st_size
        if seals & _SIZE_SEALS != _SIZE_SEALS or size != nbytes:
            raise StaleTransfer(f"{peer}: its pool of {size} bytes is not the sealed one of {nbytes} it announced")
        return mmap.mmap(descriptors[0], nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    except OSError as error:
        raise ProtocolError(f"{peer}: sent something that is no pool ({error})") from None


def _listen(folder: Path) -> tuple[socket.socket, Path]:
    """A listening socket file that only this user can connect to, in place of those that dead processes left."""
    try:
        _remove_stale(folder)
        path = folder / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        draft = path.with_suffix(".new")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Renamed when it listens: nobody connects before the mode is set, nor takes it for stale.
            with short_path(draft) as name:
                listener.bind(name)
            draft.chmod(stat.S_IRUSR | stat.S_IWUSR)
            listener.listen(64)
            draft.rename(path)
        except BaseException:
            listener.close()
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot make a socket file in {folder} ({error}); pass a writable folder") from None
    return listener, path


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                with short_path(path) as name:
                    probe.connect(name)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
