"""Memory of a card: a pool that keeps what is given back, and the tensors on it."""

from __future__ import annotations

import contextlib
import math
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from deepstitch.runtime.engine.cuda import Cuda, OutOfDeviceMemory
from deepstitch.runtime.engine.memory import Array, DeviceArray, RowPieces, Tensor

__all__ = ["DeviceMemory", "Pool"]

# The driver hands out pages of 2 MiB and parts of them.
_PAGE = 2 << 20
_SMALL = 512
_MIB = 1 << 20
# A block serves a smaller request if it is not larger than this many times the request.
_SLACK = 1.25


class Pool:
    """Blocks of memory, kept for the next request of about their size; TensorRT asks for them from threads of its own.

    Attributes:
        reserved: bytes taken from the system, in use or not.
        peak: most bytes ever reserved.
    """

    def __init__(self, allocate: Callable[[int], int], release: Callable[[int], None]) -> None:
        self._allocate = allocate
        self._release = release
        self._sizes: dict[int, int] = {}  # of all blocks, by address
        self._free: list[tuple[int, int]] = []  # (size, address), ascending
        self._given: deque[int] = deque()  # given back, and not yet among the free ones
        self._in_use = 0
        self._lock = threading.Lock()
        self.reserved = 0
        self.peak = 0

    def __del__(self) -> None:
        """Every block knows its pool, so all have been given back."""
        with contextlib.suppress(Exception):  # at the end of the process the driver may be gone
            self._trim()

    @property
    def in_use(self) -> int:
        """Bytes handed out."""
        with self._lock:
            self._settle()
            return self._in_use

    def take(self, nbytes: int) -> int:
        """Address of at least ``nbytes``; the contents are whatever was there.

        Raises:
            OutOfDeviceMemory: not even after giving back to the system all that is not in use.
        """
        size = _rounded(nbytes)
        with self._lock:
            self._settle()
            place = bisect_left(self._free, (size, 0))
            if place < len(self._free) and self._free[place][0] <= max(size * _SLACK, _SMALL):
                found, pointer = self._free.pop(place)
            else:
                found, pointer = size, self._fresh(size)
                self._sizes[pointer] = size
                self.reserved += size
                self.peak = max(self.peak, self.reserved)
            self._in_use += found
        return pointer

    def give(self, pointer: int) -> None:
        """Take a block back; work that was given before may still use it, later work may take it.

        The garbage collector calls this wherever it comes to run, also inside the other methods: so it only makes a
        note, for which no lock is needed.
        """
        self._given.append(pointer)

    def holds(self, pointer: int, nbytes: int) -> bool:
        """Whether all these bytes are of one block."""
        with self._lock:
            return any(begin <= pointer and pointer + nbytes <= begin + size for begin, size in self._sizes.items())

    def _settle(self) -> None:
        """Put what was given back among the free blocks."""
        while self._given:
            pointer = self._given.popleft()
            size = self._sizes[pointer]
            insort(self._free, (size, pointer))
            self._in_use -= size

    def _trim(self) -> None:
        """Give all blocks that are not in use back to the system."""
        self._settle()
        while self._free:
            size, pointer = self._free.pop()
            del self._sizes[pointer]
            self.reserved -= size
            self._release(pointer)

    def _fresh(self, size: int) -> int:
        try:
            return self._allocate(size)
        except OutOfDeviceMemory:
            if not self._free and not self._given:
                raise
        self._trim()
        return self._allocate(size)


