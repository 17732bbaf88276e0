"""The README does what it says: its marked blocks run in order, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepstitch.cli import VERBS

BLOCK = re.compile(r"^(?:<!-- (tested|tested, slow) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
VARIABLE = re.compile(r"^(PICTURE|QUESTION) := (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``mark`` is what the line above it says: ``tested``, ``tested, slow`` or nothing."""

    language: str
    code: str
    mark: str


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text("utf-8")


def blocks(text: str) -> list[Block]:
    return [Block(language, code, mark) for mark, language, code in BLOCK.findall(text)]


def test_every_fence_is_seen(readme: str) -> None:
    assert readme.count("```") == 2 * len(blocks(readme))


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_marked_blocks_run(readme: str, repository: Path, sample_checkpoint: Path, tmp_path: Path, slow: bool) -> None:
    """In one folder, one after the other, as a reader would type them at the top of the repository."""
    del sample_checkpoint  # asked for so that a tree without it skips
    (tmp_path / "models").symlink_to(repository / "models")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    commands = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    marks = ("tested", "tested, slow") if slow else ("tested",)
    tested = [block for block in blocks(readme) if block.mark in marks]
    assert {block.language for block in tested} == {"bash", "python"}
    for block in tested:
        finished = subprocess.run(
            [*commands[block.language], block.code],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, f"{block.code}\n{finished.stdout}\n{finished.stderr}"
        assert finished.stdout.strip(), f"prints nothing:\n{block.code}"


def test_links_lead_to_files(readme: str, repository: Path) -> None:
    targets = [target for target in LINK.findall(readme) if "://" not in target]
    assert targets
    assert [target for target in targets if not (repository / target).exists()] == []


def test_named_paths_exist(readme: str, repository: Path) -> None:
    """Inline code that looks like a path of the repository is one."""
    named = re.findall(r"`((?:deepstitch|export|models|plugins|runtime|tests|benchmarks)/[\w./-]*)`", readme)
    assert named
    assert [path for path in named if not (repository / path).exists()] == []


def test_every_verb_and_exit_code_is_described(readme: str) -> None:
    for verb in VERBS:
        assert f"deepstitch {verb}" in readme
    for code in (0, 1, 2, 70, 130):
        assert re.search(rf"^\| {code} \|", readme, re.MULTILINE)


def test_plain_words(readme: str) -> None:
    boasts = r"\b(blazing|fastest|best|state-of-the-art|seamless|powerful|effortless|cutting-edge)\b"
    assert re.findall(boasts, readme, re.IGNORECASE) == []


def test_demo_asks_a_question_that_ships(repository: Path, sample_checkpoint: Path) -> None:
    demo = dict(VARIABLE.findall((repository / "Makefile").read_text("utf-8")))
    pictures = sample_checkpoint.parent / "pictures"
    questions = json.loads((pictures / "questions.json").read_text("utf-8"))
    assert repository / demo["PICTURE"] in [
        pictures / entry["image"] for entry in questions if entry["question"] == demo["QUESTION"]
    ]
    assert (repository / demo["PICTURE"]).is_file()
