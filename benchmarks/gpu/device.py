"""A card: how long work takes on it, and what it can do at most."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from deepstitch.plugins.build import fatbin, nvrtc
from deepstitch.plugins.common.cuda_driver import CudaDriver

__all__ = ["Card", "ceilings_fatbin"]

_SOURCE = Path(__file__).with_name("ceilings.cuh")
_THREADS, _CHAINS, _UNROLLED = 256, 8, 64
_L2_BYTES, _CLOCK_KHZ, _MEMORY_CLOCK_KHZ, _BUS_BITS = 38, 13, 36, 37  # attributes of a device


class _Params(ctypes.Structure):
    _fields_ = (
        ("source", c_void_p),
        ("target", c_void_p),
        ("vectors", c_int64),
        ("rounds", c_int32),
        ("seed", c_int32),
    )


def ceilings_fatbin(sms: tuple[int, ...]) -> bytes:
    """The measuring kernels, for a machine that has no NVRTC."""
    cubins = {sm: nvrtc.compile_source(_SOURCE, f"sm_{sm}").image for sm in sms}
    return fatbin.pack("ceilings", cubins, {61: nvrtc.compile_source(_SOURCE, "compute_61").image})


class Card:
    """One GPU with its primary context current.

    Args:
        driver: of that GPU.
        code: the fatbin of the measuring kernels.
        megabytes: of each buffer that bandwidth is measured with.
        seconds: spent on each measurement, about.
    """

    def __init__(self, driver: CudaDriver, code: bytes, *, megabytes: int = 512, seconds: float = 0.4) -> None:
        self.driver = driver
        self.seconds = seconds
        self.bytes = megabytes << 20
        self.l2_bytes = self._attribute(_L2_BYTES)
        self._code = ctypes.create_string_buffer(code, len(code))  # the driver may read it until the end
        self._module = c_void_p()
        driver.call("cuModuleLoadData", byref(self._module), self._code)
        self._buffers = [driver.allocate(self.bytes) for _ in range(2)]
        # Twice the cache, so that nothing of it is left
        self._flush = min(max(2 * self.l2_bytes, 64 << 20), self.bytes)
        self._begin, self._end = driver.event(), driver.event()
        self._flush_ms = self._elapsed(lambda: driver.fill(self._buffers[0], 0, self._flush))

    def _attribute(self, number: int) -> int:
        value = c_int()
        self.driver.call("cuDeviceGetAttribute", byref(value), number, 0)
        return value.value

    def describe(self) -> dict[str, Any]:
        """Name and figures of the card and its driver."""
        version = c_int()
        self.driver.call("cuDriverGetVersion", byref(version))
        return {
            "name": self.driver.name,
            "capability": ".".join(map(str, self.driver.capability)),
            "multiprocessors": self.driver.multiprocessors,
            "clock_mhz": self._attribute(_CLOCK_KHZ) / 1e3,
            "memory_clock_mhz": self._attribute(_MEMORY_CLOCK_KHZ) / 1e3,
            "memory_bus_bits": self._attribute(_BUS_BITS),
            "l2_bytes": self.l2_bytes,
            "cuda_of_driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
        }

    def _elapsed(self, function: Callable[[], object]) -> float:
        self.driver.record(self._begin)
        function()
        self.driver.record(self._end)
        return self.driver.elapsed_ms(self._begin, self._end)

    def time(self, function: Callable[[], object], *, flush: bool = True) -> dict[str, float]:
        """Milliseconds on the GPU of what a function launches, again and again.

        Before each call the L2 cache is overwritten, often enough that the GPU is still busy with that when the last
        kernel has been launched: the time to launch is not part of the result, unless it is longer than 50 ms.

        Returns:
            median, min and max in milliseconds, ``runs``, and ``launch_ms``, the host's time for one call.
        """
        for _ in range(2):
            function()
        self.driver.synchronize()
        start = time.perf_counter()
        function()
        launch = (time.perf_counter() - start) * 1e3
        self.driver.synchronize()
        whole = (time.perf_counter() - start) * 1e3
        fills = min(int(2 * launch / max(self._flush_ms, 1e-3)) + 1, 1 + int(100 / max(self._flush_ms, 1e-3)))
        runs = max(5, min(200, int(self.seconds * 1e3 / (whole + fills * self._flush_ms))))
        found = []
        for _ in range(runs):
            for _ in range(fills if flush else 0):
                self.driver.fill(self._buffers[0], 0, self._flush)
            found.append(self._elapsed(function))
        spread = {"median": statistics.median(found), "min": min(found), "max": max(found)}
        return {**spread, "runs": runs, "launch_ms": launch}

    def _launch(self, name: str, blocks: int, params: _Params) -> Callable[[], None]:
        function, size = c_void_p(), c_size_t(ctypes.sizeof(params))
        self.driver.call("cuModuleGetFunction", byref(function), self._module, f"ceilings_{name}".encode())
        pointer = ctypes.cast(byref(params), c_void_p)
        extra = (c_void_p * 5)(1, pointer, 2, ctypes.cast(byref(size), c_void_p), None)

        def launch() -> None:
            assert params and size  # kept alive: the driver reads them
            grid = (c_int(blocks), c_int(1), c_int(1), c_int(_THREADS), c_int(1), c_int(1))
            self.driver.call("cuLaunchKernel", function, *grid, c_int(0), None, None, extra)

        return launch

    def ceilings(self, rounds: int = 256) -> dict[str, float]:
        """Bytes per second copied (counted twice) and read, fp32 and dp4a operations per second (a fused one is two).

        dp4a counts eight: four products and four sums.
        """
        source, target = self._buffers
        params = _Params(source, target, self.bytes // 16, rounds, 3)
        blocks = self.driver.multiprocessors * 8
        per_call = blocks * _THREADS * rounds * _CHAINS * _UNROLLED
        amounts = {"copy": 2 * self.bytes, "read": self.bytes, "float": 2 * per_call, "dp4a": 8 * per_call}
        found = {}
        for name, amount in amounts.items():
            timed = self.time(self._launch(name, blocks, params), flush=name in ("copy", "read"))
            found[name] = amount / (timed["median"] / 1e3)
        copied = self.time(self._copy)
        names = {"copy": "copy_bytes_per_second", "read": "read_bytes_per_second"}
        names |= {"float": "float_ops_per_second", "dp4a": "dp4a_ops_per_second"}
        best = max(found["copy"], 2 * self.bytes / (copied["median"] / 1e3))
        return {names[name]: value for name, value in (found | {"copy": best}).items()}

    def _copy(self) -> None:
        source, target = (ctypes.c_uint64(each) for each in self._buffers)
        self.driver.call("cuMemcpyDtoDAsync_v2", target, source, c_size_t(self.bytes), None)

    def close(self) -> None:
        """Give the buffers back."""
        while self._buffers:
            self.driver.free(self._buffers.pop())
