"""Sizes and cleanliness of what is tracked."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .layout import FOLDERS

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_FUNCTION_P90 = 30
# A folder of somebody's machine, not a path inside the repository or of an interface such as /dev/shm
MACHINE_PATH = re.compile(r"(?<![\w.~}\])/-])/(?:home|Users|root|work|mnt|tmp|opt)/\w")


@pytest.fixture(scope="module")
def tracked(repository: Path) -> list[Path]:
    """Files git tracks or would track."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    finished = subprocess.run(listing, cwd=repository, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        pytest.skip("not a git working tree")
    return [path for name in finished.stdout.splitlines() if (path := repository / name).is_file()]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.name}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_file_is_longer_than_the_cap(tracked: list[Path]) -> None:
    lengths = {path.name: path.read_text("utf-8").count("\n") for path in tracked if path.suffix == ".py"}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_fit_a_screen(tracked: list[Path], repository: Path) -> None:
    sources = [path for path in tracked if path.suffix == ".py"]
    sizes = dict(item for path in sources for item in functions(path))
    assert {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION_LINES} == {}
    product = [path for path in sources if path.relative_to(repository).parts[0] in FOLDERS]
    lines = [lines for path in product for _, lines in functions(path)]
    assert statistics.quantiles(lines, n=10)[-1] <= MAX_FUNCTION_P90


def test_no_machine_paths(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        found += [
            f"{path.name}:{number}" for number, line in enumerate(text.splitlines(), 1) if MACHINE_PATH.search(line)
        ]
    assert found == []


def test_machine_paths_are_recognised() -> None:
    """Written with ``|`` for the slash, so that this file does not find itself."""
    for text in ("open('|home|me|x')", 'cd "|work|main"', "see |tmp|out.json", "`|Users|me|model`"):
        assert MACHINE_PATH.search(text.replace("|", "/")), text
    for text in (
        "models|sample|checkpoint",
        "https:||example.org|home|x",
        "..|work|x",
        "$X|tmp|x",
        "|dev|shm|x",
    ):
        assert not MACHINE_PATH.search(text.replace("|", "/")), text


def test_nothing_is_left_to_do(tracked: list[Path], repository: Path) -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX)\b")
    product = [path for path in tracked if path.relative_to(repository).parts[0] in FOLDERS]
    marked = [path.name for path in product if path.suffix == ".py" and marker.search(path.read_text("utf-8"))]
    assert marked == []
