"""The encode process: prepares prompts, runs the vision encoder, and offers the result for reading."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import time
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec

from deepstitch.errors import BundleError
from deepstitch.runtime.bundle import VISION_ENCODER, Bundle
from deepstitch.runtime.disaggregated.channel import receive, send, welcome
from deepstitch.runtime.disaggregated.config import EncodeConfig
from deepstitch.runtime.disaggregated.conn_multimodal.sender import EncodedPrompt, Sender, SenderTools
from deepstitch.runtime.disaggregated.errors import (
    DisaggregationError,
    EncodeFailed,
    PeerBusy,
    PeerLost,
    ProtocolError,
    StaleTransfer,
)
from deepstitch.runtime.disaggregated.faults import Faults
from deepstitch.runtime.disaggregated.framing import REQUEST_LIMIT
from deepstitch.runtime.disaggregated.identity import model_identity
from deepstitch.runtime.disaggregated.listening import bound_socket
from deepstitch.runtime.disaggregated.messages import (
    EncodeRequest,
    Failure,
    Hello,
    ModelIdentity,
    Ping,
    Pong,
    Release,
    Released,
    RoomMessage,
    Welcome,
)
from deepstitch.runtime.disaggregated.metrics import Metrics
from deepstitch.runtime.disaggregated.pool import BlockPool, layout_for
from deepstitch.runtime.disaggregated.service import ComputeThread, end_tasks, server_tls
from deepstitch.runtime.disaggregated.states import SenderEvent
from deepstitch.runtime.disaggregated.transport import Exporter, open_exporter
from deepstitch.runtime.embedding import EmbeddingTable, merge
from deepstitch.runtime.encoder_cache import EncoderCache
from deepstitch.runtime.engine.ort import OrtEngine
from deepstitch.runtime.parts import ModelParts
from deepstitch.runtime.preprocess import Processor

__all__ = ["EncodeServer"]

_TOMBSTONES = 4096
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

    async def start(self) -> None:
        """Load the bundle and listen.

        Raises:
            DeepstitchError: the bundle cannot be used, or the address is taken.
        """
        listening = bound_socket(self.config.listen)
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
            self._server = await self._listen(listening)
        except BaseException:
            listening.close()
            await self.stop()
            raise
        self._sweeper = asyncio.create_task(self._sweep())
        self.metrics.gauge("rooms", lambda: len(self._rooms))
        self._pool.report(self.metrics)

    async def stop(self) -> None:
        """End connections and rooms, and free everything; may be called twice."""
        if self._server is not None:
            self._server.close()
        await end_tasks([*self._peers, *([self._sweeper] if self._sweeper else [])])
        await self._compute.close()
        if self._exporter is not None:
            self._exporter.close()
        if self.config.listen.path and self._server is not None:
            Path(self.config.listen.path).unlink(missing_ok=True)
        self._server = None

    @property
    def pool(self) -> BlockPool:
        """Blocks it sends from."""
        return self._pool

    @property
    def idle(self) -> bool:
        """No request is here, and no block is held."""
        return not self._rooms and self._pool.idle

    @property
    def encoded(self) -> int:
        """Pictures and clips the vision encoder has worked on."""
        return self._parts.encoder.misses

    async def check(self) -> dict[str, Any]:
        """Encode a small picture.

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
            rows = await asyncio.wait_for(self._compute.run(work), timeout=_HEALTH_SECONDS)
        except asyncio.TimeoutError:
            raise EncodeFailed(f"a small picture was not encoded within {_HEALTH_SECONDS:g} s") from None
        return {"encoded_rows": rows, "seconds": time.monotonic() - began, "rooms": len(self._rooms)}

    def _open_exporter(self, nbytes: int) -> Exporter:
        name, listen = self.config.chosen_transport, self.config.listen
        where = str(Path(listen.path).parent) if name == "shm" else listen.host or "127.0.0.1"
        return open_exporter(name, nbytes, where=where, context=self._tls if name == "tcp" else None)

    async def _listen(self, listening: socket.socket) -> asyncio.AbstractServer:
        if self.config.listen.path:
            return await asyncio.start_unix_server(self._serve, sock=listening)
        server = await asyncio.start_server(self._serve, sock=listening, ssl=self._tls)
        self.address = self.config.listen._replace(port=listening.getsockname()[1])
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One language process, from its connection to its end."""
        task = asyncio.current_task()
        assert task is not None and self._exporter is not None
        self._peers.add(task)
        peer, ticket = uuid.uuid4().hex, secrets.token_hex(16)
        answers: set[asyncio.Task[None]] = set()
        try:
            await asyncio.wait_for(
                welcome(
                    reader,
                    writer,
                    token=self.config.token,
                    epoch=self._epoch,
                    identity=self._identity,
                    answer=lambda hello, proof, identity: self._welcome(hello, proof, identity, ticket),
                ),
                timeout=self.config.deadlines.connect,
            )
            self._exporter.admit(ticket)
            while True:
                message = await receive(reader, REQUEST_LIMIT)
                answer = asyncio.create_task(self._answer(peer, message, writer))
                answers.add(answer)
                answer.add_done_callback(answers.discard)
        except asyncio.CancelledError:
            return  # this side is stopping; asyncio would log it as an error
        except (DisaggregationError, asyncio.TimeoutError, OSError) as error:
            self.metrics.count("refused_connections_total", reason=getattr(error, "code", "timeout"))
        finally:
            self._peers.discard(task)
            self._exporter.revoke(ticket)
            for answer in answers:
                answer.cancel()
            lost = PeerLost("the language process ended the connection")
            for name in [name for name in self._rooms if name.startswith(peer)]:
                self._rooms[name].end(SenderEvent.PEER_LOST, lost)
                self._bury(name)
            with contextlib.suppress(OSError):
                writer.close()

    def _welcome(self, hello: Hello, proof: str, identity: ModelIdentity, ticket: str) -> Welcome:
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
        )

    async def _answer(self, peer: str, message: Any, writer: asyncio.StreamWriter) -> None:
        try:
            if isinstance(message, Ping):
                reply: Any = Pong(seq=message.seq, waiting=self._compute.waiting)
            elif isinstance(message, RoomMessage):
                reply = await self._room(peer, message)
            else:
                raise ProtocolError(f"{type(message).__name__} is not for the encode side")
        except DisaggregationError as error:
            reply = Failure(seq=message.seq, code=error.code, text=str(error)[:4096])
        except Exception as error:  # a bug must not look like a hang, which would cost every room its connection
            logging.getLogger(__name__).exception("a message could not be handled")
            reply = Failure(seq=message.seq, code=EncodeFailed.code, text=f"{type(error).__name__}: {error}"[:4096])
        send(writer, msgspec.structs.replace(reply, seq=message.seq))

    async def _room(self, peer: str, message: RoomMessage) -> Any:
        name = f"{peer}/{message.room}/{message.attempt}"
        room = self._rooms.get(name)
        if room is None:
            released = Released(seq=message.seq, room=message.room, attempt=message.attempt)
            if isinstance(message, Release):
                self._bury(name)  # so that a request which comes after its own release is not begun
                return released
            if not isinstance(message, EncodeRequest) or message.poll or name in self._tombstones:
                raise StaleTransfer("there is no such room (any more)")
            if len(self._rooms) >= self.config.max_requests:
                raise PeerBusy(f"the encode process holds {len(self._rooms)} requests, as many as it admits")
            room = self._rooms[name] = Sender(self._tools, message, name)
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

    async def _encode(self, request: EncodeRequest) -> EncodedPrompt:
        """Preprocess and encode in the compute thread; equal pictures of waiting requests are encoded once."""
        return await self._compute.run(lambda: self._encode_now(request))

    def _encode_now(self, request: EncodeRequest) -> EncodedPrompt:
        parts, began = self._parts, time.monotonic()
        try:
            messages = json.loads(request.messages)
        except ValueError as error:
            raise ProtocolError(f"messages are not JSON: {error}") from None
        prompt = parts.processor(messages, images=list(request.images), videos=list(request.videos))
        prepared, before = time.monotonic(), parts.encoder.hits
        (features,) = parts.encoder.features([prompt.vision])
        encoded = time.monotonic()
        model = parts.engine.bundle.manifest.model
        tokens = merge(
            parts.table,
            prompt,
            features,
            visual_ids=parts.visual_ids,
            deepstack_width=model.num_deepstack * model.hidden_size,
        )
        self.metrics.observe("stage_seconds", prepared - began, stage="preprocess")
        self.metrics.observe("stage_seconds", encoded - prepared, stage="encode")
        self.metrics.count("cache_hits_total", parts.encoder.hits - before)
        seconds = {"began": began, "preprocess": prepared - began, "encode": encoded - prepared}
        return EncodedPrompt(prompt=prompt, tokens=tokens, seconds=seconds)

    def _finished(self, outcome: str, sent: dict[str, int]) -> None:
        self.metrics.count("requests_total", outcome=outcome)
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


def _load(config: EncodeConfig) -> ModelParts:
    bundle = Bundle.open(config.bundle, progress=False)
    manifest = bundle.manifest
    if manifest.vision is None:
        raise BundleError(f"{config.bundle}: this model reads text only; there is nothing for an encode process to do")
    engine = OrtEngine(bundle, threads=config.threads, graphs=[VISION_ENCODER])
    return ModelParts(
        engine=engine,
        table=EmbeddingTable.open(bundle),
        encoder=EncoderCache(engine.vision, config.encoder_cache_bytes),
        processor=Processor.from_folder(bundle.folder, manifest.model, manifest.vision),
    )
