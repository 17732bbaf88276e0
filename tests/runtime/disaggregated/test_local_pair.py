"""Two real processes for one request: the answer, deaths on either side, and what is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image

import deepstitch
from deepstitch.errors import DeepstitchError
from deepstitch.runtime.disaggregated import local_pair
from deepstitch.runtime.disaggregated.errors import PeerLost
from deepstitch.runtime.disaggregated.local_pair import LocalPair
from deepstitch.runtime.disaggregated.pair_client import chat_request
from deepstitch.runtime.disaggregated.trace import CLIENT, ENCODE, LANGUAGE

IMAGE_TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
OPTIONS = [
    {"max_tokens": 6},
    {"max_tokens": 6, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 3, "logprobs": 2},
    {"max_tokens": 12, "repetition_penalty": 1.3, "prefill_chunk": 4, "speculate": 3, "stop": (" Iris",)},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where folders of pairs are made: it must be empty afterwards."""
    place = Path(tempfile.mkdtemp(prefix="pair-"))
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield place
    left = list(place.glob("deepstitch*"))  # libraries put files of their own there
    shutil.rmtree(place)
    assert left == []


@pytest.fixture(autouse=True)
def no_children():
    yield
    assert psutil.Process().children(recursive=True) == []


@pytest.fixture
def picture(tmp_path, pictures):
    path = tmp_path / "picture.png"
    Image.fromarray(pictures[1]).save(path)
    return path


def kill(pair: LocalPair, index: int, number: int) -> None:
    os.kill(pair._children[index].process.pid, number)


def test_answers_of_one_process(plain_bundle, picture, folder):
    pipeline = deepstitch.load(plain_bundle, threads=1)
    with LocalPair(plain_bundle, threads=1) as pair:
        for options in OPTIONS:
            expected = pipeline.generate(IMAGE_TURN, images=[picture], **options)
            stream = pair.stream(chat_request(IMAGE_TURN, [picture], [], options, trace=True))
            assert "".join(stream) == expected.text
            found = stream.result.to_dict()
            assert {**found, "timings": 0, "prompt_tps": 0, "generation_tps": 0} == {
                **expected.to_dict(),
                "timings": 0,
                "prompt_tps": 0,
                "generation_tps": 0,
            }
            assert expected.timings.keys() <= found["timings"].keys()
            stream.close()
            if options is OPTIONS[0]:  # later the picture is known
                assert {span.process for span in stream.spans} == {CLIENT, LANGUAGE, ENCODE}
                begin = min(span.begin for span in stream.spans)
                assert begin == next(span.begin for span in stream.spans if span.process == CLIENT)
                assert "transfer" in found["timings"]


def test_one_that_cannot_start_says_why(plain_bundle, tmp_path, folder):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in plain_bundle.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(DeepstitchError, match=r"process ended \(exit code 2\): .*tokenizer\.json"), LocalPair(broken):
        pass


@pytest.mark.parametrize(("index", "name"), [(0, "encode"), (1, "language")])
def test_one_that_dies_before_the_request(plain_bundle, picture, folder, index, name):
    with LocalPair(plain_bundle, threads=1) as pair:
        kill(pair, index, signal.SIGKILL)
        pair._children[index].process.wait()
        with pytest.raises(PeerLost, match=rf"the {name} process ended \(signal SIGKILL\)"):
            list(pair.stream(chat_request(IMAGE_TURN, [picture], [], {}, trace=False)))


@pytest.mark.parametrize(("index", "name"), [(0, "encode"), (1, "language")])
def test_one_that_dies_in_mid_request(plain_bundle, picture, folder, index, name):
    with LocalPair(plain_bundle, threads=1) as pair:
        kill(pair, index, signal.SIGSTOP)  # so that the request waits for it
        threading.Timer(0.3, kill, (pair, index, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(PeerLost, match=rf"the {name} process ended \(signal SIGKILL\)"):
            list(pair.stream(chat_request(IMAGE_TURN, [picture], [], {}, trace=False)))
        assert time.monotonic() - began < 3


def test_one_that_hangs(plain_bundle, picture, folder, monkeypatch):
    monkeypatch.setattr(local_pair, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(local_pair, "_HANG_SECONDS", 0.5)
    began = time.monotonic()
    with LocalPair(plain_bundle, threads=1) as pair:
        kill(pair, 1, signal.SIGSTOP)
        guard = threading.Timer(8, kill, (pair, 1, signal.SIGCONT))
        guard.start()
        with pytest.raises(PeerLost, match=r"the language process has not answered for 0\.5 s"):
            list(pair.stream(chat_request(IMAGE_TURN, [picture], [], {}, trace=False)))
        guard.cancel()
        began = time.monotonic()
    assert time.monotonic() - began < 3


def test_modules_of_the_current_folder_are_not_loaded(plain_bundle, tmp_path, folder, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')", "utf-8")
    monkeypatch.chdir(tmp_path)
    with LocalPair(plain_bundle, threads=1):
        pass


def test_an_encode_process_that_dies_after_its_work_spoils_nothing(plain_bundle, picture, folder):
    with LocalPair(plain_bundle, threads=1) as pair:
        stream = pair.stream(chat_request(IMAGE_TURN, [picture], [], {"max_tokens": 400}, trace=False))
        first = next(stream)
        kill(pair, 0, signal.SIGKILL)
        rest = "".join(stream)
        assert first + rest == stream.result.text and stream.result.generated_tokens > 5


def leave(bundle, number: int) -> subprocess.Popen[bytes]:
    """A program whose pair is up when it gets a signal."""
    program = (
        "import sys, time; from pathlib import Path\n"
        "from deepstitch.runtime.disaggregated.local_pair import LocalPair\n"
        "with LocalPair(Path(sys.argv[1]), threads=1):\n"
        "    print('up', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout.readline() == b"up\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.send_signal(number)
    process.wait(20)
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_an_interrupted_program_leaves_nothing(plain_bundle, folder, number, code):
    assert leave(plain_bundle, number).returncode == code


def test_the_processes_end_with_a_killed_program(plain_bundle, folder):
    """Its folder stays, as nobody is left who could remove it, but the sockets in it are gone."""
    leave(plain_bundle, signal.SIGKILL)
    (left,) = folder.glob("deepstitch*")
    assert {path.suffix for path in left.iterdir()} == {".log"}
    shutil.rmtree(left)
