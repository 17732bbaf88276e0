"""Safetensors files by byte range: read one tensor, or one expert of it, without reading the rest.

The format (safetensors 0.x README): 8 bytes little-endian header length, a JSON header that gives every
tensor's dtype, shape and byte range, then the data with no gaps. The ``safetensors`` package hands out whole
tensors only and hides the offsets, and the exporter needs both slices and offsets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.errors import CheckpointError, did_you_mean

__all__ = ["DTYPE_BYTES", "TensorEntry", "TensorFile", "to_float32"]

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
)
# numpy has no bfloat16; its bits travel as uint16
_NUMPY: Mapping[str, str] = MappingProxyType(
    {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }
)
_MAX_HEADER_BYTES = 100_000_000  # the limit the safetensors package itself sets


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        path: the safetensors file.
        name: tensor name.
        dtype: safetensors dtype name, e.g. ``BF16``.
        shape: sizes of the axes.
        offset: bytes from the start of the file.
        nbytes: length in bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, index: int | None = None) -> npt.NDArray[Any]:
        """Memory-map the tensor, or its slice ``[index]`` along the first axis; bfloat16 comes as its uint16 bits."""
        shape, offset = self.shape, self.offset
        if index is not None:
            shape = self.shape[1:]
            offset += index * (self.nbytes // self.shape[0])
        if math.prod(shape) == 0:
            return np.empty(shape, _NUMPY[self.dtype])
        return np.memmap(self.path, dtype=_NUMPY[self.dtype], mode="r", offset=offset, shape=shape)


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Convert what :meth:`TensorEntry.read` returned for safetensors ``dtype`` into a fresh float32 array."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


class TensorFile(Mapping[str, TensorEntry]):
    """The header of one safetensors file, checked against the file's length."""

    def __init__(self, path: Path, entries: dict[str, TensorEntry], metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self._entries = entries

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Read and check a header.

        Raises:
            CheckpointError: the file is missing, truncated, or its header contradicts itself.
        """
        path = Path(path)
        header, data_start, file_size = _read_header(path)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{path}: damaged safetensors header (__metadata__ is not an object)")
        entries = {name: _entry(path, name, fields, data_start) for name, fields in header.items()}
        _check_ranges(path, entries, data_start, file_size)
        return cls(path, entries, metadata)

    def __getitem__(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor '{name}'{did_you_mean(name, self._entries)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > _MAX_HEADER_BYTES or 8 + length > file_size:
                raise CheckpointError(
                    f"{path}: not a complete safetensors file ({file_size} bytes, header says {length}); "
                    "download it again (is it a Git LFS pointer?)"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header ({error}); download it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged safetensors header (not an object); download it again")
    return header, 8 + length, file_size


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sizes_are_whole = all(type(size) is int and size >= 0 for size in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: damaged safetensors header at tensor '{name}'") from None
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {dtype!r}; supported are {', '.join(DTYPE_BYTES)}")
    if not sizes_are_whole or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(f"{path}: tensor '{name}' says {dtype} {list(shape)} but spans bytes {begin}..{end}")
    return TensorEntry(path, name, dtype, shape, data_start + begin, end - begin)


def _check_ranges(path: Path, entries: dict[str, TensorEntry], data_start: int, file_size: int) -> None:
    position = data_start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            raise CheckpointError(
                f"{path}: tensor '{entry.name}' overlaps another one or leaves a gap; the file is damaged"
            )
        position += entry.nbytes
    if position != file_size:
        what = "truncated" if position > file_size else "longer than its header says"
        raise CheckpointError(f"{path}: {what} ({file_size} bytes, header describes {position}); download it again")
