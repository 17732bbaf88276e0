"""One import package from four folders: its parts, its wheel, who may import whom, and life without the extras."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

FOLDERS = ("deepstitch", "export", "models", "plugins", "runtime")
MAPPED = ("export", "models", "plugins", "runtime")
RUNTIME_LIBRARIES = {"numpy", "onnxruntime", "tokenizers", "jinja2", "PIL", "safetensors", "tqdm", "click"}
RUNTIME_LIBRARIES |= {
    "markupsafe",
    "av",
}  # comes with jinja2; av is the extra for video files, imported on use
RUNTIME_SHARED = {"deepstitch.errors", "deepstitch.manifest", "deepstitch.tensorfile", "deepstitch.runtime"}
# What a light module may import when it is imported itself; anything else belongs inside a function.
LIGHT_LIBRARIES = {"click", "numpy"}


@pytest.fixture(scope="module")
def pyproject(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))


def sources(repository: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((repository / folder).rglob("*.py"))]


def module_name(repository: Path, path: Path) -> str:
    parts = list(path.relative_to(repository).with_suffix("").parts)
    if parts[0] in MAPPED:
        parts.insert(0, "deepstitch")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_packages_are_the_folders(repository: Path, pyproject: dict[str, Any]) -> None:
    folders = {
        module_name(repository, path) for path in sources(repository, *FOLDERS) if path.name == "__init__.py"
    }
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


# --- who imports whom -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One import statement; ``on_load`` where importing the module runs it."""

    where: str
    name: str
    on_load: bool

    @property
    def library(self) -> str:
        return self.name.split(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST, *, on_load: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        inner = on_load and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, inner
        yield from walk(child, on_load=inner)


def imports(repository: Path, path: Path) -> list[Import]:
    package = module_name(repository, path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = []
    for node, on_load in walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            stem = base if node.level else str(node.module)
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        where = f"{path.relative_to(repository)}:{getattr(node, 'lineno', 0)}"
        found += [Import(where, name, on_load) for name in names]
    return found


def violations(
    repository: Path, folders: tuple[str, ...], allowed: Callable[[Import], bool], *, on_load: bool = False
) -> list[str]:
    every = [each for path in sources(repository, *folders) for each in imports(repository, path)]
    assert every, "the check reads no imports at all"
    return [f"{i.where} {i.name}" for i in every if (i.on_load or not on_load) and not allowed(i)]


def inside(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_runtime_imports_only_what_it_ships_with(repository: Path) -> None:
    def allowed(each: Import) -> bool:
        if each.library == "deepstitch":
            return inside(each.name, RUNTIME_SHARED) or each.name == "deepstitch.__version__"
        return each.library in RUNTIME_LIBRARIES | sys.stdlib_module_names

    assert violations(repository, ("runtime",), allowed) == []


def test_models_and_export_keep_their_direction(repository: Path) -> None:
    assert violations(repository, ("models",), lambda i: not inside(i.name, {"deepstitch.export"})) == []
    assert violations(repository, ("plugins",), lambda i: not inside(i.name, {"deepstitch.export"})) == []


def test_the_import_root_is_light(repository: Path) -> None:
    """``import deepstitch`` and the command line reach the sub-packages from inside functions only."""

    def allowed(each: Import) -> bool:
        if each.library == "deepstitch":
            return not inside(each.name, {f"deepstitch.{folder}" for folder in MAPPED})
        return each.library in LIGHT_LIBRARIES | sys.stdlib_module_names

    assert violations(repository, ("deepstitch",), allowed, on_load=True) == []


def test_nothing_imports_tests_or_bare_names(repository: Path) -> None:
    banned = {*MAPPED, "tests", "benchmarks"}
    assert violations(repository, FOLDERS, lambda each: each.library not in banned) == []


# --- the wheel --------------------------------------------------------------------------------------------------------


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


def test_wheel_holds_every_module_and_data_file(
    repository: Path, wheel: Path, pyproject: dict[str, Any]
) -> None:
    expected = {module_name(repository, path.with_name("__init__.py")).replace(".", "/") + f"/{path.name}"
                for path in sources(repository, *FOLDERS)}  # fmt: skip
    for package, patterns in pyproject["tool"]["setuptools"]["package-data"].items():
        folder = package.removeprefix("deepstitch.").replace(".", "/")
        for pattern in patterns:
            matches = [path for path in (repository / folder).glob(pattern) if path.is_file()]
            assert matches, f"package-data {package}: {pattern} matches no file"
            expected |= {
                f"{package.replace('.', '/')}/{path.relative_to(repository / folder)}" for path in matches
            }
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


# --- without the extras -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel and its dependencies, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    finished = subprocess.run(install, capture_output=True, text=True, check=False, timeout=300)
    if finished.returncode != 0 and re.search(
        r"Could not find a version|Connection|timed out|Temporary failure", finished.stderr
    ):
        pytest.skip(f"the package registry cannot be reached: {finished.stderr.strip().splitlines()[-1]}")
    assert finished.returncode == 0, finished.stderr
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


def test_an_answer_without_torch(
    clean_python: Path, sample_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    import json

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
    finished = subprocess.run(
        [*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2 and "pip install 'deepstitch[export]'" in finished.stderr
    assert not (tmp_path / "out").exists()
