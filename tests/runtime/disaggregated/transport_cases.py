"""A pool in a process of its own, for the tests of the transports. Run as a script, this file is that process."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.errors import DeepstitchError
from deepstitch.runtime.disaggregated.transport import Span, open_exporter, open_importer

TICKET = "0123456789abcdef"
POOL = 64 << 20
PATIENCE = 0.5  # seconds that tests wait for a stopped process
KINDS = ("shm", "tcp", "tls", "mooncake", "nixl")
# Read without the other process doing anything, so a stopped one does not matter.
ONE_SIDED = ("shm", "nixl")


def pattern(nbytes: int = POOL, seed: int = 0) -> np.ndarray:
    """Bytes, none of them 0."""
    return np.random.default_rng(seed).integers(1, 256, nbytes, np.uint8)


def package_missing(kind: str) -> str:
    """Why a transport cannot be tested here; empty where it can."""
    try:
        module = importlib.import_module(f"deepstitch.runtime.disaggregated.transport.{name_of(kind)}")
        getattr(module, "_package", lambda: None)()
    except DeepstitchError as error:
        return str(error)
    return "openssl makes the certificate" if kind == "tls" and shutil.which("openssl") is None else ""


def name_of(kind: str) -> str:
    return "tcp" if kind == "tls" else kind


class Peer:
    """The encode side in a child process."""

    def __init__(self, kind: str, folder: Path, nbytes: int = POOL) -> None:
        self.kind = kind
        self.nbytes = nbytes
        where = str(folder) if kind == "shm" else "127.0.0.1"
        self.certificate = make_certificate(folder) if kind == "tls" else None
        command = [sys.executable, __file__, name_of(kind), where, str(nbytes), str(self.certificate or "")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint = dict(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the {self.kind} process ended")

    def tell(self, command: str, *arguments: Any) -> None:
        """Have it do something, and wait until it has."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        self._answer()

    def connect(self, local: np.ndarray, ticket: str = TICKET) -> Any:
        context = ssl.create_default_context(cafile=self.certificate) if self.certificate else None
        return open_importer(name_of(self.kind), self.endpoint, ticket, local=local, context=context)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def peer_of(kind: str, nbytes: int = POOL) -> Iterator[Peer]:
    """A child process with a filled pool that admits ``TICKET``."""
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(kind, Path(folder), nbytes)
        try:
            yield peer
        finally:
            peer.end()


def make_certificate(folder: Path) -> Path:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *curve, *names, *files], check=True, capture_output=True)
    certificate.write_text(certificate.read_text() + key.read_text())
    return certificate


def spans_of(local: np.ndarray, count: int, seed: int, longest: int = 5000) -> list[Span]:
    """Pieces of odd sizes, none of them touching another in ``local``, in no order in the pool."""
    generator = np.random.default_rng(seed)
    places = generator.permutation(count) * (longest + 1)
    sizes = generator.integers(0, longest + 1, count)
    offsets = generator.integers(0, POOL - longest, count)
    return [
        Span(int(offset), local[place : place + size])
        for place, size, offset in zip(places.tolist(), sizes.tolist(), offsets.tolist(), strict=True)
    ]


class Background:
    """A call in a thread, what it raised, and when it ended."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self.ended = 0.0
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error.with_traceback(None)  # its frames would keep arrays and connections alive
        self.ended = time.monotonic()

    def wait(self, seconds: float = 20.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the call does not come back"


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0)


def resources() -> tuple[list[str], list[str], int]:
    """Open files by what they are, Python threads, threads of the system."""
    gc.collect()
    names = []
    for link in list(Path("/proc/self/fd").iterdir()):
        try:
            names.append(str(link.readlink()).split(":[")[0])
        except OSError:
            continue  # the listing's own
    threads = sorted(thread.name for thread in threading.enumerate())
    return sorted(names), threads, len(list(Path("/proc/self/task").iterdir()))


def skip_if_missing(kind: str) -> None:
    if reason := package_missing(kind):
        pytest.skip(f"{kind}: {reason}")


def _serve(name: str, where: str, nbytes: int, certificate: str) -> None:
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    exporter = open_exporter(name, nbytes, where=where, context=context)
    assert not exporter.memory.any()
    exporter.memory[:] = pattern(nbytes)
    exporter.admit(TICKET)
    sys.stdout.write(json.dumps(dict(exporter.endpoint)) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        getattr(exporter, command)(*arguments)
        sys.stdout.write("{}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
