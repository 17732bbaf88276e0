"""What the two servers can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.transport import TRANSPORTS

__all__ = ["Address", "Deadlines", "EncodeConfig", "LanguageConfig", "PoolConfig"]


class Address(NamedTuple):
    """Where an encode process listens: a socket file, or host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``unix:/run/encode.sock`` or ``tcp://host:port``.

        Raises:
            InputError: neither of the two.
        """
        if text.startswith("unix:") and len(text) > len("unix:"):
            return cls(path=text[len("unix:") :])
        host, colon, port = text.removeprefix("tcp://").rpartition(":")
        if text.startswith("tcp://") and host and colon and port.isascii() and port.isdigit() and int(port) < 1 << 16:
            return cls(host=host.strip("[]"), port=int(port))
        raise InputError(f"address {text!r}: expected unix:/path/to/socket or tcp://host:port")

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds.

    Attributes:
        connect: until a connection stands and both sides have proved themselves.
        reply: until a message without an answer is sent again.
        hang: without any answer until the other process counts as hung; also without progress of a read.
        ping: between two signs of life asked for.
        lease: the encode side keeps a room that its language process does not speak of.
        request: the language side spends on getting a request encoded, all attempts together.
        reconnect: between two tries to reach an encoder that does not answer.
        encoder: a request that needs an encode process waits for the first to come (back).
    """

    connect: float = 3.0
    reply: float = 1.5
    hang: float = 3.5
    ping: float = 1.0
    lease: float = 60.0
    request: float = 300.0
    reconnect: float = 0.25
    encoder: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Blocks that rows are sent from or land in.

    Attributes:
        block_tokens: rows per block.
        blocks: blocks of token rows.
        deepstack_blocks: blocks of DeepStack rows; None: as many.
        first_blocks: most token blocks for one transfer; None: all there are. Fewer make longer prompts come in parts.
        checksums: sum every transfer; None: except within one machine's memory.
    """

    block_tokens: int = 128
    blocks: int = 64
    deepstack_blocks: int | None = None
    first_blocks: int | None = None
    checksums: bool | None = None

    def __post_init__(self) -> None:
        for name in ("block_tokens", "blocks", "deepstack_blocks", "first_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeConfig:
    """An encode process.

    Attributes:
        bundle: folder.
        listen: where language processes connect; port 0 takes a free one.
        transport: how the pool is read; None: ``shm`` behind a socket file, else ``tcp``.
        token: shared with the language processes; needed with TCP.
        max_requests: rooms held at a time; more are refused as busy.
        request_bytes: of pictures that wait to be encoded and of features that wait to be read; beyond it, requests are
            refused as busy, and none is encoded before others have been read.
        threads: of the vision encoder.
        tls_certificate: PEM with certificate and key: TLS on the control connection and the ``tcp`` transport.
        faults: for tests, see :mod:`deepstitch.runtime.disaggregated.faults`.
    """

    bundle: Path
    listen: Address
    transport: str | None = None
    token: str = ""
    pool: PoolConfig = field(default_factory=PoolConfig)
    deadlines: Deadlines = field(default_factory=Deadlines)
    max_requests: int = 256
    request_bytes: int = 1 << 30
    threads: int | None = None
    encoder_cache_bytes: int = 256 << 20
    tls_certificate: Path | None = None
    faults: str = ""

    def __post_init__(self) -> None:
        if self.transport is not None and self.transport not in TRANSPORTS:
            raise InputError(f"transport {self.transport!r}: use one of {', '.join(TRANSPORTS)}")
        if self.transport == "shm" and not self.listen.path:
            raise InputError(f"transport shm needs a socket file; {self.listen} is none, use unix:/path/to/socket")
        if not self.listen.path and not self.token:
            raise InputError(f"{self.listen}: a TCP port needs a shared token; pass --token-file FILE")
        if self.tls_certificate is not None and self.listen.path:
            raise InputError("TLS needs a TCP address; leave the certificate out, or listen at tcp://host:port")
        if self.tls_certificate is not None and self.chosen_transport != "tcp":
            raise InputError(
                f"transport {self.chosen_transport} does not encrypt what it moves; leave the certificate out, "
                "or use transport tcp"
            )

    @property
    def chosen_transport(self) -> str:
        """The transport, where none was named too."""
        return self.transport or ("shm" if self.listen.path else "tcp")


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """A language process.

    Attributes:
        bundle: folder.
        encoders: encode processes.
        registry: file with one address per line, read again whenever it changes.
        token: as at the encoders.
        local_encoder: load the vision encoder too, for when no encode process answers.
        max_requests: requests admitted at a time; more are refused as busy.
        max_running: requests that share the decoder, one token each in turn; a prompt goes in at once.
        threads: of the decoder.
        tls_authority: PEM of the certificate that encoders must show; None: no TLS.
    """

    bundle: Path
    encoders: tuple[Address, ...] = ()
    registry: Path | None = None
    token: str = ""
    pool: PoolConfig = field(default_factory=PoolConfig)
    deadlines: Deadlines = field(default_factory=Deadlines)
    local_encoder: bool = False
    max_requests: int = 512
    max_running: int = 4
    threads: int | None = None
    encoder_cache_bytes: int = 256 << 20
    tls_authority: Path | None = None
    faults: str = ""
