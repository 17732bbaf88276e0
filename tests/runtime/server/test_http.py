"""Where HTTP listens, who may ask, health and metrics."""

from __future__ import annotations

import asyncio
import socket
import stat
import time
from pathlib import Path

import aiohttp
import pytest

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.config import Address
from deepstitch.runtime.disaggregated.errors import EncodeFailed
from deepstitch.runtime.server.health import Health
from deepstitch.runtime.server.http import HttpServer, parse_listen

from .fake_language import ASK, FakeLanguage, serving

TOKEN = "0123456789abcdef"


def get(path: str, fake: FakeLanguage | None = None, headers: dict | None = None, method: str = "GET", **options):
    async def run():
        server = serving(fake or FakeLanguage(), **options)
        async with server as client, client.request(method, path, headers=headers) as response:
            return response.status, response.headers, await response.text()

    return asyncio.run(run())


def test_addresses():
    assert parse_listen("8000") == Address(host="127.0.0.1", port=8000)
    assert parse_listen("0.0.0.0:80") == Address(host="0.0.0.0", port=80)
    assert parse_listen("[::1]:80") == Address(host="::1", port=80)
    assert parse_listen("http://localhost:80") == Address(host="localhost", port=80)
    assert parse_listen("unix:/run/h.sock") == Address(path="/run/h.sock")
    for wrong in ("", "host", ":80", "host:", "99999", "host:x", "https://host:80", "-1", "host:80/v1"):
        with pytest.raises(InputError, match="use a port, host:port or unix:"):
            parse_listen(wrong)


def test_a_taken_port_is_refused_before_anything_runs():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot listen"):
            HttpServer(parse_listen(str(taken.getsockname()[1])), check=None, metrics=None, token="")


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_open_to_others_needs_a_token(listen):
    with pytest.raises(InputError, match="--token-file"):
        HttpServer(parse_listen(listen), check=None, metrics=None, token="")


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/chat/completions", "/nothing"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer 0123456789abcdeX"},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
    ],
)
def test_others_get_nothing_without_the_token(path, headers):
    status, answered, text = get(path, headers=headers, listen="0.0.0.0:0", token=TOKEN)
    assert status == 401 and answered["WWW-Authenticate"] == "Bearer"
    assert "deepstitch_" not in text and "steps" not in text


def test_a_token_that_is_no_text():
    async def run() -> bytes:
        async with serving(FakeLanguage(), listen="0.0.0.0:0", token=TOKEN) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client._base_url.port)
            writer.write(b"GET /health HTTP/1.0\r\nAuthorization: Bearer \xff\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return answer

    assert asyncio.run(run()).split()[1] == b"401"


def test_with_the_token_they_do():
    assert get("/health", headers={"Authorization": f"bearer {TOKEN}"}, listen="0.0.0.0:0", token=TOKEN)[0] == 200


def test_this_machine_needs_no_token():
    assert get("/health", token=TOKEN)[0] == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/models"])
def test_a_page_that_gives_this_machine_a_name_of_its_own_gets_nothing(path):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[evil", "10.0.0.1"):
        status, _, text = get(path, headers={"Host": host})
        assert status == 403 and "127.0.0.1" in text
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:80", ""):
        assert get(path, headers={"Host": host})[0] == 200
    assert (
        get("/health", headers={"Host": "any", "Authorization": f"Bearer {TOKEN}"}, listen="0.0.0.0:0", token=TOKEN)[0]
        == 200
    )


def test_a_socket_file(tmp_path):
    path = tmp_path / "h.sock"

    async def run():
        fake = FakeLanguage()
        http = HttpServer(parse_listen(f"unix:{path}"), check=fake.check, metrics=fake.metrics, token="")
        assert http.url == f"unix:{path}"
        await http.start()
        mode = stat.S_IMODE(path.stat().st_mode)
        session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path)))
        async with session as client, client.get("http://localhost/health") as response:
            status = response.status
        await http.stop()
        await http.stop()
        return mode, status

    mode, status = asyncio.run(run())
    assert mode & 0o077 == 0 and status == 200
    assert not path.exists()


def test_a_server_that_never_started_leaves_no_socket_file(tmp_path):
    async def run():
        await HttpServer(Address(path=str(tmp_path / "h")), check=None, metrics=None, token="").stop()

    asyncio.run(run())
    assert list(Path(tmp_path).iterdir()) == []


def test_metrics_count_the_answers():
    async def run():
        async with serving(FakeLanguage()) as client:
            for path in ("/health", "/nothing/at/all", "/nothing/else"):
                async with client.get(path):
                    pass
            async with client.post("/v1/chat/completions", json=ASK):
                pass
            async with client.get("/metrics") as response:
                return response.headers["Content-Type"], await response.text()

    kind, text = asyncio.run(run())
    assert kind.startswith("text/plain; version=0.0.4")
    assert 'deepstitch_http_responses_total{path="/health",status="200"} 1.0' in text
    assert 'deepstitch_http_responses_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'deepstitch_http_responses_total{path="other",status="404"} 2.0' in text  # not one per name a stranger tries


def test_what_is_not_there():
    status, _, text = get("/v1/nothing")
    assert status == 404 and "/v1/chat/completions" in text and '"code": "not_found"' in text
    assert get("/health", method="POST")[0] == 405
    assert get("/v1/chat/completions", chat=False)[0] == 404


def test_health_is_work_that_was_done():
    fake = FakeLanguage()
    status, headers, text = get("/health", fake)
    assert status == 200 and '"status": "ok"' in text and '"steps": 1' in text and fake.checks == 1
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("trouble", "words"), [(EncodeFailed("out of memory"), "out of memory"), (KeyError("secret"), "bug")]
)
def test_health_says_why_not(trouble, words):
    fake = FakeLanguage()
    fake.trouble = trouble
    status, _, text = get("/health", fake)
    assert status == 503 and words in text and "secret" not in text


def test_many_who_ask_cost_one_check_and_an_old_result_is_none():
    fake = FakeLanguage()

    async def run():
        health = Health(fake.check, max_age=0.2)
        first = await asyncio.gather(*(health() for _ in range(50)))
        assert fake.checks == 1
        fake.trouble = EncodeFailed("broken")
        remembered = await health()
        await asyncio.sleep(0.25)
        return first, remembered, await health()

    first, remembered, later = asyncio.run(run())
    assert {status for status, _ in first} == {200} and remembered[0] == 200
    assert later[0] == 503 and later[1]["code"] == "encode_failed" and fake.checks == 2


def test_a_check_that_hangs_is_a_failure():
    async def hang():
        await asyncio.sleep(60)

    began = time.monotonic()
    status, report = asyncio.run(Health(hang, timeout=0.05)())
    assert time.monotonic() - began < 2
    assert status == 503 and report["code"] == "deadline"


def test_who_asked_and_left_does_not_spoil_it_for_the_next():
    fake = FakeLanguage()

    async def run():
        health = Health(fake.check)
        asking = asyncio.create_task(health())
        await asyncio.sleep(0)
        asking.cancel()
        return await health()

    assert asyncio.run(run())[0] == 200
