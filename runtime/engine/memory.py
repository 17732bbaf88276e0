"""Where the tensors of an engine lie: arrays of the host, or of a device, and what is done with both alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "HOST",
    "Array",
    "DeviceArray",
    "DeviceOperations",
    "HostMemory",
    "Memory",
    "RowPieces",
    "Tensor",
    "to_host",
]

Array = npt.NDArray[Any]
Index = npt.NDArray[np.integer[Any]]

_ALIGNMENT = 64  # one AVX-512 register, one cache line


class DeviceOperations(Protocol):
    """What a device array asks of the memory it came from."""

    def duplicate(self, array: DeviceArray) -> DeviceArray:
        """The same values in memory of their own."""
        ...

    def download(self, array: DeviceArray) -> Array:
        """The values on the host, after all work that was given to the device before."""
        ...


class DeviceArray:
    """A C-contiguous array in the memory of a device, or some of its rows.

    Attributes:
        pointer: address on the device.
        shape: as numpy's.
        dtype: likewise.
        memory: where it was allocated.
        owner: kept alive as long as this is; gives the memory back when the last array on it is gone.
    """

    __slots__ = ("dtype", "memory", "owner", "pointer", "shape")

    def __init__(
        self, pointer: int, shape: Sequence[int], dtype: npt.DTypeLike, *, memory: DeviceOperations, owner: object
    ) -> None:
        self.pointer = pointer
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.memory = memory
        self.owner = owner

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> DeviceArray:
        """A row, or rows that follow each other; nothing is copied."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"rows of a device array follow each other, a step of {step} does not")
            shape = (max(stop - start, 0), *self.shape[1:])
        else:
            start, shape = range(len(self))[index], self.shape[1:]
        pointer = self.pointer + start * math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(pointer, shape, self.dtype, memory=self.memory, owner=self.owner)

    def copy(self) -> DeviceArray:
        """The same values in memory of their own."""
        return self.memory.duplicate(self)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype}{list(self.shape)} at {self.pointer:#x})"


Tensor: TypeAlias = Array | DeviceArray


class RowPieces:
    """Rows that lie in several places, in order: of the host, of a device, or some here and some there.

    Attributes:
        pieces: ``(n_i, …)`` each; none is empty.
    """

    __slots__ = ("_starts", "pieces")

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces: tuple[Tensor, ...] = tuple(each for each in pieces if len(each))
        self._starts: list[int] = np.cumsum([0, *map(len, self.pieces)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: slice | Index) -> RowPieces:
        """Rows by a range, or by their numbers; what follows each other stays in one piece."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return RowPieces(list(self._range(start, stop)))
        breaks = np.flatnonzero(np.diff(index) != 1) + 1
        runs = np.split(index, breaks) if len(index) else []
        return RowPieces([piece for run in runs for piece in self._range(int(run[0]), int(run[-1]) + 1)])

    def _range(self, start: int, stop: int) -> Iterator[Tensor]:
        for piece, begin in zip(self.pieces, self._starts, strict=False):
            low, high = max(start, begin), min(stop, begin + len(piece))
            if low < high:
                yield piece[low - begin : high - begin]


class Memory(Protocol):
    """Where an engine's graphs read and write."""

    def zeros(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Tensor:
        """Memory a graph can be bound to."""
        ...

    def staging(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Zeros of the host, for outputs that are read there."""
        ...

    def write(self, target: Tensor, source: Tensor | RowPieces) -> None:
        """Copy ``source`` to ``target``, of the same shape."""
        ...

    def copy_tokens(self, target: Tensor, source: Tensor, start: int, stop: int) -> None:
        """Copy the places ``start..stop-1`` of the third axis of ``[rows, heads, capacity, …]``.

        Capacities may differ; the other sizes are the same.
        """
        ...


class HostMemory:
    """numpy's arrays."""

    def zeros(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Aligned; pages appear when they are written."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        raw = np.zeros(size + _ALIGNMENT, np.uint8)  # calloc
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + size].view(kind).reshape(shape)

    def staging(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """See :meth:`Memory.staging`."""
        return np.zeros(shape, dtype)

    def write(self, target: Tensor, source: Tensor | RowPieces) -> None:
        """See :meth:`Memory.write`."""
        if not isinstance(target, np.ndarray) or not isinstance(source, np.ndarray):
            raise TypeError(f"{source!r} cannot be written to {target!r} without a device")
        target[:] = source

    def copy_tokens(self, target: Tensor, source: Tensor, start: int, stop: int) -> None:
        """See :meth:`Memory.copy_tokens`."""
        if not isinstance(target, np.ndarray) or not isinstance(source, np.ndarray):
            raise TypeError(f"{source!r} cannot be copied to {target!r} without a device")
        target[:, :, start:stop] = source[:, :, start:stop]


HOST = HostMemory()


def to_host(tensor: Tensor | RowPieces) -> Array:
    """The values as an array of numpy; those of a device, and rows in pieces, are copied."""
    if isinstance(tensor, RowPieces):
        return np.concatenate([to_host(each) for each in tensor.pieces])
    return tensor.memory.download(tensor) if isinstance(tensor, DeviceArray) else tensor
