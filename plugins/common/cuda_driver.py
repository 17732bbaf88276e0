"""The little of the CUDA driver API that running an operator needs: memory, copies, events. No torch, no toolkit."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

from deepstitch.plugins.common.schema import PluginError

__all__ = ["CudaDriver"]


class CudaDriver:
    """The primary context of one device, current in the thread that made this."""

    def __init__(self, device: int = 0) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise PluginError(f"there is no NVIDIA driver on this machine ({error})") from None
        self.call("cuInit", 0)
        handle = c_int()
        self.call("cuDeviceGet", byref(handle), device)
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, 256, handle)
        self.name = name.value.decode()
        self.capability = (self._attribute(handle, 75), self._attribute(handle, 76))
        self.multiprocessors = self._attribute(handle, 16)
        context = c_void_p()
        self.call("cuDevicePrimaryCtxRetain", byref(context), handle)
        self.call("cuCtxSetCurrent", context)

    def _attribute(self, device: c_int, number: int) -> int:
        value = c_int()
        self.call("cuDeviceGetAttribute", byref(value), number, device)
        return value.value

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver API.

        Raises:
            PluginError: it does not return success.
        """
        status = getattr(self._cuda, function)(*arguments)
        if status != 0:
            text = c_char_p()
            self._cuda.cuGetErrorString(status, byref(text))
            raise PluginError(f"{function}: CUDA error {status}, {(text.value or b'unknown').decode()}")

    def allocate(self, nbytes: int) -> int:
        """Device memory; at least one byte."""
        pointer = c_uint64()
        self.call("cuMemAlloc_v2", byref(pointer), c_size_t(max(nbytes, 1)))
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give memory back."""
        self.call("cuMemFree_v2", c_uint64(pointer))

    def upload(self, pointer: int, data: int, nbytes: int) -> None:
        """Copy from host memory at the address ``data``."""
        if nbytes:
            self.call("cuMemcpyHtoD_v2", c_uint64(pointer), c_void_p(data), c_size_t(nbytes))

    def download(self, data: int, pointer: int, nbytes: int) -> None:
        """Copy to host memory at the address ``data``, after everything launched before."""
        if nbytes:
            self.call("cuMemcpyDtoH_v2", c_void_p(data), c_uint64(pointer), c_size_t(nbytes))

    def fill(self, pointer: int, byte: int, nbytes: int) -> None:
        """Set every byte."""
        if nbytes:
            self.call("cuMemsetD8_v2", c_uint64(pointer), ctypes.c_ubyte(byte), c_size_t(nbytes))

    def synchronize(self) -> None:
        """Wait for everything launched; an error of a kernel shows here."""
        self.call("cuCtxSynchronize")

    def event(self) -> c_void_p:
        """An event that records a time."""
        handle = c_void_p()
        self.call("cuEventCreate", byref(handle), 0)
        return handle

    def record(self, event: c_void_p) -> None:
        """Put an event into the default stream."""
        self.call("cuEventRecord", event, None)

    def elapsed_ms(self, begin: c_void_p, end: c_void_p) -> float:
        """Milliseconds between two events; waits for the second."""
        self.call("cuEventSynchronize", end)
        elapsed = c_float()
        self.call("cuEventElapsedTime", byref(elapsed), begin, end)
        return elapsed.value
