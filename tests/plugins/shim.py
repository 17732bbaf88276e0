"""Builds and calls the kernels of ``shim_kernels.cuh``. As a program, it launches one (under sanitizers)."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "shim_kernels.cuh", HERE / "shim_launch.cpp")


class _Params(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("i", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("o", ctypes.c_void_p),
        ("n", ctypes.c_int32),
    )


class Shim:
    """A library with the test kernels."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.deepstitch_allocate.restype = ctypes.c_void_p

    def buffer(self, array: Any) -> int:
        """A copy of an array in memory of exactly its size."""
        pointer = self.library.deepstitch_allocate(ctypes.c_size_t(array.nbytes))
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)
        return pointer

    def launch(
        self,
        kernel: str,
        *,
        x: Any = (),
        i: Any = (),
        y: int = 0,
        o: int = 0,
        n: int = 0,
        grid: Sequence[int] = (1, 1, 1),
        block: Sequence[int] = (32, 1, 1),
        shared: int = 0,
        seed: int = 0,
        nbytes: int = ctypes.sizeof(_Params),
    ) -> tuple[Any, Any]:
        """Outputs ``y`` (float32) and ``o`` (int32) of that many elements.

        Raises:
            RuntimeError: the launch failed; the message is that of the shim.
        """
        arrays = [np.asarray(x, np.float32), np.asarray(i, np.int32), np.zeros(y, np.float32), np.zeros(o, np.int32)]
        pointers = [self.buffer(each) for each in arrays]
        message = ctypes.create_string_buffer(1024)
        failed = self.library.shim_launch(
            kernel.encode(),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*block),
            ctypes.c_size_t(shared),
            ctypes.byref(_Params(*pointers, n)),
            ctypes.c_size_t(nbytes),
            ctypes.c_uint64(seed),
            message,
            ctypes.c_size_t(1024),
        )
        for array, pointer in zip(arrays[2:], pointers[2:], strict=True):
            ctypes.memmove(array.ctypes.data, pointer, array.nbytes)
        for pointer in pointers:
            self.library.deepstitch_free(ctypes.c_void_p(pointer))
        if failed:
            raise RuntimeError(message.value.decode())
        return arrays[2], arrays[3]


if __name__ == "__main__":
    Shim(Path(sys.argv[1])).launch(sys.argv[2], **json.loads(sys.argv[3]))
    print("finished")
