"""CUDA C++ to machine code and PTX with NVRTC, through ctypes: no toolkit, no headers, no driver.

The source is an operator's ``kernel.cuh``; what it includes is found relative to it. ptxas reports what each kernel
takes (registers, spills, shared memory, stack), and that report is parsed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deepstitch.plugins.build.host import default_cache
from deepstitch.plugins.build.toolchain import ToolchainError, cuda_library

__all__ = ["Compiled", "Usage", "architectures", "compile_source", "included", "parse_usage", "version"]

# constexpr functions of params.h, which host code includes as well, carry no __device__
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--device-as-default-execution-space")
_KEPT = 200  # results in the cache
_SPILLS = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What ptxas says one kernel takes; bytes and registers are per thread, shared memory per block."""

    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """The result for one architecture: ``sm_61`` gives a cubin, ``compute_61`` gives PTX."""

    architecture: str
    image: bytes
    log: str = ""
    usage: dict[str, Usage] = field(default_factory=dict)


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's CUDA version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check("nvrtcVersion", cuda_library("nvrtc").nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def architectures() -> tuple[int, ...]:
    """Compute capabilities this NVRTC compiles for: 61 is 6.1."""
    library, count = cuda_library("nvrtc"), ctypes.c_int()
    _check("nvrtcGetNumSupportedArchs", library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    values = (ctypes.c_int * count.value)()
    _check("nvrtcGetSupportedArchs", library.nvrtcGetSupportedArchs(values))
    return tuple(values)


def _check(call: str, code: int) -> None:
    if code:
        text = cuda_library("nvrtc").nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise ToolchainError(f"{call} failed: {text(code).decode()}")


def compile_source(source: Path, architecture: str, *, defines: Iterable[str] = (), cache: bool = True) -> Compiled:
    """Compile one file.

    Args:
        source: a ``.cuh``; its folder is the first include folder.
        architecture: ``sm_61`` for machine code, ``compute_61`` for PTX.
        defines: macros, ``NAME`` or ``NAME=VALUE``.
        cache: look in and add to the cache of earlier results.

    Raises:
        ToolchainError: NVRTC is missing or refuses the source; its log is in the message.
    """
    options = [f"--gpu-architecture={architecture}", *_OPTIONS, f"--include-path={source.parent}"]
    options += [f"--define-macro={each}" for each in defines]
    key = _key(source, [each for each in options if not each.startswith("--include-path")])
    kept = default_cache() / "nvrtc" / key
    if cache and (found := _load(kept, architecture)):
        return found
    image, log = _compile(source, options, "CUBIN" if architecture.startswith("sm_") else "PTX")
    result = Compiled(architecture=architecture, image=image, log=log, usage=parse_usage(log))
    if cache:
        _keep(kept, result)
    return result


def _compile(source: Path, options: list[str], kind: str) -> tuple[bytes, str]:
    library, program = cuda_library("nvrtc"), ctypes.c_void_p()
    text = f'#include "{source.name}"\n'.encode()
    # the name is what messages show; it must not be a path of this machine, which would end up in the code
    name = f"{source.parent.name}.cu".encode()
    _check("nvrtcCreateProgram", library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
    try:
        words = (ctypes.c_char_p * len(options))(*(each.encode() for each in options))
        code = library.nvrtcCompileProgram(program, len(options), words)
        log = _read(program, "ProgramLog").rstrip(b"\0").decode("utf-8", "replace")
        if code:
            raise ToolchainError(f"{source}: NVRTC {'.'.join(map(str, version()))} refuses it: {log.strip()}")
        return _read(program, kind), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = cuda_library("nvrtc"), ctypes.c_size_t()
    _check(f"nvrtcGet{what}Size", getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(f"nvrtcGet{what}", getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def parse_usage(log: str) -> dict[str, Usage]:
    """Read ptxas' report: one entry per kernel; functions that are not inlined count to the kernel before them."""
    found: dict[str, dict[str, int]] = {}
    kernel: dict[str, int] = {}
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernel = found.setdefault(entry[1], {})
        if stack := _STACK.search(line):
            for name, value in zip(_SPILLS, stack.groups(), strict=True):
                kernel[name] = kernel.get(name, 0) + int(value)
        if used := _USED.search(line):
            kernel["registers"] = int(used[1])
            shared = _SHARED.search(line)
            kernel["shared_bytes"] = int(shared[1]) if shared else 0
    return {name: Usage(**values) for name, values in found.items()}


def _key(source: Path, options: list[str]) -> str:
    """Everything the result depends on: the compiler, its options, the file and what it includes."""
    digest = hashlib.sha256(json.dumps([version(), options, source.name]).encode())
    for path in included(source):
        digest.update(f"{os.path.relpath(path, source.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def included(source: Path) -> list[Path]:
    """A file and every file of ours that it includes, directly or not; each once, in the order they are met."""
    found, waiting = [], [source.resolve()]
    while waiting:
        path = waiting.pop(0)
        if path in found or not path.is_file():
            continue
        found.append(path)
        waiting += [(path.parent / name).resolve() for name in _INCLUDE.findall(path.read_text("utf-8"))]
    return found


def _load(kept: Path, architecture: str) -> Compiled | None:
    try:
        record = json.loads((kept.with_suffix(".json")).read_text("utf-8"))
        image = kept.with_suffix(".image").read_bytes()
    except (OSError, ValueError):
        return None
    if hashlib.sha256(image).hexdigest() != record["sha256"]:
        return None
    usage = {name: Usage(**values) for name, values in record["usage"].items()}
    return Compiled(architecture=architecture, image=image, log=record["log"], usage=usage)


def _keep(kept: Path, result: Compiled) -> None:
    """Whoever reads sees both files or none: the record comes last, and says what the image must be."""
    record = {
        "sha256": hashlib.sha256(result.image).hexdigest(),
        "log": result.log,
        "usage": {name: asdict(usage) for name, usage in result.usage.items()},
    }
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        for suffix, data in ((".image", result.image), (".json", json.dumps(record).encode())):
            handle, name = tempfile.mkstemp(dir=kept.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(kept.with_suffix(suffix))
        _forget_old(kept.parent)
    except OSError:
        return  # a cache that cannot be written costs time, nothing else


def _forget_old(folder: Path) -> None:
    records = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in records[_KEPT:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".image").unlink(missing_ok=True)
