"""How fast the language process reads the encode process's pool, over every transport that is installed.

    python -m benchmarks.transfer --output benchmarks/results/transfer.json

Two processes on this machine. Every round reads each size once over each transport in turn, so that a busy moment of
the machine hits all alike, and again with the XXH3-64 of what arrived (the reader's share of a check). Beside them, in
the same rounds: a process that sends the same bytes through a socket pair, and through TCP without any protocol, and a
copy within this process. Milliseconds as median, minimum and maximum; GB/s of the median. What arrived is compared with
what was sent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from benchmarks.common import spread, write_report
from deepstitch.errors import DeepstitchError
from deepstitch.runtime.disaggregated.transport import TRANSPORTS, Span, open_exporter, open_importer
from deepstitch.runtime.disaggregated.transport.sockets import new_memory

SIZES = {"16 KiB": 16 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
TARGETS = {"shm": 5.0, "tcp": 1.5}  # GB/s of the largest size
_TICKET = "beef"
_SECONDS = 60.0
_REQUEST = struct.Struct("!Q")

Read = Callable[[int], None]  # fills the first bytes of the local memory


def pool_bytes(nbytes: int) -> np.ndarray:
    """What lies in every pool."""
    return np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)


@contextlib.contextmanager
def child(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """This file as another process, until its standard input is closed."""
    command = [sys.executable, "-m", "benchmarks.transfer", "--child", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, **pipes, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def first_json(process: subprocess.Popen[str]) -> dict[str, str]:
    """What the child announced; libraries may have written lines of their own before."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"{process.args}: ended before it served")


@contextlib.contextmanager
def transport_reader(name: str, local: np.ndarray) -> Iterator[Read]:
    """Reads over a transport."""
    with tempfile.TemporaryDirectory() as folder:
        where = folder if name == "shm" else "127.0.0.1"
        with child(name, where, str(len(local))) as process:
            importer = open_importer(name, first_json(process), _TICKET, local=local)
            try:
                yield lambda count: importer.read([Span(0, local[:count])], timeout=_SECONDS)
            finally:
                importer.close()


@contextlib.contextmanager
def socket_reader(kind: str, local: np.ndarray) -> Iterator[Read]:
    """Reads what a process sends through a plain socket, told only how much."""
    if kind == "socket pair":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        for end in (ours, theirs):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    arguments = ("plain", str(theirs.fileno()), str(len(local)))
    with ours, child(*arguments, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        first_json(process)

        def read(count: int) -> None:
            ours.sendall(_REQUEST.pack(count))
            got = 0
            while got < count:
                got += ours.recv_into(memoryview(local)[got:count], 0, socket.MSG_WAITALL)

        yield read


def serve(name: str, where: str, nbytes: int) -> None:
    """The encode side of one transport."""
    exporter = open_exporter(name, nbytes, where=where)
    exporter.memory[:] = pool_bytes(nbytes)
    exporter.admit(_TICKET)
    sys.stdout.write(json.dumps(dict(exporter.endpoint)) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    exporter.close()


def serve_plain(descriptor: int, nbytes: int) -> None:
    """The sending side of a plain socket."""
    memory = new_memory(nbytes)
    memory[:] = pool_bytes(nbytes)
    with socket.socket(fileno=descriptor) as connection:
        sys.stdout.write("{}\n")
        sys.stdout.flush()
        while request := connection.recv(_REQUEST.size, socket.MSG_WAITALL):
            connection.sendall(memoryview(memory)[: _REQUEST.unpack(request)[0]])


def installed() -> list[str]:
    """Transports that can be opened here; the others are named on standard error."""
    names = []
    for name in TRANSPORTS:
        try:
            with tempfile.TemporaryDirectory() as folder:
                open_exporter(name, 1 << 16, where=folder if name == "shm" else "127.0.0.1").close()
            names.append(name)
        except DeepstitchError as error:
            sys.stderr.write(f"without {name}: {error}\n")
    return names


def measure(readers: dict[str, Read], local: np.ndarray, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of every reader and size, without and with the check."""
    expected = pool_bytes(len(local))
    seconds: dict[tuple[str, str, bool], list[float]] = {}
    for size, count in SIZES.items():
        wanted = xxhash.xxh3_64_intdigest(expected[:count])
        for turn in range(-1, rounds if count > 1 << 20 else 10 * rounds):
            for name, read in readers.items():
                for check in (False, True):
                    local[:count:4096] = 0
                    start = time.perf_counter()
                    read(count)
                    right = not check or xxhash.xxh3_64_intdigest(local[:count]) == wanted
                    if turn >= 0:  # the first is for connections and caches
                        seconds.setdefault((name, size, check), []).append(time.perf_counter() - start)
                    if not right or not np.array_equal(local[:count], expected[:count]):
                        raise RuntimeError(f"{name}: {size} arrived, but not as sent")
    report: dict[str, dict[str, Any]] = {name: {} for name in readers}
    for (name, size, check), values in seconds.items():
        entry = {"ms": spread([value * 1e3 for value in values])}
        entry["gb_per_s"] = SIZES[size] / statistics.median(values) / 1e9
        report[name].setdefault(size, {})["checked" if check else "read"] = entry
    return report


def run(rounds: int) -> dict[str, Any]:
    """Everything, as the report."""
    names = installed()
    largest = max(SIZES, key=lambda size: SIZES[size])
    local, source = new_memory(SIZES[largest]), new_memory(SIZES[largest])
    source[:] = pool_bytes(len(source))

    def copy(count: int) -> None:
        local[:count] = source[:count]

    with contextlib.ExitStack() as stack:
        readers = {name: stack.enter_context(transport_reader(name, local)) for name in names}
        peers = {kind: stack.enter_context(socket_reader(kind, local)) for kind in ("socket pair", "plain tcp")}
        results = measure({**readers, **peers, "numpy copy": copy}, local, rounds)
    return {
        "rounds": rounds,
        "transports": {name: results[name] for name in names},
        "peers": {name: results[name] for name in (*peers, "numpy copy")},
        "targets": {
            name: {"gb_per_s": target, "met": results[name][largest]["read"]["gb_per_s"] >= target}
            for name, target in TARGETS.items()
        },
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="reads of 64 MiB; smaller sizes ten times as many")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is None:
        write_report("transfer", run(arguments.rounds), arguments.output)
    elif arguments.child[0] == "plain":
        serve_plain(int(arguments.child[1]), int(arguments.child[2]))
    else:
        serve(arguments.child[0], arguments.child[1], int(arguments.child[2]))


if __name__ == "__main__":
    main()
