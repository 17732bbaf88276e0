"""An encode and a language process on this machine for one request, as ``deepstitch run --disaggregated`` uses them.

They talk through sockets in a private folder, end when this process does, however it ends, and leave nothing behind.
"""

from __future__ import annotations

import contextlib
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from deepstitch.errors import DeepstitchError
from deepstitch.runtime.disaggregated.errors import PeerLost
from deepstitch.runtime.disaggregated.pair_client import PairStream

__all__ = ["LocalPair"]

_MAX_FOLDER = 60  # letters; the path of a socket may have about a hundred
_STOP_SECONDS = 10.0
_GRIEF_SECONDS = 0.5  # between a broken connection and the news of a death
_LOOK_SECONDS, _HANG_SECONDS = 1.0, 10.0  # how often it is asked whether it lives, and how long it may take
_LAST_WORDS = 400
# -c would look for modules in the current folder first
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from deepstitch.cli import main; sys.exit(main())"


class LocalPair:
    """Both processes; use it in a ``with`` statement.

    Attributes:
        load_seconds: until both were ready.
    """

    def __init__(self, bundle: Path, *, threads: int | None = None, max_body_bytes: int = 64 << 20) -> None:
        """Nothing is started before the ``with`` statement.

        Args:
            bundle: for both.
            threads: per operator, in each process.
            max_body_bytes: size of the largest request.
        """
        self._bundle = bundle.resolve()
        self._common = [] if threads is None else ["--threads", str(threads)]
        self._body_mib = -(-max_body_bytes // (1 << 20))
        self._children: list[_Child] = []
        self._stream: PairStream | None = None
        self._folder: Path | None = None
        self._hung: str | None = None
        self._closing = threading.Event()
        self._undo = contextlib.ExitStack()
        self.load_seconds = 0.0

    def __enter__(self) -> LocalPair:
        """Start both and wait until they are ready.

        Raises:
            DeepstitchError: one of them ended; its own reason.
        """
        began = time.monotonic()
        try:
            self._undo.enter_context(_terminated_as_interrupted())
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.monotonic() - began
        for child in self._children:
            threading.Thread(target=self._watch, args=(child,), daemon=True).start()
        threading.Thread(target=self._attend, args=(f"{self._folder}/h",), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End both and remove their folder."""
        self.close()

    def stream(self, request: bytes) -> PairStream:
        """Ask what :func:`pair_client.chat_request` has written; text comes as it is written.

        Raises:
            PeerLost: one of the processes is gone.
        """
        assert self._folder is not None
        if (dead := self._dead() or self._hung) is not None:
            raise PeerLost(dead)
        self._stream = PairStream(
            str(self._folder / "h"), request, load_seconds=self.load_seconds, explain=self._explain
        )
        return self._stream

    def close(self) -> None:
        """End everything; may be called twice."""
        self._closing.set()
        if self._stream is not None:
            self._stream.close()
        deadline = time.monotonic() + (0 if self._hung else _STOP_SECONDS)
        for child in reversed(self._children):  # the one that asks first, so that it does not look for the other
            child.end(deadline)
        self._children = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        self._undo.close()

    def _start(self) -> None:
        self._folder = folder = _private_folder()
        encoder = f"unix:{folder / 'e'}"
        encode = ["encode-server", str(self._bundle), "--listen", encoder]
        language = ["language-server", str(self._bundle), "--encoder", encoder, "--http", f"unix:{folder / 'h'}"]
        language += ["--max-body-mib", str(self._body_mib)]
        for name, words in (("encode", encode), ("language", language)):
            log = folder / f"{name}.log"
            self._children.append(_Child(f"the {name} process", [*words, *self._common], log))

    def _wait_until_ready(self) -> None:
        """Each says so in a line; the end of its output before that is its end."""
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.output, selectors.EVENT_READ, child)
            while selector.get_map():
                for key, _ in selector.select():
                    if not key.data.output.readline():
                        key.data.process.wait(_STOP_SECONDS)
                        raise DeepstitchError(key.data.obituary())
                    selector.unregister(key.fileobj)

    def _watch(self, child: _Child) -> None:
        """In a thread: when a process dies that is needed, the request ends."""
        child.process.wait()
        stream = self._stream
        if self._closing.is_set() or stream is None:
            return
        if child is self._children[0] and stream.begun:  # all of its part is done
            return
        stream.interrupt()

    def _attend(self, path: str) -> None:
        """In a thread: one that is stopped, or hangs, does not die; the encode process is attended to by the other."""
        while not self._closing.wait(_LOOK_SECONDS):
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(_HANG_SECONDS)
                    connection.connect(path)
                    connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
                    connection.recv(1)
            except TimeoutError:
                self._hung = f"the language process has not answered for {_HANG_SECONDS:g} s"
                if self._stream is not None:
                    self._stream.interrupt()
                return
            except OSError:  # it has died, or is just ending
                continue

    def _explain(self) -> str | None:
        """Who died, if somebody did; for a request that broke off."""
        deadline = time.monotonic() + _GRIEF_SECONDS
        while (dead := self._dead() or self._hung) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return dead

    def _dead(self) -> str | None:
        dead = [child.obituary() for child in self._children if child.process.poll() is not None]
        return dead[0] if dead else None


class _Child:
    """One of the two processes.

    Attributes:
        output: its stdout.
    """

    def __init__(self, name: str, words: Sequence[str], log: Path) -> None:
        self._name, self._log = name, log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *words, "--json", "--until-stdin-closes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the others
            )
        assert self.process.stdout is not None
        self.output: IO[bytes] = self.process.stdout

    def end(self, deadline: float) -> None:
        """Tell it to end, and make sure of it."""
        self.process.terminate()  # nothing happens if it has ended
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def obituary(self) -> str:
        """How it ended and what it said last."""
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        words = lines[-1].removeprefix("deepstitch: error: ")[:_LAST_WORDS] if lines else "it said nothing"
        return f"{self._name} ended ({how}): {words}"


def _private_folder() -> Path:
    """A new folder that only this user can enter, with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="deepstitch-"))
    if len(str(folder)) > _MAX_FOLDER:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="deepstitch-", dir="/tmp"))
    return folder


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """While inside, SIGTERM ends this process in an orderly way, as Ctrl-C does; only possible in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
