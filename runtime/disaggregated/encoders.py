"""The encode processes a language process knows: found, connected, given up, found again."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.config import Address, LanguageConfig
from deepstitch.runtime.disaggregated.conn_multimodal.link import SCRATCH_BYTES, Link
from deepstitch.runtime.disaggregated.errors import DisaggregationError, HandshakeRefused
from deepstitch.runtime.disaggregated.media import glimpse
from deepstitch.runtime.disaggregated.messages import ModelIdentity
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.service import end_tasks

__all__ = ["MAX_ENCODERS", "Encoders", "read_registry"]

MAX_ENCODERS = 64
_REFUSED_PAUSE = 5.0  # seconds before an encoder that does not fit is asked again; it may have been replaced
_REGISTRY_PAUSE = 0.5


def read_registry(path: Path) -> tuple[Address, ...]:
    """Addresses in a registry file: one per line, ``#`` begins a comment.

    Raises:
        InputError: it cannot be read, or a line is no address.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of encode processes ({error})") from None
    words = [line.partition("#")[0].strip() for line in lines]
    return tuple(dict.fromkeys(Address.parse(word) for word in words if word))


class Encoders:
    """Keeps one link per encode process standing.

    Attributes:
        problems: why an encoder cannot be used at present, by address.
    """

    def __init__(
        self, config: LanguageConfig, identity: ModelIdentity, memory: npt.NDArray[np.uint8], metrics: Metrics
    ) -> None:
        """``memory`` is the landing memory; its last ``MAX_ENCODERS * SCRATCH_BYTES`` bytes belong to the links."""
        self.problems: dict[Address, DisaggregationError] = {}
        self._config = config
        self._identity = identity
        self._memory = memory
        self._metrics = metrics
        self._tls: ssl.SSLContext | None = None
        self._links: dict[Address, Link] = {}
        self._keepers: dict[Address, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # those keepers, and others that are about to end
        self._scratch = list(range(MAX_ENCODERS))
        self._watcher: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start(self, tls: ssl.SSLContext | None) -> None:
        """Begin to connect; return when every encoder has answered or could not be reached once.

        Raises:
            HandshakeRefused: an encoder of the list does not fit this process; it says why.
            InputError: the registry cannot be read, or there are too many encoders.
        """
        self._tls = tls
        addresses = self._config.encoders
        if self._config.registry is not None:
            addresses = (*addresses, *read_registry(self._config.registry))
            self._watcher = asyncio.create_task(self._watch(self._config.registry))
        self._follow(addresses)
        while any(each not in self._links and each not in self.problems for each in self._keepers):
            await self._changed.wait()
        for address in self._config.encoders:
            if isinstance(refused := self.problems.get(address), HandshakeRefused):
                raise refused

    async def stop(self) -> None:
        """End all connections."""
        await end_tasks([*self._tasks, *([self._watcher] if self._watcher else [])])

    @property
    def connected(self) -> dict[Address, Link]:
        """Links that stand."""
        return dict(self._links)

    def pick(self, tried: set[Address], picture: bytes = b"") -> Link | None:
        """The link with the fewest requests, one that was not tried before where there is one.

        Among equals, always the same one for the same ``picture`` (rendezvous hashing: Thaler and Ravishankar, 1998):
        that one may have its encoder outputs still.
        """
        return self.pick_new(tried, picture) or self.pick_new(set(), picture)

    def pick_new(self, tried: set[Address], picture: bytes = b"") -> Link | None:
        """As :meth:`pick`, but none where all were tried."""
        alive = {at: link for at, link in self._links.items() if at not in tried and not link.caller.lost.done()}
        seed = glimpse(picture)
        best = min(alive, key=lambda at: (alive[at].rooms, glimpse(f"{at} {seed}".encode())), default=None)
        return alive[best] if best is not None else None

    async def wait_for_change(self, timeout: float) -> None:
        """Return when an encoder has come or gone, or after ``timeout`` seconds."""
        changed = self._changed  # now: wait_for may begin later, after the change, and would wait for the next one
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), timeout)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _follow(self, addresses: tuple[Address, ...]) -> None:
        """Keep links to these and to no others."""
        if len(addresses) > MAX_ENCODERS:
            raise InputError(f"{len(addresses)} encode processes; one language process takes {MAX_ENCODERS}")
        for address in set(self._keepers) - set(addresses):
            self._keepers.pop(address).cancel()
        for address in addresses:
            if address not in self._keepers:
                task = self._keepers[address] = asyncio.create_task(self._keep(address))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _watch(self, registry: Path) -> None:
        """Follow the registry file; while it cannot be read, what was read last holds."""
        seen: object = None
        while True:
            with contextlib.suppress(InputError, OSError):
                stat = registry.stat()
                if seen not in (None, (stat.st_mtime_ns, stat.st_size, stat.st_ino)):
                    self._follow((*self._config.encoders, *read_registry(registry)))
                seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            await asyncio.sleep(_REGISTRY_PAUSE)

    async def _keep(self, address: Address) -> None:
        """Connect, stay until the connection ends, connect again."""
        while not self._scratch:  # links that were given up are still being closed
            await asyncio.sleep(self._config.deadlines.reconnect)
        slot = self._scratch.pop()
        begin = len(self._memory) - (slot + 1) * SCRATCH_BYTES
        scratch = self._memory[begin : begin + SCRATCH_BYTES]
        self._metrics.gauge("encoder_up", lambda: float(address in self._links), address=str(address))
        try:
            while True:
                pause = self._config.deadlines.reconnect
                try:
                    await self._stay(address, scratch)
                except HandshakeRefused as error:
                    self.problems[address], pause = error, _REFUSED_PAUSE
                except DisaggregationError as error:
                    self.problems[address] = error
                except Exception as error:  # no address, a transport that is not installed here or does not start
                    self.problems[address], pause = HandshakeRefused(f"{address}: {error}"), _REFUSED_PAUSE
                self._tell()
                await asyncio.sleep(pause)
        finally:
            if self._keepers.get(address) in (None, asyncio.current_task()):  # else there is a newer one
                self.problems.pop(address, None)
                self._metrics.forget("encoder_up", address=str(address))
            self._scratch.append(slot)
            self._tell()

    async def _stay(self, address: Address, scratch: npt.NDArray[np.uint8]) -> None:
        link = await Link.open(
            address,
            token=self._config.token,
            identity=self._identity,
            deadlines=self._config.deadlines,
            memory=self._memory,
            scratch=scratch,
            tls=self._tls,
            count=lambda direction: self._metrics.count("messages_total", direction=direction),
        )
        try:
            self._links[address] = link
            self.problems.pop(address, None)
            self._tell()
            raise await asyncio.shield(link.caller.lost)
        finally:
            if self._links.get(address) is link:
                del self._links[address]
            await link.close()
