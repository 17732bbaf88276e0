"""TensorRT's allocations, from our pool."""

from __future__ import annotations

import contextlib
from typing import Any

from deepstitch.errors import DeviceError
from deepstitch.runtime.engine.device_memory import DeviceMemory

__all__ = ["gpu_allocator"]


def gpu_allocator(module: Any, memory: DeviceMemory) -> Any:
    """An ``IGpuAllocator`` for the runtime of TensorRT 8.6, 10 and 11, which never name a stream to one of Python's.

    So TensorRT may use what it gets on any stream, as it may what cudaMalloc gives: memory changes hands when all work
    is done. Addresses go both ways as numbers, 0 for none, which TensorRT reports as running out of memory.
    """

    class PoolAllocator(module.IGpuAllocator):
        def __init__(self, memory: DeviceMemory) -> None:
            module.IGpuAllocator.__init__(self)
            self._memory = memory  # not the class's, which lives on until the garbage collector finds it

        def allocate(self, size: int, alignment: int, flags: int) -> int:
            if size == 0:
                return 0
            try:
                self._memory.cuda.make_current()
                self._memory.cuda.synchronize()  # earlier work of our stream may still use what the pool hands out
                pointer = self._memory.pool.take(size)
            except DeviceError:  # TensorRT says what it was for
                return 0
            if alignment and pointer % alignment:
                self._memory.pool.give(pointer)
                return 0
            return pointer

        def reallocate(self, address: int, alignment: int, new_size: int) -> int:
            return 0  # TensorRT then allocates anew and copies

        def deallocate(self, memory_: int) -> bool:
            if memory_:
                with contextlib.suppress(DeviceError):  # the work failed, so it is over
                    self._memory.cuda.make_current()
                    self._memory.cuda.synchronize_all()
                self._memory.pool.give(memory_)
            return True

    return PoolAllocator(memory)
