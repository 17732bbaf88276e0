"""``deepstitch encode-server``, ``language-server`` and ``run --disaggregated`` as a user meets them."""

from __future__ import annotations

import dataclasses
import http.client
import importlib.util
import json
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from PIL import Image

import deepstitch
from deepstitch.cli import VERBS, cli, main
from deepstitch.commands import encode_server, language_server
from deepstitch.runtime.disaggregated.config import Deadlines, EncodeConfig, LanguageConfig, PoolConfig
from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer

from .server.fake_language import PICTURE

CONFIGS = {encode_server.command: EncodeConfig, language_server.command: LanguageConfig}


@pytest.fixture
def picture(tmp_path, pictures) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(pictures[0]).save(path)
    return path


@pytest.fixture
def token(tmp_path) -> Path:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    return path


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(each) for each in arguments], prog_name="deepstitch")


@contextmanager
def server(*words):
    """A command in a process of its own, and the line it says when it is ready."""
    command = [sys.executable, "-m", "deepstitch.cli", *map(str, words), "--threads", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def get(url: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    try:
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("command", CONFIGS, ids=lambda command: command.name)
def test_defaults_are_those_of_the_configs(command):
    defaults = {option.name: option.default for option in command.params}
    config = {field.name: field.default for field in dataclasses.fields(CONFIGS[command])}
    pool = PoolConfig()
    expected = {
        **{name: config[name] for name in ("max_requests", "max_running") if name in config},
        **{f"{field.name}_seconds": field.default for field in dataclasses.fields(Deadlines)},
        "block_tokens": pool.block_tokens,
        "pool_blocks": pool.blocks,
        "encoder_cache_mib": config["encoder_cache_bytes"] >> 20,
        "request_mib": config.get("request_bytes", 0) >> 20,
    }
    shared = expected.keys() & defaults.keys()
    assert len(shared) >= 5
    assert {name: defaults[name] for name in shared} == {name: expected[name] for name in shared}


def test_both_servers_from_start_to_end(plain_bundle, picture):
    import tempfile

    with tempfile.TemporaryDirectory(prefix="deepstitch-") as short:
        address = f"unix:{short}/e"
        with (
            server("encode-server", plain_bundle, "--listen", address, "--http", "0") as (encode, at),
            server("language-server", plain_bundle, "--encoder", address, "--http", "0") as (language, front),
        ):
            assert at["address"] == address and at["pid"] == encode.pid
            assert front["address"] is None and front["pid"] == language.pid
            for url in (at["http"], front["http"]):
                status, health = get(url, "/health")
                assert status == 200 and json.loads(health)["status"] == "ok"
                assert "deepstitch_blocks_free" in get(url, "/metrics")[1]
            assert get(at["http"], "/v1/models")[0] == 404
            assert json.loads(get(front["http"], "/v1/models")[1])["data"][0]["id"] == plain_bundle.name
            taken = invoke("encode-server", plain_bundle, "--listen", address)
            assert taken.exit_code == 2 and taken.stderr.count("\n") == 1 and "another process listens" in taken.stderr
            for process in (language, encode):
                process.send_signal(signal.SIGTERM)
                out, err = process.communicate(timeout=20)
                assert (process.returncode, out) == (0, "")
                assert "Traceback" not in err
        assert list(Path(short).iterdir()) == []


def test_the_line_for_people(plain_bundle, tmp_path):
    command = [
        sys.executable,
        "-m",
        "deepstitch.cli",
        "language-server",
        plain_bundle,
        "--local-encoder",
        "--http",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("deepstitch language-server: ready at http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.fixture
def nothing_loads(monkeypatch):
    async def start(self):
        raise AssertionError("it was started before it was refused")

    monkeypatch.setattr(EncodeServer, "start", start)
    monkeypatch.setattr(LanguageServer, "start", start)


ENCODE = "encode-server {bundle} --listen unix:{tmp}/e "
TCP = "encode-server {bundle} --listen tcp://127.0.0.1:0 "
LANGUAGE = "language-server {bundle} --http 0 "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("encode-server {bundle} --listen here", "address 'here': expected unix:/path/to/socket or tcp://"),
        ("encode-server {tmp} --listen unix:{tmp}/e", "manifest.json"),
        ("encode-server {tmp}/nothing --listen unix:{tmp}/e", "nothing"),
        (TCP, "needs a shared token; pass --token-file FILE"),
        (TCP + "--token-file {token} --transport shm", "shm needs a socket file"),
        (ENCODE + "--token-file {tmp}/no", "no such file; make one"),
        (ENCODE + "--token-file {tmp}/open", "chmod 600"),
        (ENCODE + "--transport shn", "transport 'shn'"),
        (ENCODE + "--http x", "HTTP address 'x'"),
        (ENCODE + "--http {taken}", "cannot listen"),
        (ENCODE + "--http 0.0.0.0:0", "others can connect; pass --token-file"),
        (ENCODE + "--tls-certificate x", "TLS needs a TCP address"),
        (TCP + "--token-file {token} --transport nixl --tls-certificate x", "nixl does not encrypt what it moves"),
        (TCP + "--token-file {token} --transport mooncake --tls-certificate x", "use transport tcp"),
        ("language-server {tmp} --local-encoder", "manifest.json"),
        (LANGUAGE, "nothing could encode pictures"),
        (LANGUAGE + "--encoder tcp://127.0.0.1:7000", "wants a shared token"),
        (LANGUAGE + "--encoder /run/e.sock", "address '/run/e.sock'"),
        (LANGUAGE + "--registry {tmp}/none", "registry"),
        (LANGUAGE + "--encoder unix:{tmp}/e --tls-authority x", "TLS is for TCP"),
        (LANGUAGE + "--local-encoder --http {taken}", "cannot listen"),
        (LANGUAGE + "--local-encoder --http 0.0.0.0:0", "others can connect"),
    ],
)
def test_bad_configuration_is_one_line_before_anything_is_loaded(
    plain_bundle, tmp_path, token, nothing_loads, words, message
):
    (tmp_path / "open").write_text("0123456789abcdef")
    (tmp_path / "open").chmod(0o644)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"bundle": plain_bundle, "tmp": tmp_path, "token": token, "taken": taken.getsockname()[1]}
        found = invoke(*(word.format(**places) for word in words.split()))
    assert found.exit_code == 2, found.output
    assert found.stdout == "" and found.stderr.count("\n") == 1 and message in found.stderr
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("package", ["aiohttp", "msgspec", "prometheus_client", "xxhash"])
@pytest.mark.parametrize(
    "words", [["encode-server", "x", "--listen", "unix:x"], ["run", "x", "--prompt", "x", "--disaggregated"]]
)
def test_a_missing_package_is_named(monkeypatch, package, words):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    found = invoke(*words)
    assert found.exit_code == 2
    assert package.replace("_", "-") in found.stderr and "pip install 'deepstitch[disaggregated]'" in found.stderr


def test_names_with_a_hyphen_are_verbs(capsys):
    assert {"encode-server", "language-server"} <= set(VERBS)
    assert main(["encode_server"]) == 2
    assert "did you mean 'encode-server'?" in capsys.readouterr().err


def test_run_in_two_processes_prints_what_one_prints(plain_bundle, picture, tmp_path):
    words = ["--image", picture, "--prompt", "what?", "--system", "short", "--max-tokens", 6, "--threads", 1]
    one = invoke("run", plain_bundle, *words, "--json")
    drawing = tmp_path / "trace.svg"
    two = invoke("run", plain_bundle, *words, "--json", "--disaggregated", "--trace", drawing)
    assert two.exit_code == 0, two.stderr
    expected, found = json.loads(one.stdout), json.loads(two.stdout)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"timings", "prompt_tps", "generation_tps"}:
        assert found[name] == expected[name], name
    assert found["timings"].keys() == expected["timings"].keys() | {"transfer"}
    texts = [each.text for each in ElementTree.parse(drawing).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert {"client", "language process", "encode process"} <= set(texts)
    streamed = invoke("run", plain_bundle, *words, "--disaggregated")
    assert streamed.stdout == expected["text"] + "\n"
    assert "transfer " in streamed.stderr and streamed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace", "x.svg"], "add --disaggregated"),
        (["--disaggregated", "--packed-cache"], "--packed-cache is for one process"),
        (["--disaggregated", "--engine", "tensorrt"], "--engine tensorrt"),
        (["--disaggregated", "--image", "missing.png"], "image 1 ('missing.png'): no such file"),
        (["--disaggregated", "--trace", "no/such/folder/x.svg"], "there is no folder"),
        (["--disaggregated", "--top-p", 3], "top_p=3.0"),
    ],
)
def test_run_refuses_before_it_starts_processes(plain_bundle, monkeypatch, words, message):
    monkeypatch.setattr(subprocess, "Popen", None)
    found = invoke("run", plain_bundle, "--prompt", "x", *words)
    assert found.exit_code == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert message in found.stderr


def test_run_in_two_processes_refuses_in_one_line(plain_bundle, tmp_path):
    (tmp_path / "no.png").write_bytes(b"this is no picture")
    found = invoke("run", plain_bundle, "--prompt", "x", "--image", tmp_path / "no.png", "--disaggregated")
    assert found.exit_code == 2 and found.stdout == ""
    assert found.stderr.startswith("deepstitch: error: image 1") and found.stderr.count("\n") == 1


def test_a_stock_client_sees_openai(plain_bundle):
    """The shape that OpenAI's own library reads: text and a picture, streamed."""
    body = {
        "model": plain_bundle.name,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_tokens": 4,
        "stream": True,
    }
    command = ("language-server", plain_bundle, "--local-encoder", "--http", "0")
    with server(*command) as (_, at):
        connection = http.client.HTTPConnection(at["http"].removeprefix("http://"), timeout=20)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        lines = connection.getresponse().read().decode().split("\n\n")
        connection.close()
    expected = deepstitch.load(plain_bundle, threads=1).generate(body["messages"], max_tokens=4)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
    assert "data: [DONE]" in lines
    assert PICTURE.startswith("data:")
