"""The encode process: prepares prompts, runs the vision encoder, and offers the result for reading."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from deepstitch.errors import BundleError
from deepstitch.manifest import Manifest
from deepstitch.runtime.bundle import VISION_ENCODER, Bundle
from deepstitch.runtime.disaggregated.config import EncodeConfig
from deepstitch.runtime.disaggregated.conn_multimodal.sender import (
    EncodedPrompt,
    PreparedSizes,
    Sender,
    SenderTools,
    request_bytes,
)
from deepstitch.runtime.disaggregated.errors import (
    DisaggregationError,
    EncodeFailed,
    PeerBusy,
    PeerLost,
    ProtocolError,
    RequestTooLarge,
    StaleTransfer,
)
from deepstitch.runtime.disaggregated.faults import Faults
from deepstitch.runtime.disaggregated.guests import Guest, listen
from deepstitch.runtime.disaggregated.identity import model_identity
from deepstitch.runtime.disaggregated.listening import SocketFile, bound_socket
from deepstitch.runtime.disaggregated.media import refuse_sources
from deepstitch.runtime.disaggregated.messages import (
    EncodeRequest,
    Hello,
    ModelIdentity,
    Release,
    Released,
    RoomMessage,
    Welcome,
)
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.pool import BlockPool, layout_for
from deepstitch.runtime.disaggregated.service import ComputeThread, end_tasks, server_tls
from deepstitch.runtime.disaggregated.states import SenderEvent, SenderState
from deepstitch.runtime.disaggregated.transport import Exporter, open_exporter
from deepstitch.runtime.embedding import EmbeddingTable, merge
from deepstitch.runtime.encoder_cache import EncoderCache
from deepstitch.runtime.engine.ort import OrtEngine
from deepstitch.runtime.parts import ModelParts
from deepstitch.runtime.preprocess import Processor, Prompt, VisionBatch

__all__ = ["EncodeServer"]

_TOMBSTONES = 4096
_FULL_PAUSE = 0.02
_HEALTH_SECONDS = 10.0
_HEALTH_PIXELS = 64


class EncodeServer:
    """Serves any number of language processes.

    Attributes:
        config: as given.
        metrics: counters and times.
        address: where it listens, once started.
    """

    def __init__(self, config: EncodeConfig) -> None:
        """Nothing is loaded before :meth:`start`."""
        self.config = config
        self.address = config.listen
        self.metrics = Metrics()
        self._epoch = uuid.uuid4().hex
        self._faults = Faults(config.faults)
        self._tls = server_tls(config.tls_certificate)
        self._compute = ComputeThread("vision")
        self._rooms: dict[str, Sender] = {}
        self._tombstones: OrderedDict[str, None] = OrderedDict()
        self._peers: set[asyncio.Task[None]] = set()
        self._server: asyncio.AbstractServer | None = None
        self._exporter: Exporter | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._file: SocketFile | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Load the bundle and listen.

        Raises:
            DeepstitchError: the bundle cannot be used, or the address is taken.
        """
        listening = bound_socket(self.config.listen)
        self._file = SocketFile.of(self.config.listen)
        try:
            self._parts = await self._compute.run(lambda: _load(self.config))
            model = self._parts.engine.bundle.manifest.model
            layout = layout_for(self.config.pool, hidden_size=model.hidden_size, num_deepstack=model.num_deepstack)
            self._exporter = self._open_exporter(layout.nbytes)
            self._pool = BlockPool(layout, self._exporter.memory)
            self._identity = model_identity(self._parts.engine.bundle, self._parts.table)
            shared = self.config.chosen_transport == "shm"
            sums = not shared if self.config.pool.checksums is None else self.config.pool.checksums
            self._tools = SenderTools(
                encode=self._encode,
                pool=self._pool,
                epoch=self._epoch,
                checksums=sums,
                faults=self._faults,
                finished=self._finished,
            )
            self._server = await listen(self._serve, listening, tls=self._tls, handshake=self.config.deadlines.connect)
            if not self.config.listen.path:
                self.address = self.config.listen._replace(port=listening.getsockname()[1])
        except BaseException:
            listening.close()
            await self.stop()
            raise
        self._sweeper = asyncio.create_task(self._sweep())
        self._report()

    async def stop(self) -> None:
        """End connections and rooms, and free everything; may be called twice."""
        if self._server is not None:
            self._server.close()
        await end_tasks([*self._peers, *([self._sweeper] if self._sweeper else [])])
        await self._compute.close()
        if self._exporter is not None:
            self._exporter.close()
        if self._file is not None:
            self._file.remove()
        self._server = self._file = None

    @property
    def pool(self) -> BlockPool:
        """Blocks it sends from."""
        return self._pool

    @property
    def idle(self) -> bool:
        """No request is here, and no block is held."""
        return not self._rooms and self._pool.idle

    @property
    def waiting(self) -> int:
        """Requests ahead of a new one."""
        return self._in_state(SenderState.BOOTSTRAPPING)

    @property
    def encoded(self) -> int:
        """Pictures and clips the vision encoder has worked on."""
        return self._parts.encoder.misses

    async def check(self) -> dict[str, Any]:
        """Encode a small picture; a request that is being computed is as good, ``encoded_rows`` is None then.

        Raises:
            DeepstitchError: it could not be done, or not in time.
        """
        from PIL import Image

        def work() -> int:
            picture = Image.new("RGB", (_HEALTH_PIXELS, _HEALTH_PIXELS))
            prompt = self._parts.processor([{"role": "user", "content": [{"type": "image"}]}], images=[picture])
            assert prompt.vision is not None
            return len(self._parts.engine.vision(prompt.vision)[0])

        began = time.monotonic()
        try:
            rows = await self._compute.probe(work, timeout=_HEALTH_SECONDS, patience=self.config.deadlines.request)
        except asyncio.TimeoutError:
            raise EncodeFailed(f"a small picture was not encoded within {_HEALTH_SECONDS:g} s") from None
        return {"encoded_rows": rows, "seconds": time.monotonic() - began, "rooms": len(self._rooms)}

    def _report(self) -> None:
        """Show what is here."""
        self.metrics.gauge("rooms", lambda: len(self._rooms))
        self.metrics.gauge("connections", lambda: len(self._peers))
        self.metrics.gauge("requests_waiting", lambda: self.waiting)
        self.metrics.gauge("cache_hits_total", lambda: self._parts.encoder.hits)
        self.metrics.gauge("cache_misses_total", lambda: self._parts.encoder.misses)
        self.metrics.gauge("leases", lambda: self._in_state(SenderState.TRANSFERRING))
        self._pool.report(self.metrics)

    def _open_exporter(self, nbytes: int) -> Exporter:
        name, listen = self.config.chosen_transport, self.config.listen
        where = str(Path(listen.path).parent) if name == "shm" else listen.host or "127.0.0.1"
        return open_exporter(name, nbytes, where=where, context=self._tls if name == "tcp" else None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One language process, from its connection to its end."""
        task = asyncio.current_task()
        assert task is not None and self._exporter is not None
        self._peers.add(task)
        guest = Guest(self, reader, writer)
        try:
            await guest.serve(epoch=self._epoch, identity=self._identity)
        except asyncio.CancelledError:
            return  # this side is stopping; asyncio would log it as an error
        except (DisaggregationError, asyncio.TimeoutError, OSError) as error:
            self.metrics.count("refused_connections_total", reason=getattr(error, "code", "timeout"))
        finally:
            self._peers.discard(task)
            self._exporter.revoke(guest.ticket)
            lost = PeerLost("the language process ended the connection")
            for name in [name for name in self._rooms if name.startswith(guest.name)]:
                self._rooms[name].end(SenderEvent.PEER_LOST, lost)
                self._bury(name)
            guest.close()

    def welcome(self, hello: Hello, proof: str, identity: ModelIdentity, ticket: str) -> Welcome:
        """Let somebody in who has proved to have the token.

        Raises:
            ProtocolError: it cannot read this pool.
        """
        assert self._exporter is not None
        transport = self.config.chosen_transport
        if transport not in hello.transports:
            raise ProtocolError(f"transport {transport} is not among those of the language side: {hello.transports}")
        self._exporter.admit(ticket)  # the peer may come as soon as it has read this
        return Welcome(
            seq=0,
            epoch=self._epoch,
            proof=proof,
            model=identity,
            transport=transport,
            endpoint=dict(self._exporter.endpoint),
            ticket=ticket,
            block_tokens=self._pool.layout.block_tokens,
            num_blocks=self._pool.layout.num_blocks,
            num_deepstack_blocks=self._pool.layout.num_deepstack_blocks,
            lease_seconds=self.config.deadlines.lease,
            clock=time.monotonic(),
        )

    def open_room(self, peer: str, message: RoomMessage) -> RoomMessage:
        """Begin what a request asks for; the message without its pictures, which the room has now.

        Raises:
            PeerBusy: as many requests, or bytes, are here as are admitted.
            RequestTooLarge: more bytes than are ever admitted.
            StaleTransfer: it was released before it came.
        """
        if not isinstance(message, EncodeRequest) or message.poll:
            return message
        name = _name(peer, message)
        if name not in self._rooms:
            self._admit(name, message)
            self._rooms[name] = Sender(self._tools, message, name)
        return msgspec.structs.replace(message, poll=True, messages=b"", images=(), videos=())

    def _admit(self, name: str, request: EncodeRequest) -> None:
        if name in self._tombstones:
            raise StaleTransfer("there is no such room (any more)")
        if len(self._rooms) >= self.config.max_requests:
            raise PeerBusy(f"the encode process holds {len(self._rooms)} requests, as many as it admits")
        limit, asked = self.config.request_bytes, request_bytes(request)
        if asked > limit:
            raise RequestTooLarge(
                f"the request has {asked} bytes, the encode process holds {limit}; start it with a larger "
                "--request-mib, or pass smaller pictures"
            )
        if asked + self._held > limit:
            raise PeerBusy(f"the encode process holds {self._held} of {limit} bytes; no room for {asked} more now")

    @property
    def _held(self) -> int:
        return sum(room.nbytes for room in self._rooms.values())

    @property
    def _features(self) -> int:
        return sum(room.nbytes for room in self._rooms.values() if room.machine.state is not SenderState.BOOTSTRAPPING)

    def _in_state(self, state: SenderState) -> int:
        return sum(room.machine.state is state for room in self._rooms.values())

    async def reply_to(self, peer: str, message: RoomMessage) -> Any:
        """Let its room answer; a :class:`DisaggregationError` says why it cannot."""
        name, message = _name(peer, message), self.open_room(peer, message)
        room = self._rooms.get(name)
        if room is None:
            released = Released(seq=message.seq, room=message.room, attempt=message.attempt)
            if isinstance(message, Release):
                self._bury(name)  # so that a request which comes after its own release is not begun
                return released
            raise StaleTransfer("there is no such room (any more)")
        try:
            return await room.handle(message)
        finally:
            if room.machine.terminal:  # and the other side has been told
                self._bury(name)

    def _bury(self, name: str) -> None:
        self._rooms.pop(name, None)
        self._tombstones[name] = None
        while len(self._tombstones) > _TOMBSTONES:
            self._tombstones.popitem(last=False)

    async def _encode(self, request: EncodeRequest, prepared: Callable[[PreparedSizes], None]) -> EncodedPrompt:
        """Preprocess and encode in the compute thread; equal pictures of waiting requests are encoded once.

        One at a time stands in front of that thread, so that a check of health is the next after it. What is encoded
        waits for others to be read where the features that are here take all the memory they may.
        """
        loop = asyncio.get_running_loop()

        def tell(sizes: PreparedSizes) -> None:
            loop.call_soon_threadsafe(prepared, sizes)

        async with self._turn:
            while self._features >= self.config.request_bytes:
                await asyncio.sleep(_FULL_PAUSE)
            encoded, pixels = await self._compute.run(lambda: self._encode_now(request, tell))
            self._compute.forget(pixels)
            return encoded

    def _encode_now(
        self, request: EncodeRequest, prepared: Callable[[PreparedSizes], None]
    ) -> tuple[EncodedPrompt, VisionBatch | None]:
        parts, began = self._parts, time.monotonic()
        try:
            messages = json.loads(request.messages)
        except ValueError as error:
            raise ProtocolError(f"messages are not JSON: {error}") from None
        refuse_sources(messages)
        prompt = parts.processor(messages, images=list(request.images), videos=list(request.videos))
        light, width = self._light(prompt), self._deepstack_width
        ready = time.monotonic()
        rows = int(light.vision.tokens_per_item.sum()) if light.vision and width else 0
        seconds = {"began": began, "preprocess": ready - began}
        prepared(PreparedSizes(prompt=light, deepstack_rows=rows, seconds=seconds))
        (features,) = parts.encoder.features([prompt.vision])
        encoded = time.monotonic()
        tokens = merge(parts.table, light, features, visual_ids=parts.visual_ids, deepstack_width=width)
        # the cache may have let go of the features of each picture; DeepStack's lie together in a copy of their own
        held = sum(each.nbytes for each in features) + 4 * rows * width
        seconds = {"encode": encoded - ready}
        return EncodedPrompt(prompt=light, tokens=tokens, nbytes=held, seconds=seconds), prompt.vision

    def _light(self, prompt: Prompt) -> Prompt:
        """Without the pixels, which are larger than all that is sent."""
        vision, facts = prompt.vision, self._parts.engine.bundle.manifest.vision
        if vision is None or facts is None:
            return prompt
        vision = VisionBatch.without_pixels(vision.grid_thw, vision.content_keys, facts.spatial_merge_size)
        return dataclasses.replace(prompt, vision=vision)

    @property
    def _deepstack_width(self) -> int:
        model = self._parts.engine.bundle.manifest.model
        return model.num_deepstack * model.hidden_size

    def _finished(self, outcome: str, sent: dict[str, int], seconds: dict[str, float]) -> None:
        self.metrics.count("requests_total", outcome=outcome)
        for stage in ("preprocess", "encode", "staging"):
            if stage in seconds:
                self.metrics.observe("stage_seconds", seconds[stage], stage=stage)
        for kind, amount in sent.items():
            self.metrics.count("transfer_bytes_total", amount, kind=kind)

    async def _sweep(self) -> None:
        """End rooms that nobody has spoken of for the length of a lease."""
        lease = self.config.deadlines.lease
        while True:
            await asyncio.sleep(min(1.0, lease / 4))
            for name, room in list(self._rooms.items()):
                if time.monotonic() - room.touched > lease:
                    room.end(SenderEvent.LEASE_EXPIRED, StaleTransfer(f"not spoken of for {lease:g} s"))
                    self._bury(name)


def _name(peer: str, message: RoomMessage) -> str:
    return f"{peer}/{message.room}/{message.attempt}"


def _load(config: EncodeConfig) -> ModelParts:
    if Manifest.read(config.bundle).vision is None:
        raise BundleError(f"{config.bundle}: this model reads text only; there is nothing for an encode process to do")
    bundle = Bundle.open(config.bundle, progress=False, graphs=[VISION_ENCODER])
    manifest = bundle.manifest
    engine = OrtEngine(bundle, threads=config.threads, graphs=[VISION_ENCODER])
    return ModelParts(
        engine=engine,
        table=EmbeddingTable.open(bundle),
        encoder=EncoderCache(engine.vision, config.encoder_cache_bytes),
        processor=Processor.from_folder(bundle.folder, manifest.model, manifest.vision),
    )
