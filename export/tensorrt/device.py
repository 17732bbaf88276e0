"""How much memory a card has: from the flag, or from the card in this machine."""

from __future__ import annotations

import ctypes
import re

from deepstitch.errors import InputError
from deepstitch.plugins.common.cuda_driver import CudaDriver
from deepstitch.plugins.common.schema import PluginError

__all__ = ["memory_of_card", "parse_memory"]

_UNITS = {"M": 1 << 20, "G": 1 << 30}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([MG])(?:I?B)?", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """Bytes of ``2GB``, ``2 GiB`` or ``1900MB``; as on a card's box, a gigabyte is 2^30 bytes.

    Raises:
        InputError: not such a size.
    """
    found = _MEMORY.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise InputError(f"--memory {text}: write a size such as 2GB or 1900MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def memory_of_card() -> tuple[int, str] | None:
    """Free bytes of the first card and its name; None where there is no driver or no card."""
    try:
        driver = CudaDriver()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        driver.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    except PluginError:
        return None
    return free.value, driver.name
