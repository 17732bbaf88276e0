"""A plugin library for the stand-in: the real host code, no machine code, nothing behind the adapters' names.

It opens, describes itself and refuses attributes like a library of ``deepstitch plugins build --tensorrt-root``, and is
made without NVRTC and without TensorRT's headers. It cannot run: the stand-in's engines compute the operators'
definitions.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

from deepstitch.plugins.build import fatbin, objects
from deepstitch.plugins.build.toolchain import package_root
from deepstitch.plugins.registry import OPS

_EXPORTS = ("setLoggerFinder", "getPluginCreators", "getCreators")
_PTX = b".version 8.8\n.target sm_61\n.address_size 64\n\0"


def stand_in_library(folder: Path, *, sm: int = 61) -> Path:
    """Compile and link ``libdeepstitch_plugins.so`` into ``folder``; objects are kept as those of any build.

    It has what TensorRT's loader looks for before version 10, and what it looks for from there on.

    Args:
        folder: of the library.
        sm: what its PTX is said to be for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        work = Path(made)
        for op in OPS:
            (work / f"{op}.fatbin").write_bytes(_fatbin(sm))
        source = work / "exports.cpp"
        source.write_text("".join(_function(name) for name in _EXPORTS), "utf-8")
        listed = f"-DDEEPSTITCH_OPS={' '.join(f'DEEPSTITCH_OP({op})' for op in OPS)}"
        embedded = (listed, f'-DDEEPSTITCH_FATBINS="{work.resolve()}"', f'-DDEEPSTITCH_TARGETS="compute_{sm}"')
        units = [objects.Unit(source=source, cached=False)]
        for each in sorted((package_root() / "common").glob("*.cpp")):
            if each.name == "embedded.cpp":
                units.append(objects.Unit(source=each, flags=embedded, cached=False))
            elif each.name != "launcher_host.cpp":
                units.append(objects.Unit(source=each, flags=(listed,) if each.name == "registry.cpp" else ()))
        units += [objects.Unit(source=package_root() / op / "op.cpp") for op in OPS]
        linked = work / "library.so"
        objects.link(objects.compile_all(units, work, os.cpu_count() or 1, lambda _: None), linked, ())
        return linked.replace(folder / "libdeepstitch_plugins.so")


def _function(name: str) -> str:
    return f'extern "C" __attribute__((visibility("default"))) void *{name}() {{ return nullptr; }}\n'


def edited_library(library: Path, path: Path, edits: Mapping[bytes, bytes]) -> Path:
    """A copy with other bytes of the same length."""
    data = library.read_bytes()
    for old, new in edits.items():
        assert old in data and len(old) == len(new)
        data = data.replace(old, new)
    path.write_bytes(data)
    return path


def _fatbin(sm: int) -> bytes:
    """One image of PTX, as nvFatbin writes it; see ``plugins/build/fatbin.py``."""
    entry = struct.pack("<HHIQIIII", 1, 0x0101, 64, len(_PTX), 0, 0, 0, sm).ljust(64, b"\0") + _PTX
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(entry)) + entry
