"""The life of a server process, with a server that has nothing to load."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from deepstitch.errors import BundleError
from deepstitch.runtime.server.process import run_server

from .fake_language import FakeLanguage

PROGRAM = """
import asyncio, sys, time
from deepstitch.runtime.server.process import run_server
class Server:
    async def start(self): await asyncio.sleep(float(sys.argv[1]))
    async def stop(self):
        print("stopping", flush=True)
        await asyncio.sleep(float(sys.argv[3]))
        print("stopped", flush=True)
    async def check(self): return {}
run_server(Server(), None, ready=lambda: print("ready", flush=True), until_stdin_closes=sys.argv[2] == "stdin")
"""


class Slow(FakeLanguage):
    """Loads for a minute."""

    stopped = 0

    async def start(self):
        await asyncio.sleep(60)

    async def stop(self):
        self.stopped += 1


def program(seconds: float, how: str = "signals", stop: float = 0) -> subprocess.Popen[str]:
    """It has said that it is ready."""
    command = [sys.executable, "-c", PROGRAM, str(seconds), how, str(stop)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number):
    process = program(0)
    process.send_signal(number)
    assert process.communicate(timeout=10) == ("stopping\nstopped\n", "")
    assert process.returncode == 0


def test_the_end_of_stdin_ends_it_where_that_was_asked_for():
    process = program(0, "stdin")
    process.stdin.write("ignored\n")
    process.stdin.flush()
    assert process.communicate(timeout=10) == ("stopping\nstopped\n", "") and process.returncode == 0


def test_a_second_signal_does_not_wait():
    process = program(0, stop=60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=10)[0] == ""
    assert process.returncode == -signal.SIGTERM


def test_a_signal_while_loading_is_not_an_error(monkeypatch):
    server, said = Slow(), []
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    run_server(server, None, ready=lambda: said.append("ready"), until_stdin_closes=False)
    assert said == [] and server.stopped == 1


def test_what_goes_wrong_at_the_start_is_raised():
    server = FakeLanguage()
    server.trouble = BundleError("edited")
    with pytest.raises(BundleError, match="edited"):
        run_server(server, None, ready=lambda: None, until_stdin_closes=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
