"""One import package from four folders: its parts, its wheel, and life without the extras."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from .layout import FOLDERS, module_name, sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture(scope="module")
def pyproject(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))


def test_packages_are_the_folders(repository: Path, pyproject: dict[str, Any]) -> None:
    folders = {module_name(repository, path) for path in sources(repository, *FOLDERS) if path.name == "__init__.py"}
    assert folders == set(pyproject["tool"]["setuptools"]["packages"])
    holders = {module_name(repository, path.parent / "__init__.py") for path in sources(repository, *FOLDERS)}
    assert holders <= folders, "a folder with modules has no __init__.py"


def test_the_version_is_written_once(pyproject: dict[str, Any]) -> None:
    import deepstitch

    assert deepstitch.__version__ == pyproject["project"]["version"]


def test_the_sample_model_ships(repository: Path) -> None:
    files = [path for path in (repository / "models" / "sample" / "checkpoint").iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 8 << 20


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, so that no build folder is left behind or picked up."""
    tree, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(repository / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / file, tree / file)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(output),
        ".",
    ]
    finished = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return next(output.glob("*.whl"))


def test_wheel_holds_every_module_and_data_file(repository: Path, wheel: Path, pyproject: dict[str, Any]) -> None:
    expected = {module_name(repository, path.with_name("__init__.py")).replace(".", "/") + f"/{path.name}"
                for path in sources(repository, *FOLDERS)}  # fmt: skip
    for package, patterns in pyproject["tool"]["setuptools"]["package-data"].items():
        folder = package.removeprefix("deepstitch.").replace(".", "/")
        for pattern in patterns:
            matches = [path for path in (repository / folder).glob(pattern) if path.is_file()]
            assert matches, f"package-data {package}: {pattern} matches no file"
            expected |= {f"{package.replace('.', '/')}/{path.relative_to(repository / folder)}" for path in matches}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode("utf-8")
    assert "License-Expression: Apache-2.0" in text
    required = {re.split(r"[^\w-]", line.split(": ")[1])[0] for line in text.splitlines()
                if line.startswith("Requires-Dist") and "extra ==" not in line}  # fmt: skip
    assert required == {
        "click",
        "jinja2",
        "numpy",
        "onnxruntime",
        "pillow",
        "safetensors",
        "tokenizers",
        "tqdm",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def dependencies(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Distributions that installing ``name`` brings, itself included, as pip would resolve them here."""
    found = {name}
    for line in importlib.metadata.requires(name) or ():
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found |= dependencies(needed.name, frozenset(needed.extras))
    return found


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel and what it declares to need, and nothing else.

    What it needs are links to what is installed here, which takes a second; pip would take a minute.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    for name in dependencies("deepstitch") - {"deepstitch"}:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            target = packages / top
            if not target.exists():  # two distributions may share a namespace
                target.symlink_to(Path(str(distribution.locate_file(top))))
    return python


def test_runtime_works_without_torch(clean_python: Path, tmp_path: Path) -> None:
    script = """
import importlib.util, sys
import deepstitch, deepstitch.runtime.pipeline, deepstitch.cli
for name in ("torch", "transformers", "onnx", "polygraphy"):
    assert importlib.util.find_spec(name) is None, name
"""
    finished = subprocess.run(
        [str(clean_python), "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_an_answer_without_torch(clean_python: Path, sample_bundle: Callable[..., Path], tmp_path: Path) -> None:
    command = [str(clean_python.with_name("deepstitch")), "run", str(sample_bundle("ort-cpu"))]
    command += ["--prompt", "Hello", "--max-tokens", "4", "--json"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert len(json.loads(finished.stdout)["token_ids"]) >= 1


def test_export_without_its_extra_names_it(
    clean_python: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    command = [
        str(clean_python.with_name("deepstitch")),
        "export",
        str(tiny_checkpoint()),
        "--target",
        "portable",
    ]
    finished = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert finished.returncode == 2 and "pip install 'deepstitch[export]'" in finished.stderr
    assert not (tmp_path / "out").exists()
