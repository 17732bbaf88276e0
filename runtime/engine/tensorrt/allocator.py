"""TensorRT's allocations, from our pool."""

from __future__ import annotations

from typing import Any

from deepstitch.errors import DeviceError
from deepstitch.runtime.engine.device_memory import DeviceMemory

__all__ = ["gpu_allocator"]


def gpu_allocator(module: Any, memory: DeviceMemory) -> Any:
    """An ``IGpuAllocator`` for the runtime of TensorRT 8.6, 10 and 11.

    8.6 asks for memory with ``allocate`` and gives it back with ``deallocate``; later versions with their likes of a
    stream. Addresses go both ways as numbers, 0 for none, which TensorRT reports as running out of memory.
    """

    class PoolAllocator(module.IGpuAllocator):
        def __init__(self) -> None:
            module.IGpuAllocator.__init__(self)

        def allocate(self, size: int, alignment: int, flags: int) -> int:
            return self.allocate_async(size, alignment, flags, memory.cuda.stream_handle)

        def allocate_async(self, size: int, alignment: int, flags: int, stream: int) -> int:
            if size == 0:
                return 0
            try:
                memory.cuda.make_current()
                if stream != memory.cuda.stream_handle:
                    memory.cuda.synchronize()  # earlier work of our stream may still use what the pool hands out
                pointer = memory.pool.take(size)
            except DeviceError:  # TensorRT says what it was for
                return 0
            if alignment and pointer % alignment:
                memory.pool.give(pointer)
                return 0
            return pointer

        def reallocate(self, address: int, alignment: int, new_size: int) -> int:
            return 0  # TensorRT then allocates anew and copies

        def deallocate(self, memory_: int) -> bool:
            return self.deallocate_async(memory_, memory.cuda.stream_handle)

        def deallocate_async(self, memory_: int, stream: int) -> bool:
            if memory_:
                memory.pool.give(memory_)
            return True

    return PoolAllocator()
