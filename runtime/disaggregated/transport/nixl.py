"""NVIDIA's NIXL over UCX: the language side reads, over RDMA where there is such a network.

A connection of our own goes besides it (see ``gate``): it carries the ticket and, to admitted readers only, what NIXL
needs to know about the pool, and it tells that the other process died. Reads are posted and polled.

Where UCX has only TCP, a reader that gives up on a stopped encode process makes that one abort inside UCX when it goes
on (seen with nixl 1.5.1): nothing foreign is written, but it has to be started again. Reading over RDMA and within one
machine does not involve the other process any more once the connection is set up.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.errors import InputError, MissingDependency
from deepstitch.runtime.disaggregated.errors import PeerLost, ProtocolError
from deepstitch.runtime.disaggregated.transport import Span
from deepstitch.runtime.disaggregated.transport.exporter import GatedExporter
from deepstitch.runtime.disaggregated.transport.gate import knock
from deepstitch.runtime.disaggregated.transport.reader import Reader, Stretch, address_of, stretches
from deepstitch.runtime.disaggregated.transport.sockets import connect, listen, new_memory, number_in

__all__ = ["NixlExporter", "NixlImporter", "open_exporter", "open_importer"]

_PIECE = 1 << 20  # bytes of one stretch
_BATCH = 64  # stretches of one transfer
_NAP = 50e-6  # seconds between two looks
_DONE, _RUNNING = "DONE", "PROC"


def open_exporter(nbytes: int, where: str) -> NixlExporter:
    """A pool of ``nbytes``; its gate listens at host ``where``.

    Raises:
        MissingDependency: the package is not installed.
        InputError: NIXL does not start, or there is no such memory.
    """
    return NixlExporter(nbytes, where)


def open_importer(endpoint: Mapping[str, str], ticket: str, local: npt.NDArray[np.uint8]) -> NixlImporter:
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
    agent = None
    try:
        facts = json.loads(greeting)
        metadata, address = base64.b64decode(facts["metadata"]), int(facts["address"])
        agent = _Agent(local)
        agent.meet(metadata, peer)
        return NixlImporter(connection, agent, address, nbytes, local, peer)
    except BaseException as error:
        if agent is not None:
            agent.close()
        connection.close()
        if isinstance(error, ValueError | KeyError | TypeError):
            raise ProtocolError(f"{peer}: its pool is not one of transport nixl") from None
        raise


class NixlExporter(GatedExporter):
    """Encode side; see :class:`~deepstitch.runtime.disaggregated.transport.Exporter`."""

    def __init__(self, nbytes: int, where: str) -> None:
        _package()
        memory, listener = new_memory(nbytes), listen(where)
        try:
            self._agent = _Agent(memory)
        except BaseException:
            listener.close()
            raise
        greeting = {"metadata": base64.b64encode(self._agent.metadata).decode(), "address": address_of(memory)}
        super().__init__(memory, listener, where, greeting=json.dumps(greeting).encode())

    def _free(self) -> None:
        self._agent.close()  # before its memory


class NixlImporter(Reader):
    """Language side; see :class:`~deepstitch.runtime.disaggregated.transport.Importer`."""

    def __init__(
        self,
        connection: socket.socket,
        agent: _Agent,
        address: int,
        nbytes: int,
        local: npt.NDArray[np.uint8],
        peer: str,
    ) -> None:
        super().__init__(connection, nbytes, local, peer)
        connection.setblocking(False)
        self._agent = agent
        self._address = address
        self._local = local  # registered with the agent, so it must live as long

    def _read(self, spans: list[Span], timeout: float) -> None:
        self._check_alive()
        remaining = stretches(spans, _PIECE)
        while batch := list(islice(remaining, _BATCH)):
            self._transfer(batch, timeout)
        self._check_alive()

    def _transfer(self, batch: list[Stretch], timeout: float) -> None:
        started = time.monotonic()
        try:
            state = self._agent.post([(each._replace(offset=self._address + each.offset)) for each in batch])
            while state == _RUNNING:
                self._check_alive()
                if time.monotonic() - started >= timeout:
                    raise TimeoutError
                time.sleep(_NAP)
                state = self._agent.state()
        except self._agent.errors as error:
            self._check_alive()
            raise PeerLost(f"{self._peer}: NIXL reports {error}") from None
        if state != _DONE:
            self._check_alive()
            raise PeerLost(f"{self._peer}: NIXL reports a failed transfer")

    def _free(self) -> None:
        # Ends its connections; only then is nothing written any more.
        self._agent.close()


class _Agent:
    """A NIXL agent with one piece of memory, one transfer at a time, and at most one other agent.

    Attributes:
        metadata: what the other agent needs to know.
        errors: what NIXL raises.
    """

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        api = _package()
        self.errors = _errors()
        refusals: tuple[type[Exception], ...] = (*self.errors, KeyError, RuntimeError)
        try:
            # A name is an identity: two agents of one name would be taken for one.
            config = api.nixl_agent_config(backends=["UCX"])
            self._agent = api.nixl_agent(f"deepstitch-{secrets.token_hex(8)}", config)
            self._registered = self._agent.register_memory(
                [(address_of(memory), len(memory), 0, "")], "DRAM", backends=["UCX"]
            )
            self.metadata: bytes = self._agent.get_agent_metadata()
        except refusals as error:
            raise InputError(f"NIXL does not start with a pool of {len(memory)} bytes: {error!r}") from None
        self._other: Any = None
        self._transfer: Any = None

    def meet(self, metadata: bytes, peer: str) -> None:
        """Get to know the agent that may be read.

        Raises:
            PeerLost: it cannot be reached.
        """
        try:
            other = self._agent.add_remote_agent(metadata)
        except self.errors as error:
            raise PeerLost(f"{peer}: NIXL cannot reach it ({error})") from None
        self._other = other.decode() if isinstance(other, bytes) else other

    def post(self, batch: list[Stretch]) -> str:
        """Begin to read, ``offset`` being an address in the other process; returns the state."""
        self._release()
        local = self._agent.get_xfer_descs([(each.address, each.nbytes, 0) for each in batch], "DRAM")
        remote = self._agent.get_xfer_descs([(each.offset, each.nbytes, 0) for each in batch], "DRAM")
        self._transfer = self._agent.initialize_xfer("READ", local, remote, self._other)
        return str(self._agent.transfer(self._transfer))

    def state(self) -> str:
        """Of what was posted last."""
        return str(self._agent.check_xfer_state(self._transfer))

    def close(self) -> None:
        """Give up a transfer under way and let go of the memory; may be called twice."""
        if self._agent is None:
            return
        with contextlib.suppress(*self.errors):
            self._release()
        with contextlib.suppress(*self.errors):
            self._agent.deregister_memory(self._registered)
        if self._other is not None:
            with contextlib.suppress(*self.errors):
                self._agent.remove_remote_agent(self._other)
        self._transfer = self._registered = self._agent = None

    def _release(self) -> None:
        if self._transfer is not None:
            self._agent.release_xfer_handle(self._transfer)
            self._transfer = None


def _package() -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # else it tells of every connection
    try:
        from nixl import _api
    except ImportError as error:
        if ".so" in str(error):
            raise InputError(f"transport nixl: a system library is missing ({error})") from None
        purpose = "transport nixl (without CUDA: pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1)"
        raise MissingDependency("nixl", "nixl", purpose) from None
    return _api


def _errors() -> tuple[type[Exception], ...]:
    from nixl import _bindings

    found = [each for each in vars(_bindings).values() if isinstance(each, type) and issubclass(each, Exception)]
    return tuple(found)
