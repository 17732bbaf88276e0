"""Who gets at a pool: sockets, file modes, seals, tickets, nonsense on the wire; and what a wrong name is told."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
import ssl
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from deepstitch.errors import InputError, MissingDependency
from deepstitch.runtime.disaggregated.errors import PeerBusy, PeerHung, PeerLost, ProtocolError, StaleTransfer
from deepstitch.runtime.disaggregated.socket_path import short_path
from deepstitch.runtime.disaggregated.transport import Exporter, Importer, Span, gate, open_exporter, open_importer

from .transport_cases import TICKET, Peer, make_certificate, skip_if_missing, wait_until

NBYTES = 1 << 20
PAIR = struct.Struct("!QQ")
HEAD = b"D".ljust(64, b"\0")  # of an answer over TCP


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Exporter]:
    exporter = open_exporter("shm", NBYTES, where=str(tmp_path))
    exporter.admit(TICKET)
    yield exporter
    exporter.close()


@pytest.fixture
def served() -> Iterator[Exporter]:
    exporter = open_exporter("tcp", NBYTES, where="127.0.0.1")
    exporter.memory[:] = 7
    exporter.admit(TICKET)
    yield exporter
    exporter.close()


def knock_at(exporter: Exporter, ticket: str = TICKET) -> tuple[socket.socket, list[int]]:
    if "path" in exporter.endpoint:
        connection = socket.socket(socket.AF_UNIX)
        with short_path(exporter.endpoint["path"]) as name:
            connection.connect(name)
    else:
        connection = socket.create_connection((exporter.endpoint["host"], int(exporter.endpoint["port"])))
    return connection, gate.knock(connection, ticket, peer="it")[1]


def ends(connection: socket.socket) -> bytes:
    """What still comes until the other side closes."""
    connection.settimeout(3.0)
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def test_the_shared_pool_can_only_be_read(shared: Exporter) -> None:
    connection, (descriptor,) = knock_at(shared)
    assert stat.S_IMODE(Path(shared.endpoint["path"]).stat().st_mode) == 0o600
    assert os.get_inheritable(descriptor) is False
    with pytest.raises(OSError, match="Permission denied"):
        mmap.mmap(descriptor, NBYTES)
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(descriptor, 10)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(descriptor, b"x")
    writable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # the same user may open it anew
    for attempt in (
        lambda: mmap.mmap(writable, NBYTES),
        lambda: os.pwrite(writable, b"x", 0),
        lambda: os.ftruncate(writable, 10),
        lambda: os.ftruncate(writable, 2 * NBYTES),
        lambda: fcntl.fcntl(writable, fcntl.F_ADD_SEALS, 0),
    ):
        with pytest.raises(PermissionError):
            attempt()
    shared.memory[5] = 9  # the maker still writes
    with mmap.mmap(descriptor, NBYTES, prot=mmap.PROT_READ) as pages:
        assert pages[5] == 9
    for each in (descriptor, writable):
        os.close(each)
    connection.close()


@pytest.mark.parametrize("damage", ["unsealed", "shorter", "a file", "nothing"])
def test_memory_that_could_shrink_is_not_mapped(tmp_path: Path, damage: str) -> None:
    """Reading beyond the end of a file that was cut would end this process with SIGBUS."""
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, NBYTES // 2 if damage == "shorter" else NBYTES)
    if damage == "shorter":
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    if damage == "a file":
        (tmp_path / "file").write_bytes(bytes(NBYTES))
        os.dup2(os.open(tmp_path / "file", os.O_RDONLY), descriptor)
    path = tmp_path / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    door = gate.Gate(listener, descriptors=[] if damage == "nothing" else [descriptor])
    door.admit(TICKET)
    with pytest.raises(ProtocolError if damage in ("a file", "nothing") else StaleTransfer, match="encode process"):
        open_importer("shm", {"path": str(path), "nbytes": str(NBYTES)}, TICKET, local=np.zeros(NBYTES, np.uint8))
    door.close()
    os.close(descriptor)


def test_socket_files_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead, living = Peer("shm", tmp_path, NBYTES), Peer("shm", tmp_path, NBYTES)
    stopped = Peer("shm", tmp_path, NBYTES)
    dead.end()
    stopped.stop()
    names = {each: Path(each.endpoint["path"]) for each in (dead, living, stopped)}
    waiting = []
    with pytest.raises(BlockingIOError):  # so many wait at the stopped one that it takes no more
        while True:
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[-1].setblocking(False)
            with short_path(names[stopped]) as name:
                waiting[-1].connect(name)
    assert all(path.exists() for path in names.values())
    exporter = open_exporter("shm", NBYTES, where=str(tmp_path))
    assert not names[dead].exists()
    assert names[living].exists()
    assert names[stopped].exists()
    exporter.close()
    assert len(list(tmp_path.iterdir())) == 2
    for each in waiting:
        each.close()
    for each in (living, stopped):
        each.end()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="socket file in"):
        open_exporter("shm", NBYTES, where=str(tmp_path / "missing"))


def test_a_folder_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 150)
    folder.mkdir()
    exporter = open_exporter("shm", NBYTES, where=str(folder))
    exporter.admit(TICKET)
    exporter.memory[:] = 7
    local = np.zeros(NBYTES, np.uint8)
    importer = open_importer("shm", exporter.endpoint, TICKET, local=local)
    importer.read([Span(0, local)], timeout=1.0)
    assert (local == 7).all()
    importer.close()
    exporter.close()
    assert list(folder.iterdir()) == []


def test_a_host_that_is_not_of_this_machine() -> None:
    with pytest.raises(InputError, match="cannot listen at"):
        open_exporter("tcp", NBYTES, where="192.0.2.1")
    for kind in ("tcp", "shm"):
        with pytest.raises(InputError, match="cannot make a"):
            open_exporter(kind, 1 << 62, where="127.0.0.1" if kind == "tcp" else "/")


@pytest.mark.parametrize(
    "request_bytes",
    [
        struct.pack("!I", 0),
        struct.pack("!I", 4097),
        struct.pack("!I", 0xFFFFFFFF),
        struct.pack("!I", 1) + PAIR.pack(NBYTES, 1),
        struct.pack("!I", 1) + PAIR.pack((1 << 64) - 1, 2),
        struct.pack("!I", 1) + PAIR.pack(0, (1 << 64) - 1),
        struct.pack("!I", 2) + PAIR.pack(0, 1) + PAIR.pack(NBYTES - 1, 2),
    ],
)
def test_nonsense_gets_no_byte_of_the_pool(served: Exporter, request_bytes: bytes) -> None:
    connection, _ = knock_at(served)
    connection.sendall(request_bytes)
    assert ends(connection) == b""
    connection.close()
    connection, _ = knock_at(served)
    connection.sendall(struct.pack("!I", 1) + PAIR.pack(NBYTES - 3, 3))
    connection.shutdown(socket.SHUT_WR)
    assert ends(connection) == HEAD + b"\7\7\7"
    connection.close()


@contextmanager
def server_that(answers: Callable[[socket.socket], None]) -> Iterator[tuple[Importer, np.ndarray]]:
    """A hand-made encode side over TCP, and an importer that asked it for 100 bytes."""

    def serve(guest: gate.Guest) -> None:
        gate.receive_exactly(guest.connection, 4 + PAIR.size)
        answers(guest.connection)

    listener = socket.create_server(("127.0.0.1", 0))
    door = gate.Gate(listener, serve)
    door.admit(TICKET)
    endpoint = {"host": "127.0.0.1", "port": str(door.address[1]), "nbytes": "100"}
    local = np.zeros(100, np.uint8)
    importer = open_importer("tcp", endpoint, TICKET, local=local)
    try:
        yield importer, local
    finally:
        importer.close()
        door.close()


@pytest.mark.parametrize("answer", [b"", b"D", HEAD, HEAD + b"x" * 99, b"X" + HEAD + b"x" * 99], ids=len)
def test_an_answer_that_ends_too_early_or_is_none(answer: bytes) -> None:
    with server_that(lambda connection: connection.sendall(answer)) as (importer, local):
        started = time.monotonic()
        with pytest.raises(PeerLost):
            importer.read([Span(0, local)], timeout=5.0)
        assert time.monotonic() - started < 1.0


def test_slow_is_not_hung() -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(HEAD[:10])
        time.sleep(0.05)
        connection.sendall(HEAD[10:])
        for byte in bytes(range(100)):
            connection.sendall(bytes([byte]))
            time.sleep(0.005)

    with server_that(drip) as (importer, local):
        started = time.monotonic()
        importer.read([Span(0, local[:30]), Span(30, local[30:])], timeout=0.25)
        assert time.monotonic() - started > 0.4
        assert local.tolist() == list(range(100))


def test_a_stranger_is_dropped_however_slowly_it_speaks(served: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "KNOCK_SECONDS", 0.2)
    address = served.endpoint["host"], int(served.endpoint["port"])
    for dripping in (False, True):
        started = time.monotonic()
        with socket.create_connection(address) as connection:
            connection.sendall(b"\x80")
            try:
                while time.monotonic() < started + 2 and (not dripping or connection.send(b"0")):
                    connection.settimeout(0.05)
                    try:
                        assert connection.recv(1) == b""
                        break
                    except TimeoutError:
                        pass
            except ConnectionError:
                pass
        assert 0.1 < time.monotonic() - started < 1.0


def test_only_so_many_connections(served: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_MAX_GUESTS", 2)
    connections = [knock_at(served)[0] for _ in range(2)]
    with pytest.raises((PeerBusy, PeerLost)):  # lost where the refusal was overtaken by the connection's end
        knock_at(served)
    connections.pop().close()

    def is_let_in() -> bool:
        try:
            connections.append(knock_at(served)[0])
        except (PeerBusy, PeerLost):
            return False
        return True

    wait_until(is_let_in, 3.0)
    for connection in connections:
        connection.close()


def test_a_process_that_does_not_answer_the_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "KNOCK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = {"host": "127.0.0.1", "port": str(silent.getsockname()[1]), "nbytes": "10"}
        with pytest.raises(PeerHung, match="ticket"):
            open_importer("tcp", endpoint, TICKET, local=np.zeros(10, np.uint8))


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_endpoints_of_another_kind(kind: str) -> None:
    local = np.zeros(10, np.uint8)
    for endpoint in ({}, {"path": "x", "host": "x"}, {"path": "x", "host": "x", "port": "y", "nbytes": "-1"}):
        with pytest.raises(ProtocolError, match="announced a pool"):
            open_importer(kind, endpoint, TICKET, local=local)


def test_tls_needs_the_right_certificate(tmp_path: Path) -> None:
    skip_if_missing("tls")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(make_certificate(tmp_path))
    exporter = open_exporter("tcp", 100, where="127.0.0.1", context=server)
    exporter.admit(TICKET)
    exporter.memory[:] = 7
    local = np.zeros(100, np.uint8)
    with pytest.raises(PeerLost, match="TLS"):
        open_importer("tcp", exporter.endpoint, TICKET, local=local, context=ssl.create_default_context())
    with pytest.raises((PeerLost, PeerHung)):
        open_importer("tcp", exporter.endpoint, TICKET, local=local)
    context = ssl.create_default_context(cafile=tmp_path / "certificate.pem")
    importer = open_importer("tcp", exporter.endpoint, TICKET, local=local, context=context)
    importer.read([Span(0, local)], timeout=1.0)
    assert (local == 7).all()
    importer.close()
    exporter.close()


def test_names_of_transports(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'tcp'"):
        open_exporter("tpc", 10, where="127.0.0.1")
    with pytest.raises(InputError, match="shm has no TLS"):
        open_exporter("shm", 10, where=str(tmp_path), context=ssl.create_default_context())
    with pytest.raises(InputError, match="fake"):
        open_exporter("fake", 10, where="")


@pytest.mark.parametrize("kind", ["mooncake", "nixl"])
def test_packages_that_are_missing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == kind]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)  # as if not installed
    with pytest.raises(MissingDependency, match="libibverbs1" if kind == "mooncake" else "--no-deps"):
        open_exporter(kind, 10, where="127.0.0.1")
    monkeypatch.delitem(sys.modules, kind)
    (tmp_path / kind).mkdir()
    (tmp_path / kind / "__init__.py").write_text("raise ImportError('libibverbs.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="a system library is missing"):
        open_exporter(kind, 10, where="127.0.0.1")


def test_the_end_of_a_process_removes_nothing_but_itself(tmp_path: Path) -> None:
    """SIGTERM's default action runs no code of ours: the socket file stays, and the next process takes it away."""
    first = Peer("shm", tmp_path, NBYTES)
    first.process.send_signal(signal.SIGTERM)
    first.process.wait()
    first.end()
    assert len(list(tmp_path.iterdir())) == 1
    exporter = open_exporter("shm", NBYTES, where=str(tmp_path))
    assert [str(path) for path in tmp_path.iterdir()] == [exporter.endpoint["path"]]
    exporter.close()
    assert list(tmp_path.iterdir()) == []
