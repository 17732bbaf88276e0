"""Mooncake's transfer engine: the language side reads over its TCP, or over RDMA where there is such a network.

The engine listens at every address, without authentication, and who knows the port can write into the pool as well as
read it: for networks that are trusted as a whole. A connection of our own goes besides it (see ``gate``); the engine's
address is told to admitted readers only, and peers that die or stop are noticed by us.

Reads are many short transfers that are polled, a few at a time. The engine's own calls that wait cannot be interrupted,
fail for good when given too much at once, and after a failure go on writing; so a failed read takes its engine with it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.errors import InputError, MissingDependency
from deepstitch.runtime.disaggregated.errors import PeerHung, PeerLost, ProtocolError
from deepstitch.runtime.disaggregated.transport import Span
from deepstitch.runtime.disaggregated.transport.exporter import GatedExporter
from deepstitch.runtime.disaggregated.transport.gate import KNOCK_SECONDS, knock
from deepstitch.runtime.disaggregated.transport.reader import Reader, Stretch, address_of, stretches
from deepstitch.runtime.disaggregated.transport.sockets import connect, listen, new_memory, number_in

__all__ = ["MooncakeExporter", "MooncakeImporter", "open_exporter", "open_importer"]

_PIECE = 4 << 20  # bytes of one transfer
_WINDOW = 8  # transfers under way; more than about 2,000 are refused, and can leave the pair unusable
_SCRATCH = 64  # bytes
_NAP = 50e-6  # seconds between two looks
_DONE, _RUNNING = 1, 0
# A transfer without progress must fail before one that takes too long: else the engine writes after it has given up.
_SETTINGS = {"MC_TCP_PROGRESS_TIMEOUT_SEC": "5", "MC_TRANSFER_TIMEOUT": "60", "MC_LOG_LEVEL": "WARNING"}
_LIBRARY = "apt-get install --no-install-recommends libibverbs1"


def open_exporter(nbytes: int, where: str) -> MooncakeExporter:
    """A pool of ``nbytes`` that is served at host ``where``, or at ``rdma://host``.

    Raises:
        MissingDependency: the package is not installed.
        InputError: the engine does not start, or there is no such memory.
    """
    return MooncakeExporter(nbytes, where)


def open_importer(endpoint: Mapping[str, str], ticket: str, local: npt.NDArray[np.uint8]) -> MooncakeImporter:
    """Connect to the pool at ``endpoint``.

    Raises:
        PeerLost: nobody answers there.
        PeerHung: no answer to the ticket.
        HandshakeRefused: the ticket is not taken.
        MissingDependency: the package is not installed.
        ProtocolError: the endpoint is not of this transport.
    """
    _package()
    nbytes = number_in(endpoint, "nbytes")
    peer = f"encode process at {endpoint.get('host')}:{endpoint.get('port')}"
    connection = connect(endpoint, peer)
    greeting, _ = knock(connection, ticket, peer=peer)
    try:
        facts = json.loads(greeting)
        target, address, protocol = str(facts["target"]), int(facts["address"]), str(facts["protocol"])
    except (ValueError, KeyError, TypeError):
        connection.close()
        raise ProtocolError(f"{peer}: its pool is not one of transport mooncake") from None
    try:
        scratch = np.zeros(_SCRATCH, np.uint8)
        engine = _start(connection.getsockname()[0], protocol, local, scratch)
        importer = MooncakeImporter(connection, engine, target, address, nbytes, local, scratch, peer)
    except BaseException:
        connection.close()
        raise
    try:
        importer.warm_up()
    except BaseException:
        importer.close()
        raise
    return importer


class MooncakeExporter(GatedExporter):
    """Encode side; see :class:`~deepstitch.runtime.disaggregated.transport.Exporter`."""

    def __init__(self, nbytes: int, where: str) -> None:
        protocol, _, host = where.rpartition("://")
        protocol = protocol or "tcp"
        _package()
        memory, listener = new_memory(nbytes), listen(host)
        try:
            self._engine = _start(host, protocol, memory)
        except BaseException:
            listener.close()
            raise
        target = f"{host}:{self._engine.get_rpc_port()}"
        greeting = {"target": target, "address": address_of(memory), "protocol": protocol}
        super().__init__(memory, listener, host, greeting=json.dumps(greeting).encode())

    def _free(self) -> None:
        self._engine = None  # before its memory


class MooncakeImporter(Reader):
    """Language side; see :class:`~deepstitch.runtime.disaggregated.transport.Importer`."""

    def __init__(
        self,
        connection: socket.socket,
        engine: Any,
        target: str,
        address: int,
        nbytes: int,
        local: npt.NDArray[np.uint8],
        scratch: npt.NDArray[np.uint8],
        peer: str,
    ) -> None:
        super().__init__(connection, nbytes, local, peer)
        connection.setblocking(False)
        self._engine = engine
        self._target = target
        self._address = address
        self._local, self._scratch = local, scratch  # registered with the engine, so they must live as long

    def warm_up(self) -> None:
        """Make the engine connect now: it would wait a minute for a process that has stopped since.

        Raises:
            PeerLost: it cannot be reached.
            PeerHung: no answer.
        """
        scratch = self._scratch[: min(self._nbytes, _SCRATCH)]
        try:
            self._pull(iter([Stretch(0, address_of(scratch), len(scratch))]), KNOCK_SECONDS)
        except TimeoutError:
            raise PeerHung(f"{self._peer}: the transfer engine has no answer for {KNOCK_SECONDS:g} s") from None

    def _read(self, spans: list[Span], timeout: float) -> None:
        self._pull(stretches(spans, _PIECE), timeout)

    def _pull(self, waiting: Iterator[Stretch], timeout: float) -> None:
        running: list[int] = []
        last_progress = time.monotonic()
        while True:
            self._check_alive()
            while len(running) < _WINDOW and (piece := next(waiting, None)):
                running.append(self._submit(piece))
            if not running:
                return
            left = [transfer for transfer in running if not self._is_done(transfer)]
            if len(left) < len(running):
                running, last_progress = left, time.monotonic()
            elif time.monotonic() - last_progress >= timeout:
                raise TimeoutError
            else:
                time.sleep(_NAP)

    def _submit(self, piece: Stretch) -> int:
        # a batch of one: of larger ones, the engine tells the state of the first transfer only
        transfer: int = self._engine.batch_transfer_async_read(
            self._target, [piece.address], [self._address + piece.offset], [piece.nbytes]
        )
        if transfer == 0:
            self._check_alive()
            raise PeerLost(f"{self._peer}: the transfer engine does not take a transfer")
        return transfer

    def _is_done(self, transfer: int) -> bool:
        state: int = self._engine.transfer_check_status(transfer)
        if state not in (_DONE, _RUNNING):
            self._check_alive()
            raise PeerLost(f"{self._peer}: the transfer engine reports a failure ({state}), and never which")
        return state == _DONE

    def _free(self) -> None:
        # Ends its threads and connections; only then is nothing written any more.
        self._engine = None


def _package() -> Any:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake import engine
    except ImportError as error:
        if ".so" in str(error):
            raise InputError(f"transport mooncake: a system library is missing ({error}): {_LIBRARY}") from None
        raise MissingDependency(
            "mooncake-transfer-engine-non-cuda", "mooncake", f"transport mooncake (it also needs: {_LIBRARY})"
        ) from None
    return engine


def _start(host: str, protocol: str, *memories: npt.NDArray[np.uint8]) -> Any:
    """An engine that has the memory registered: on TCP it would not notice one that is not, on RDMA it would."""
    engine = _package().TransferEngine()
    if code := engine.initialize(host, "P2PHANDSHAKE", protocol, ""):
        raise InputError(f"the Mooncake engine does not start at {host!r} over {protocol} (code {code})")
    for memory in memories:
        if code := engine.register_memory(address_of(memory), len(memory)):
            raise InputError(
                f"Mooncake does not take {len(memory)} bytes of memory (code {code}); use another transport"
            )
    return engine
