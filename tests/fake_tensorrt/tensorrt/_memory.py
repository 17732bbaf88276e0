"""Device memory that engines and contexts take from the allocator of the runtime."""

from __future__ import annotations

from typing import Any

from ._api import MAJOR, classes

ALIGNMENT = 256


class Memory:
    """Device memory from the runtime's allocator, given back with the object that holds it."""

    def __init__(self, allocator: Any, nbytes: int) -> None:
        self.allocator, self.address = allocator, 0
        if allocator is not None and nbytes:
            self.address = self._allocate(nbytes) or 0
        self.failed = allocator is not None and nbytes > 0 and not self.address

    def _own(self, name: str) -> bool:
        return getattr(type(self.allocator), name, None) is not getattr(classes["IGpuAllocator"], name, None)

    def _allocate(self, nbytes: int) -> int | None:
        if MAJOR >= 10 and self._own("allocate_async"):
            return self.allocator.allocate_async(nbytes, ALIGNMENT, 0, 0)
        return self.allocator.allocate(nbytes, ALIGNMENT, 0)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            if MAJOR >= 10 and self._own("deallocate_async"):
                self.allocator.deallocate_async(self.address, 0)
            elif self._own("deallocate"):
                self.allocator.deallocate(self.address)
            else:
                self.allocator.free(self.address)
