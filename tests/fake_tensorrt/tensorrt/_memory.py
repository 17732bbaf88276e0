"""Device memory that engines and contexts take from the allocator of the runtime."""

from __future__ import annotations

from typing import Any

from ._api import classes

ALIGNMENT = 256


class Memory:
    """Device memory from the runtime's allocator, given back with the object that holds it.

    Of an ``IGpuAllocator`` in Python no version calls ``allocate_async`` or ``deallocate_async``: the bindings pass on
    the calls without a stream alone.
    """

    def __init__(self, allocator: Any, nbytes: int) -> None:
        self.allocator, self.address = allocator, 0
        if allocator is not None and nbytes:
            self.address = allocator.allocate(nbytes, ALIGNMENT, 0) or 0
        self.failed = allocator is not None and nbytes > 0 and not self.address

    def _own(self, name: str) -> bool:
        return getattr(type(self.allocator), name, None) is not getattr(classes["IGpuAllocator"], name, None)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            if self._own("deallocate"):
                self.allocator.deallocate(self.address)
            else:
                self.allocator.free(self.address)