class DeviceMemory:
    """Tensors of one card; implements :class:`deepstitch.runtime.engine.memory.Memory`.

    Attributes:
        cuda: the card.
        pool: its memory.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.pool = Pool(cuda.allocate, cuda.release)
        self._host_pool = Pool(cuda.allocate_host, cuda.release_host)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> DeviceArray:
        """A tensor of whatever was there.

        Raises:
            OutOfDeviceMemory: the card does not have as much.
        """
        array = DeviceArray(0, shape, dtype, memory=self, owner=None)
        self.cuda.make_current()
        try:
            block = _Block(self.pool, array.nbytes)
        except OutOfDeviceMemory:
            raise OutOfDeviceMemory(
                f"the card ({self.cuda.card.name}) has no {_readable(array.nbytes)} for a tensor: "
                f"{_readable(self.cuda.free_bytes())} of {_readable(self.cuda.card.total_bytes)} are free, this "
                f"program has {_readable(self.pool.reserved)}; stop other programs on the card, or build engines for "
                "less with --max-context, --batch or --image-patches"
            ) from None
        array.pointer, array.owner = block.pointer, block
        return array

    def zeros(self, shape: Sequence[int], dtype: npt.DTypeLike) -> DeviceArray:
        """See :meth:`deepstitch.runtime.engine.memory.Memory.zeros`."""
        array = self.empty(shape, dtype)
        if array.nbytes:
            self.cuda.fill(array.pointer, 0, array.nbytes)
        return array

    def staging(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Page-locked zeros, which go back to a pool with the last array on them."""
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        self.cuda.make_current()
        array = np.asarray(_HostBlock(self._host_pool, nbytes)).view(kind).reshape(shape)
        array[...] = 0
        return array

    def is_staging(self, array: Array) -> bool:
        """Whether the card can read and write this memory of the host by itself."""
        return array.flags.c_contiguous and self._host_pool.holds(array.ctypes.data, array.nbytes)

    def write(self, target: Tensor, source: Tensor | RowPieces) -> None:
        """See :meth:`deepstitch.runtime.engine.memory.Memory.write`; ``target`` may lie on the host only if both do."""
        pieces = source.pieces if isinstance(source, RowPieces) else (source,)
        start = 0
        for piece in pieces:
            self._write_one(target[start : start + len(piece)], piece)
            start += len(piece)

    def _write_one(self, target: Tensor, source: Tensor) -> None:
        if isinstance(target, np.ndarray):
            if isinstance(source, DeviceArray):
                raise TypeError("a tensor of the card is read with to_host")
            target[:] = source
            return
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(f"{source!r} does not fit {target!r}")
        if target.nbytes == 0:
            return
        if isinstance(source, DeviceArray):
            self.cuda.copy(target.pointer, source.pointer, source.nbytes)
        else:
            whole = np.ascontiguousarray(source)
            if self.is_staging(whole):
                whole = whole.copy()  # what is not page-locked is read before the call returns
            self.cuda.upload(target.pointer, whole.ctypes.data, whole.nbytes)

    def copy_tokens(self, target: Tensor, source: Tensor, start: int, stop: int) -> None:
        """See :meth:`deepstitch.runtime.engine.memory.Memory.copy_tokens`."""
        if not isinstance(target, DeviceArray) or not isinstance(source, DeviceArray):
            raise TypeError(f"{source!r} cannot be copied to {target!r} within the card")
        if start >= stop:
            return
        rows, heads, target_capacity, *rest = target.shape
        token = math.prod(rest) * target.dtype.itemsize
        self.cuda.copy_rows(
            target.pointer + start * token,
            target_capacity * token,
            source.pointer + start * token,
            source.shape[2] * token,
            (stop - start) * token,
            rows * heads,
        )

    def duplicate(self, array: DeviceArray) -> DeviceArray:
        """See :meth:`deepstitch.runtime.engine.memory.DeviceOperations.duplicate`."""
        copy = self.empty(array.shape, array.dtype)
        if array.nbytes:
            self.cuda.copy(copy.pointer, array.pointer, array.nbytes)
        return copy

    def download(self, array: DeviceArray) -> Array:
        """See :meth:`deepstitch.runtime.engine.memory.DeviceOperations.download`."""
        values = np.empty(array.shape, array.dtype)
        if array.nbytes:
            self.cuda.make_current()
            self.cuda.download(values.ctypes.data, array.pointer, array.nbytes)
        self.cuda.synchronize()
        return values


class _Block:
    """Memory of a pool, given back when nobody has it any more."""

    def __init__(self, pool: Pool, nbytes: int) -> None:
        self.pointer = pool.take(nbytes)
        self._pool = pool

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.give(self.pointer)


class _HostBlock(_Block):
    """Likewise, as numpy takes it."""

    def __init__(self, pool: Pool, nbytes: int) -> None:
        super().__init__(pool, nbytes)
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (self.pointer, False)}


def _rounded(nbytes: int) -> int:
    unit = _PAGE if nbytes > _MIB else _SMALL
    return max(-(-nbytes // unit), 1) * unit


def _readable(nbytes: int) -> str:
    return f"{nbytes / _MIB:,.1f} MiB" if nbytes < 1 << 30 else f"{nbytes / (1 << 30):.2f} GiB"
