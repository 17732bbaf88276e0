"""Where servers listen: an address belongs to one process, from the beginning to the end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.config import Address, EncodeConfig
from deepstitch.runtime.disaggregated.listening import SocketFile, bound_socket
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer

from .pair import QUICK, encode_config, running
from .transport_cases import make_certificate


@pytest.mark.parametrize("listen", ["unix:{tmp}/e.sock", "tcp://127.0.0.1:{port}"])
def test_an_address_is_taken_while_its_process_still_loads(tmp_path, monkeypatch, listen):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = Address.parse(listen.format(tmp=".", port=port))
    with bound_socket(address), pytest.raises(InputError, match=r"listens there|in use"):
        bound_socket(address)


def test_a_socket_file_is_removed_by_who_made_it(plain_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = Address(path="e.sock")
    first = bound_socket(address)
    file = SocketFile.of(address)
    first.close()
    time.sleep(0.05)  # clocks of file systems are coarse
    second = bound_socket(address)  # first is dead: its file is replaced
    file.remove()
    assert Path("e.sock").is_socket()
    SocketFile.of(address).remove()
    assert not Path("e.sock").exists()
    second.close()

    (tmp_path / "empty").mkdir()
    broken = EncodeConfig(bundle=tmp_path / "empty", listen=address)
    with pytest.raises(Exception, match=r"manifest\.json"):
        asyncio.run(EncodeServer(broken).start())
    assert not Path("e.sock").exists()


def test_what_moves_is_as_secret_as_the_control_connection():
    listen = Address.parse("tcp://127.0.0.1:0")
    for name in ("nixl", "mooncake"):
        with pytest.raises(InputError, match=f"{name} does not encrypt"):
            EncodeConfig(bundle=Path("b"), listen=listen, token="t", transport=name, tls_certificate=Path("c"))
    EncodeConfig(bundle=Path("b"), listen=listen, token="t", transport="tcp", tls_certificate=Path("c"))


def test_who_never_begins_tls_is_not_waited_for(plain_bundle, tmp_path):
    """A minute would do for holding thousands of descriptors."""
    certificate = make_certificate(tmp_path)
    config = encode_config(plain_bundle, "tcp", "", tls_certificate=certificate, deadlines=replace(QUICK, connect=0.5))

    async def run() -> None:
        async with running(EncodeServer(config)) as server:
            reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 3.0) == b""
            writer.close()

    asyncio.run(run())
