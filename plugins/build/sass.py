"""Counts instructions in sm_61 machine code. Needs no disassembler: the ones in current releases refuse Pascal.

Code of compute capability 5.x and 6.x is a row of 64-bit words. Every fourth word, from the first on, holds the
scheduling of the three that follow; in those the upper bits are the operation. A loop is what lies between a branch
backwards and its target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Counts", "count"]

_DECODED = range(50, 63)  # architectures with this encoding
# operation -> values of the upper 13 bits
_OPERATIONS: Mapping[str, tuple[int, ...]] = {
    "dp4a": (0x53F8 >> 3, 0x53D8 >> 3),  # IDP with a register and with a constant
    "global_load": (0xEED0 >> 3,),  # LDG
    "local_load": (0xEF40 >> 3,),  # LDL
    "local_store": (0xEF50 >> 3,),  # STL
}
_BRANCH = 0xE24  # BRA, the upper 12 bits
_WIDE = (6, 7)  # the size field of a load of 16 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Instructions of one kernel, and how many of them lie in a loop."""

    instructions: int = 0
    dp4a: int = 0
    dp4a_in_loops: int = 0
    wide_loads: int = 0
    wide_loads_in_loops: int = 0
    narrow_loads: int = 0
    local: int = 0


def count(code: bytes, sm: int) -> Counts | None:
    """Count the instructions that matter here; None for architectures with another encoding."""
    if sm not in _DECODED:
        return None
    words = np.frombuffer(code[: len(code) // 8 * 8], "<u8")
    addresses = np.flatnonzero(np.arange(len(words)) % 4) * 8
    instructions = words[addresses // 8]
    inside = _in_loops(addresses, instructions)
    operation = instructions >> np.uint64(51)
    size = instructions >> np.uint64(48) & np.uint64(7)
    found = {name: np.isin(operation, values) for name, values in _OPERATIONS.items()}
    wide = found["global_load"] & np.isin(size, _WIDE)
    return Counts(
        instructions=len(instructions),
        dp4a=int(found["dp4a"].sum()),
        dp4a_in_loops=int((found["dp4a"] & inside).sum()),
        wide_loads=int(wide.sum()),
        wide_loads_in_loops=int((wide & inside).sum()),
        narrow_loads=int((found["global_load"] & ~wide).sum()),
        local=int((found["local_load"] | found["local_store"]).sum()),
    )


def _in_loops(addresses: npt.NDArray[Any], instructions: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each instruction lies between a branch backwards and its target.

    A branch to itself is the end of the code, not a loop.
    """
    inside = np.zeros(len(addresses), bool)
    for at in np.flatnonzero(instructions >> np.uint64(52) == _BRANCH):
        address, offset = int(addresses[at]), int(instructions[at]) >> 20 & 0xFFFFFF
        target = address + 8 + (offset - (1 << 24) if offset >> 23 else offset)
        if target < address:
            inside |= (addresses >= target) & (addresses <= address)
    return inside
