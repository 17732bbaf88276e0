"""Builds the library that runs the kernels on the CPU, with g++ and nothing else.

``python -m deepstitch.plugins.build.host --ops quantized_linear`` builds a library of some operators and prints where
it is. Objects are kept by a hash of everything they are made from, so that a change costs what it touches.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deepstitch.plugins.common.schema import PluginError
from deepstitch.plugins.registry import OPS

__all__ = ["build_host_library", "default_cache", "ops_with_kernels"]

PLUGINS = Path(__file__).resolve().parent.parent
COMMON = ("attributes", "op", "serialization", "registry", "abi", "launcher_host")
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
# Bits must not depend on what the compiler fuses; kernels read memory through several types.
KERNEL_FLAGS = ("-ffp-contract=off", "-fno-strict-aliasing")
SANITIZER_FLAGS = ("-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g1")
# The address sanitizer finds what these would, and they are half of the code.
UNCHECKED = "-fno-sanitize=null,object-size,vptr"
KEPT = 12  # libraries in a cache folder


def default_cache() -> Path:
    """Where libraries and objects are kept: ``deepstitch/plugins`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepstitch" / "plugins"


def ops_with_kernels() -> tuple[str, ...]:
    """Folders of the operators that have host code and a kernel."""
    return tuple(
        folder for folder in OPS if all((PLUGINS / folder / name).is_file() for name in ("op.cpp", "kernel.cuh"))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """One source file and what it is compiled with."""

    source: Path
    flags: tuple[str, ...]
    inputs: tuple[Path, ...]  # all files it may include, itself among them

    def key(self, compiler: str) -> str:
        digest = hashlib.sha256("\0".join([compiler, self.source.name, *self.flags]).encode())
        for path in self.inputs:
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:24]


def build_host_library(
    out: Path | None = None,
    *,
    ops: Sequence[str] | None = None,
    sanitizers: Iterable[str] = (),
    optimise: str = "-O2",
    extra: Sequence[Path] = (),
    defines: Sequence[str] = (),
    compile_flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
    jobs: int | None = None,
) -> Path:
    """Compile and link; return at once where the result exists already.

    Args:
        out: folder for objects and libraries; the user's cache folder if None. Several processes may share it.
        ops: folders of the operators; all that have ``op.cpp`` and ``kernel.cuh`` if None.
        sanitizers: of g++, for example ``("address", "undefined")``.
        optimise: flag of g++ for kernels and the shim; the host code of an operator is not worth it.
        extra: further sources (C++, or kernels as .cuh) to link in.
        defines: of the preprocessor, for kernels and the shim, for example ``("DEEPSTITCH_SHIM_PORTABLE",)``.
        compile_flags: for the further sources.
        link_flags: behind the objects, for example ``("-lfoo",)``.
        jobs: compilers at a time; the number of CPUs if None.

    Raises:
        PluginError: there is no compiler, no such operator, or a file does not compile.
    """
    chosen = _checked(ops)
    folder = default_cache() if out is None else out
    flags = (*FLAGS, *_cpu_flags())
    if sanitizers := tuple(sanitizers):
        flags += (f"-fsanitize={','.join(sanitizers)}", *SANITIZER_FLAGS, UNCHECKED)
    kernel = (*flags, optimise, *KERNEL_FLAGS, *(f"-D{each}" for each in defines))
    units = [*_units(chosen, flags, kernel), *_extra_units(chosen, (*kernel, *compile_flags), extra)]
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    keys = [unit.key(version) for unit in units]
    name = hashlib.sha256("\0".join([*keys, *link_flags]).encode()).hexdigest()[:24]
    library = folder / f"libdeepstitch_host_{name}.so"
    folder.mkdir(parents=True, exist_ok=True)
    if not library.is_file():
        objects = [folder / f"{unit.source.stem}_{key}.o" for unit, key in zip(units, keys, strict=True)]
        with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            list(pool.map(lambda pair: _compile(compiler, *pair), zip(units, objects, strict=True)))
        _make([compiler, *flags, "-shared", *map(str, objects), *link_flags], library, "linking the host library")
        _forget_old(folder)
    library.touch()
    return library


def _checked(ops: Sequence[str] | None) -> tuple[str, ...]:
    buildable = ops_with_kernels()
    for folder in ops or ():
        if folder not in buildable:
            raise PluginError(f"plugins/{folder} has no op.cpp and kernel.cuh to build; {', '.join(OPS)} are operators")
    return buildable if ops is None else tuple(ops)


def _headers(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted([*folder.glob("*.h"), *folder.glob("*.cuh")]))


def _op_list(ops: Sequence[str]) -> str:
    return f"-DDEEPSTITCH_OPS={' '.join(f'DEEPSTITCH_OP({op})' for op in ops)}"


def _units(ops: Sequence[str], flags: tuple[str, ...], kernel: tuple[str, ...]) -> list[_Unit]:
    shared = _headers(PLUGINS / "common")
    own = {"registry": (*flags, _op_list(ops)), "launcher_host": kernel}
    units = []
    for name in COMMON:
        source = PLUGINS / "common" / f"{name}.cpp"
        units.append(_Unit(source=source, flags=own.get(name, flags), inputs=(*shared, source)))
    for op in ops:
        folder = PLUGINS / op
        local = (*shared, *_headers(folder))
        units.append(_Unit(source=folder / "op.cpp", flags=flags, inputs=(*local, folder / "op.cpp")))
        units.append(_Unit(source=folder / "kernel.cuh", flags=kernel, inputs=local))
    return units


def _extra_units(ops: Sequence[str], flags: tuple[str, ...], sources: Sequence[Path]) -> list[_Unit]:
    common = PLUGINS / "common"
    shared = (*_headers(common), *_headers(common / "tensorrt"))
    own = (*flags, _op_list(ops), f"-I{common}")
    return [_Unit(source=source, flags=own, inputs=(*shared, *_headers(source.parent), source)) for source in sources]


def _cpu_flags() -> tuple[str, ...]:
    """AVX2, FMA and F16C where this CPU has them: dp4a and the float conversions are single instructions then."""
    try:
        info = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return ()
    flags = set(next((line for line in info.splitlines() if line.startswith("flags")), "").split())
    return ("-march=x86-64-v3",) if {"avx2", "bmi2", "f16c", "fma", "movbe"} <= flags else ()


def _compiler() -> str:
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise PluginError(f"the compiler {name} is not installed; install g++, or name one in CXX")
    return found


def _compile(compiler: str, unit: _Unit, out: Path) -> None:
    # A kernel is a header of others too (#pragma once), and no C++ to g++ by its name: included by an empty file.
    source = ["-include", str(unit.source), os.devnull] if unit.source.suffix == ".cuh" else [str(unit.source)]
    _make([compiler, *unit.flags, "-x", "c++", "-c", *source], out, f"compiling {unit.source}")


def _make(command: list[str], out: Path, what: str) -> None:
    """Run a compiler where ``out`` does not exist; of several processes that want the same file one does it."""
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.is_file():
            out.touch()
            return
        made = out.with_suffix(f".{os.getpid()}.tmp")
        finished = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise PluginError(f"{what} failed:\n{finished.stderr[-8000:]}")
        made.replace(out)


def _forget_old(folder: Path) -> None:
    """Keep the newest libraries, and the objects of about as many."""
    for pattern, kept in (("*.so", KEPT), ("*.o", KEPT * (len(COMMON) + 2 * len(OPS)))):
        newest = sorted(folder.glob(pattern), key=_changed, reverse=True)
        for path in newest[kept:]:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has just forgotten it
        return 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: build, and print the path of the library."""
    parser = argparse.ArgumentParser(prog="python -m deepstitch.plugins.build.host", description=main.__doc__)
    parser.add_argument("--ops", nargs="*", metavar="FOLDER", help="default: all that have op.cpp and kernel.cuh")
    parser.add_argument("--out", type=Path, help="folder for objects and libraries (default: the user's cache)")
    parser.add_argument("--sanitizers", nargs="*", default=[], metavar="NAME", help="for example: address undefined")
    parser.add_argument("--optimise", default="-O2", help="flag of g++ (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: the number of CPUs)")
    options = parser.parse_args(arguments)
    try:
        library = build_host_library(
            options.out,
            ops=options.ops,
            sanitizers=options.sanitizers,
            optimise=options.optimise,
            jobs=options.jobs,
        )
    except PluginError as error:
        raise SystemExit(str(error)) from None
    print(library)


if __name__ == "__main__":
    main()
