"""The frame of the command line: verbs, lazy imports, exit codes, the one-line refusal."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from deepstitch import __version__
from deepstitch.cli import EXIT_BUG, EXIT_INTERRUPTED, VERBS, LazyGroup, main
from deepstitch.errors import ComparisonFailed, InputError

HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "polygraphy",
    "matplotlib",
    "numpy",
)
HEAVY += ("PIL", "av", "tokenizers", "jinja2", "safetensors", "tqdm", "aiohttp", "msgspec", "prometheus_client")
ENTRY = "import sys; from deepstitch.cli import main; code = main(sys.argv[1:]);"  # what the console script does


def run(*words: str, script: str = "sys.exit(code)") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{ENTRY} {script}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_command_file_is_a_verb(repository: Path) -> None:
    modules = (repository / "deepstitch" / "commands").glob("*.py")
    assert {path.stem.replace("_", "-") for path in modules if "\ndef command(" in path.read_text("utf-8")} == set(
        VERBS
    )


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_imports_nothing_heavy(verb: str | None) -> None:
    words = [verb] if verb else []
    report = f"print('IMPORTED', *sorted(set({HEAVY!r}) & set(sys.modules))); sys.exit(code)"
    finished = run(*words, "--help", script=report)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"Usage: deepstitch {verb or '[OPTIONS]'} ")
    assert finished.stdout.splitlines()[-1].split() == ["IMPORTED"]


def test_help_lists_every_verb_with_its_purpose() -> None:
    listed = {line.split()[0]: line.split()[1:] for line in run("--help").stdout.splitlines() if line.startswith("  ")}
    assert all(len(listed[verb]) > 2 for verb in VERBS)


def test_help_answers_in_under_300_ms() -> None:
    """Processor time: the wall time of an idle machine, whatever else runs on this one."""
    run("--help")  # fills the file cache
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert statistics.median(seconds) < 0.3, seconds


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deepstitch, version {__version__}\n"


@pytest.fixture
def verb_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Replaces the verb ``run`` by a function."""

    def replace(body: Callable[[], object]) -> None:
        monkeypatch.setattr(LazyGroup, "get_command", lambda *_: click.Command("run", callback=body))

    return replace


def raising(error: BaseException) -> Callable[[], object]:
    def body() -> object:
        raise error

    return body


@pytest.mark.parametrize(("error", "code"), [(InputError("a\nb"), 2), (ComparisonFailed("a b"), 1)])
def test_refusal_is_one_line(
    verb_that: Callable[..., None], capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    verb_that(raising(error))
    assert main(["run"]) == code
    captured = capsys.readouterr()
    assert captured.err == "deepstitch: error: a b\n" and captured.out == ""


def test_debug_shows_the_traceback(
    verb_that: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verb_that(raising(InputError("no such picture")))
    assert main(["--debug", "run"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("DEEPSTITCH_DEBUG", "1")
    assert main(["run"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interruption(verb_that: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb_that(raising(KeyboardInterrupt()))
    assert main(["run"]) == EXIT_INTERRUPTED == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(verb_that: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb_that(raising(ZeroDivisionError("oops")))
    assert main(["run"]) == EXIT_BUG
    assert "ZeroDivisionError: oops" in capsys.readouterr().err


def test_exit_code_of_a_verb_that_chooses_one(verb_that: Callable[..., None]) -> None:
    verb_that(lambda: click.get_current_context().exit(1))
    assert main(["run"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["insepct"], "no command 'insepct' (did you mean 'inspect'?)"),
        (["inspect"], "Missing argument"),
        (["inspect", "x", "--batch", "0"], "Invalid value for '--batch'"),
        (["--bogus"], "No such option"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_shell_completion_knows_the_verbs() -> None:
    environment = {"_DEEPSTITCH_COMPLETE": "bash_complete", "COMP_WORDS": "deepstitch ins", "COMP_CWORD": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", f"{ENTRY} sys.exit(code)"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout == "plain,inspect\n"


def test_json_goes_to_stdout_and_refusals_to_stderr(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    finished = run("inspect", str(tiny_checkpoint("qwen3")), "--json")
    assert finished.stderr == "" and json.loads(finished.stdout)["kind"] == "checkpoint"
    refused = run("inspect", str(tmp_path), "--json")
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
