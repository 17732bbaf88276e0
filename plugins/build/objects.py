"""Compiles and links host code with g++; objects are kept by a hash of everything they are made from."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deepstitch.plugins.build.host import default_cache
from deepstitch.plugins.build.nvrtc import included
from deepstitch.plugins.build.toolchain import ToolchainError, cxx, package_root

__all__ = ["Unit", "compile_all", "compiler_version", "link"]

_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra")
_LINK = ("-shared", "-s", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-Wl,--build-id=sha1")
# What may be seen from outside; the rest, templates of libstdc++ among it, could clash with other libraries.
_EXPORTS = "{ global: deepstitch_*; getPluginCreators; getCreators; setLoggerFinder; local: *; };\n"
_KEPT = 200  # objects in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One source file; ``cached`` where its flags and what it includes by relative path are all it is made from."""

    source: Path
    flags: tuple[str, ...] = ()
    cached: bool = True


@functools.cache
def compiler_version() -> str:
    """First line of what the compiler says about itself."""
    finished = subprocess.run([cxx(), "--version"], capture_output=True, text=True, check=False)
    return (finished.stdout.splitlines() or ["unknown"])[0]


def compile_all(units: Sequence[Unit], folder: Path, jobs: int, progress: Callable[[str], None]) -> list[Path]:
    """Compile into ``folder``, ``jobs`` at a time; return the objects in order.

    Raises:
        ToolchainError: there is no compiler, or it refuses a source.
    """

    def one(task: tuple[int, Unit]) -> Path:
        output = folder / f"{task[0]}.o"
        _compile(task[1], output)
        progress(f"{task[1].source.parent.name}/{task[1].source.name}")
        return output

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(pool.map(one, enumerate(units)))


def _compile(unit: Unit, output: Path) -> None:
    flags = (*_FLAGS, f"-ffile-prefix-map={package_root()}=plugins", *unit.flags)
    kept = default_cache() / "objects" / f"{_key(unit, flags)}.o"
    if unit.cached and kept.is_file():
        shutil.copyfile(kept, output)
        return
    run([cxx(), *flags, "-c", str(unit.source), "-o", str(output)])
    if unit.cached:
        _keep(output, kept)


def _key(unit: Unit, flags: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([compiler_version(), flags, unit.source.name]).encode())
    for path in included(unit.source):
        digest.update(f"{os.path.relpath(path, unit.source.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _keep(output: Path, kept: Path) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=kept.parent)
        os.close(handle)
        shutil.copyfile(output, name)
        Path(name).replace(kept)
        for path in sorted(kept.parent.glob("*.o"), key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT:]:
            path.unlink(missing_ok=True)
    except OSError:
        return  # a cache that cannot be written costs time, nothing else


def link(objects: Sequence[Path], output: Path, flags: Sequence[str] = ()) -> None:
    """Link a shared library that shows only the C interface and what TensorRT's loader asks for.

    Raises:
        ToolchainError: a symbol is missing.
    """
    exports = output.with_suffix(".map")
    exports.write_text(_EXPORTS, "utf-8")
    shown = (f"-Wl,-soname,{output.name}", f"-Wl,--version-script={exports}")
    run([cxx(), *_LINK, *shown, *map(str, objects), *flags, "-ldl", "-o", str(output)])


def run(command: Sequence[str]) -> None:
    """Run a compiler.

    Raises:
        ToolchainError: it fails; with its first errors.
    """
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        first = [line for line in finished.stderr.splitlines() if "error" in line or "undefined" in line][:3]
        said = " | ".join(first) or finished.stderr.strip()[-400:]
        raise ToolchainError(f"{Path(command[0]).name} failed: {said}; the command was {' '.join(command)}")
