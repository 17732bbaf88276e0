"""What is inside a cubin: its architecture, its kernels, and what each of them takes. No tool of CUDA is needed.

A cubin is an ELF file. The code of kernel ``k`` is section ``.text.k``, its static shared memory ``.nv.shared.k``; the
sections ``.nv.info`` hold records (format, attribute, length, value) of which the number of registers, the stack
frame and the launch bounds are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from deepstitch.plugins.build.toolchain import ToolchainError

__all__ = ["Cubin", "Kernel", "read_cubin", "sections"]

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NOBITS = 8  # a section that takes no bytes in the file
_REGISTERS, _FRAME, _MAX_THREADS = 0x2F, 0x11, 0x05  # attributes of .nv.info
_LONG = 4  # the format of a record that is followed by its value


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One entry point. Registers and stack per thread, shared memory per block, without what a launch adds."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    max_threads: int
    code: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Cubin:
    """Machine code for one architecture; ``sm`` 61 is compute capability 6.1."""

    sm: int
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    name: str
    size: int
    data: bytes


def sections(data: bytes) -> dict[str, bytes]:
    """The sections of a little-endian 64-bit ELF file, by name.

    Raises:
        ToolchainError: these bytes are no such file, or it is cut off.
    """
    return {each.name: each.data for each in _sections(data)}


def _sections(data: bytes) -> list[_Section]:
    if len(data) < _ELF_HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        raise ToolchainError("not a 64-bit little-endian ELF file")
    fields = _ELF_HEADER.unpack_from(data)
    offset, size, count, names = fields[6], fields[11], fields[12], fields[13]
    if size != _SECTION.size or offset + size * count > len(data) or names >= count:
        raise ToolchainError("the section table of the ELF file lies outside it: the file is cut off")
    headers = [_SECTION.unpack_from(data, offset + size * index) for index in range(count)]
    table = data[headers[names][4] : headers[names][4] + headers[names][5]]
    found = []
    for header in headers:
        name = table[header[0] : table.find(b"\0", header[0])].decode("ascii", "replace")
        inside = b"" if header[1] == _NOBITS else data[header[4] : header[4] + header[5]]
        if header[1] != _NOBITS and len(inside) != header[5]:
            raise ToolchainError(f"section {name} of the ELF file lies outside it: the file is cut off")
        found.append(_Section(name=name, size=header[5], data=inside))
    return found


def read_cubin(data: bytes) -> Cubin:
    """Read machine code.

    Raises:
        ToolchainError: these bytes are no cubin.
    """
    found = {each.name: each for each in _sections(data)}
    shared = _figures(found)
    kernels = []
    for name, section in found.items():
        if not name.startswith(".text.") or f".nv.info{name.removeprefix('.text')}" not in found:
            continue
        kernel = name.removeprefix(".text.")
        own = found.get(f".nv.shared.{kernel}")
        figures = shared.get(kernel, {})
        kernels.append(
            Kernel(
                name=kernel,
                registers=figures.get(_REGISTERS, 0),
                stack_bytes=figures.get(_FRAME, 0),
                shared_bytes=own.size if own else 0,
                max_threads=_max_threads(found[f".nv.info.{kernel}"].data),
                code=section.data,
            )
        )
    return Cubin(sm=_architecture(data), kernels=tuple(sorted(kernels, key=lambda each: each.name)))


def _architecture(data: bytes) -> int:
    """The flags of the ELF header hold it; from ABI version 8 on one byte further up."""
    flags = int(_ELF_HEADER.unpack_from(data)[7])
    return flags & 0xFF if data[8] < 8 else flags >> 8 & 0xFF


def _records(info: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, offset)
        offset += 4
        if form == _LONG:
            yield attribute, info[offset : offset + length]
            offset += length


def _figures(found: dict[str, _Section]) -> dict[str, dict[int, int]]:
    """Registers and stack frame by kernel, from the records that name a symbol and a value."""
    names = _symbols(found)
    figures: dict[str, dict[int, int]] = {}
    for attribute, value in _records(found[".nv.info"].data if ".nv.info" in found else b""):
        if attribute in (_REGISTERS, _FRAME) and len(value) == 8:
            symbol, number = struct.unpack("<II", value)
            figures.setdefault(names.get(symbol, ""), {})[attribute] = number
    return figures


def _symbols(found: dict[str, _Section]) -> dict[int, str]:
    if ".symtab" not in found or ".strtab" not in found:
        raise ToolchainError("the ELF file has no symbols: it is no cubin")
    table, strings = found[".symtab"].data, found[".strtab"].data
    starts = (struct.unpack_from("<I", table, offset)[0] for offset in range(0, len(table), 24))
    return {index: strings[at : strings.find(b"\0", at)].decode("ascii", "replace") for index, at in enumerate(starts)}


def _max_threads(info: bytes) -> int:
    for attribute, value in _records(info):
        if attribute == _MAX_THREADS and len(value) == 12:
            x, y, z = struct.unpack("<III", value)
            return int(x * y * z)
    return 1024
