"""Several architectures of one operator in one file, which the driver picks from: written by nvFatbin, read by us."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from deepstitch.plugins.build.toolchain import ToolchainError, cuda_library

__all__ = ["MAGIC", "Image", "pack", "unpack"]

MAGIC = 0xBA55ED50
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
_ENTRY = struct.Struct("<HHIQIIII")  # kind, version, bytes of this header, bytes of the payload, ..., ..., ..., sm
_KINDS = {1: "ptx", 2: "cubin"}
_ELF = b"\x7fELF"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One entry; ``data`` is None where the entry is compressed (nvcc without ``-no-compress``)."""

    kind: str
    sm: int
    data: bytes | None


def pack(name: str, cubins: Mapping[int, bytes], ptx: Mapping[int, bytes]) -> bytes:
    """Put machine code and PTX, by compute capability (61 is 6.1), into one fatbin, uncompressed.

    Raises:
        ToolchainError: nvFatbin is missing, or refuses an image.
    """
    library, handle = cuda_library("nvfatbin"), ctypes.c_void_p()
    options = (ctypes.c_char_p * 2)(b"-64", b"-compress=false")
    _check("nvFatbinCreate", library.nvFatbinCreate(ctypes.byref(handle), options, ctypes.c_size_t(2)))
    try:
        identifier = name.encode()
        for sm, data in sorted(cubins.items()):
            words = (data, ctypes.c_size_t(len(data)), str(sm).encode(), identifier)
            _check(f"nvFatbinAddCubin sm_{sm}", library.nvFatbinAddCubin(handle, *words))
        for sm, data in sorted(ptx.items()):
            text = data.rstrip(b"\0") + b"\0"
            words = (text, ctypes.c_size_t(len(text)), str(sm).encode(), identifier)
            _check(f"nvFatbinAddPTX compute_{sm}", library.nvFatbinAddPTX(handle, *words, b""))
        size = ctypes.c_size_t()
        _check("nvFatbinSize", library.nvFatbinSize(handle, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        _check("nvFatbinGet", library.nvFatbinGet(handle, buffer))
        return buffer.raw
    finally:
        library.nvFatbinDestroy(ctypes.byref(handle))


def _check(call: str, code: int) -> None:
    if code:
        text = cuda_library("nvfatbin").nvFatbinGetErrorString
        text.restype = ctypes.c_char_p
        raise ToolchainError(f"{call} failed: {text(code).decode()}")


def unpack(data: bytes) -> list[Image]:
    """List the images of a fatbin.

    Raises:
        ToolchainError: these bytes are no fatbin, or end in the middle of one.
    """
    if len(data) < _HEADER.size or (header := _HEADER.unpack_from(data))[0] != MAGIC:
        raise ToolchainError("these bytes are no fatbin: the first four are not its magic number")
    _, _, offset, total = header
    end = offset + total
    if end > len(data):
        raise ToolchainError(f"the fatbin says it has {end} bytes, {len(data)} are there")
    images = []
    while offset + _ENTRY.size <= end:
        kind, _, head, size, _, _, _, sm = _ENTRY.unpack_from(data, offset)
        if head < _ENTRY.size or offset + head + size > end:
            raise ToolchainError(f"the entry at byte {offset} of the fatbin is longer than the fatbin")
        payload = data[offset + head : offset + head + size]
        name = _KINDS.get(kind, f"kind {kind}")
        plain = payload.startswith(_ELF) if name == "cubin" else b".version" in payload
        images.append(Image(kind=name, sm=sm, data=payload if plain else None))
        offset += head + size
    return images
