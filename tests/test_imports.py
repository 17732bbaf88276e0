"""Who may import whom: the runtime nothing of export and models, the import root nothing heavy."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .layout import FOLDERS, MAPPED, module_name, sources

RUNTIME_LIBRARIES = {"numpy", "onnxruntime", "tokenizers", "jinja2", "PIL", "safetensors", "tqdm", "click"}
RUNTIME_LIBRARIES |= {
    "markupsafe",
    "av",
}  # comes with jinja2; av is the extra for video files, imported on use
# The extra for processes of their own, and the two folders that need it.
SERVER_LIBRARIES = {"aiohttp", "mooncake", "msgspec", "nixl", "prometheus_client", "xxhash"}
SERVER_FOLDERS = ("runtime/disaggregated/", "runtime/server/")
# The extra for cards, behind one module.
CARD_LIBRARIES, CARD_MODULE = {"cuda"}, "runtime/engine/cuda.py"
RUNTIME_SHARED = {
    "deepstitch.blockwise",
    "deepstitch.engine_manifest",
    "deepstitch.errors",
    "deepstitch.manifest",
    "deepstitch.memory_estimate",
    "deepstitch.runtime",
    "deepstitch.tensorfile",
}
# What a light module may import when it is imported itself; anything else belongs inside a function.
LIGHT_LIBRARIES = {"click", "numpy"}


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
        extra = SERVER_LIBRARIES if each.where.startswith(SERVER_FOLDERS) else set()
        extra = CARD_LIBRARIES if each.where.startswith(CARD_MODULE) else extra
        return each.library in RUNTIME_LIBRARIES | extra | sys.stdlib_module_names

    assert violations(repository, ("runtime",), allowed) == []


def test_nothing_below_the_export_imports_it(repository: Path) -> None:
    def allowed(each: Import) -> bool:
        return not inside(each.name, {"deepstitch.export"})

    assert violations(repository, ("models", "plugins", "runtime"), allowed) == []


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


def test_every_form_of_import_is_seen(tmp_path: Path) -> None:
    """The checks above can fail."""
    (tmp_path / "runtime" / "engine").mkdir(parents=True)
    (tmp_path / "runtime" / "engine" / "x.py").write_text(
        "import torch.nn\nfrom ..bundle import Bundle\nfrom deepstitch import export\n"
        "if TYPE_CHECKING:\n    import onnx\n"
        "def f():\n    from deepstitch.models import config\n"
    )
    found = imports(tmp_path, tmp_path / "runtime" / "engine" / "x.py")
    assert [(each.name, each.on_load) for each in found] == [
        ("torch.nn", True),
        ("deepstitch.runtime.bundle.Bundle", True),
        ("deepstitch.export", True),
        ("deepstitch.models.config", False),
    ]
