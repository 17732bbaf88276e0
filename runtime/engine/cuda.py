"""One card through CUDA's driver: its context, one stream, copies, memory and graphs. All of cuda-bindings is here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepstitch.errors import DeviceError, MissingDependency

__all__ = ["Card", "Cuda", "CudaError", "CudaGraph", "OutOfDeviceMemory", "probe_driver"]

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
_OUT_OF_MEMORY = 2
_NAME_BYTES = 128
_NON_BLOCKING_STREAM = 1
_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE


class CudaError(DeviceError):
    """A function of the driver failed.

    Attributes:
        call: its name.
        code: what it returned.
    """

    def __init__(self, call: str, code: int, name: str, remedy: str) -> None:
        super().__init__(f"CUDA: {call} failed with {name} ({code}); {remedy}")
        self.call = call
        self.code = code


class OutOfDeviceMemory(DeviceError):
    """The card has no memory of the size asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card is.

    Attributes:
        ordinal: its number on this machine.
        name: as the driver has it.
        sm: compute capability without the dot.
        total_bytes: of its memory.
    """

    ordinal: int
    name: str
    sm: int
    total_bytes: int


def probe_driver() -> None:
    """Check that there is a driver and a card, before libraries that crash where there is none are asked.

    Raises:
        DeviceError: there is not.
    """
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise DeviceError(
            f"there is no NVIDIA driver here ({error}); engines for a card need one: install the driver, or run a "
            "bundle exported with --target ort-cpu"
        ) from None
    # code that is loaded when it is first used: several hundred megabytes less of a small card's memory
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    code = driver.cuInit(0)
    if code == _NO_DEVICE:
        raise DeviceError(
            "the NVIDIA driver finds no card (cuInit: 100); see what 'nvidia-smi' says, and whether "
            "CUDA_VISIBLE_DEVICES hides it"
        )
    if code:
        raise DeviceError(f"the NVIDIA driver does not start (cuInit: {code}); see what 'nvidia-smi' says")


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise MissingDependency("cuda-bindings", "cuda", "running engines on a card") from None
    return driver


class CudaGraph:
    """Work of a stream, recorded once; a launch does all of it again."""

    def __init__(self, cuda: Cuda, ready: Any) -> None:
        self._cuda = cuda
        self._ready = ready

    def launch(self) -> None:
        """Put the recorded work into the stream."""
        self._cuda.call("cuGraphLaunch", self._ready, self._cuda.stream)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the process the driver may be gone
            self._cuda.call("cuGraphExecDestroy", self._ready)


class Cuda:
    """A card, its primary context, which libraries above the driver share, and one stream.

    All work goes through the one stream, so that what was given first is done first, and memory that is given back can
    be taken again at once.

    Attributes:
        card: which one.
        stream: for calls of the driver; ``stream_handle`` for those of other libraries.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Start the driver.

        Raises:
            MissingDependency: cuda-bindings is not installed.
            DeviceError: there is no driver, or no such card.
        """
        probe_driver()
        self._driver = _bindings()
        self._local = threading.local()
        self.call("cuInit", 0)
        device = self.call("cuDeviceGet", ordinal)
        self._context = self.call("cuDevicePrimaryCtxRetain", device)
        self.make_current()
        self.card = self._card(ordinal, device)
        self.stream = self.call("cuStreamCreate", _NON_BLOCKING_STREAM)

    @property
    def stream_handle(self) -> int:
        """Address of the stream."""
        return int(self.stream)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver; returns its only result, or None.

        Raises:
            CudaError: it fails.
            OutOfDeviceMemory: likewise, for lack of memory.
        """
        code, *results = getattr(self._driver, name)(*arguments)
        if int(code):
            raise self._failure(name, int(code))
        return results[0] if results else None

    def make_current(self) -> None:
        """Give the calling thread the context; threads other than that which made this need it before their work."""
        if not getattr(self._local, "current", False):
            self.call("cuCtxSetCurrent", self._context)
            self._local.current = True

    def free_bytes(self) -> int:
        """Memory of the card that nobody has, of this process or others."""
        code, free, _ = self._driver.cuMemGetInfo()
        if int(code):
            raise self._failure("cuMemGetInfo", int(code))
        return int(free)

    def allocate(self, nbytes: int) -> int:
        """Address of new memory on the card.

        Raises:
            OutOfDeviceMemory: there is not as much in one piece.
        """
        return int(self.call("cuMemAlloc", nbytes))

    def release(self, pointer: int) -> None:
        """Give memory back, after all work."""
        self.make_current()
        self.call("cuMemFree", pointer)

    def allocate_host(self, nbytes: int) -> int:
        """Address of new page-locked memory of the host, which the card reads and writes by itself."""
        return int(self.call("cuMemHostAlloc", nbytes, 0))

    def release_host(self, pointer: int) -> None:
        """Give page-locked memory back, after all work."""
        self.make_current()
        self.call("cuMemFreeHost", pointer)

    def upload(self, target: int, source: int, nbytes: int) -> None:
        """Copy from the host. Page-locked memory must stay as it is until the stream has come to this."""
        self.call("cuMemcpyHtoDAsync", target, source, nbytes, self.stream)

    def download(self, target: int, source: int, nbytes: int) -> None:
        """Copy to the host; :meth:`synchronize` before reading."""
        self.call("cuMemcpyDtoHAsync", target, source, nbytes, self.stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the card."""
        self.call("cuMemcpyDtoDAsync", target, source, nbytes, self.stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Copy ``height`` rows of ``width`` bytes within the card; pitches are bytes from one row to the next."""
        rows = self._driver.CUDA_MEMCPY2D()
        rows.srcMemoryType = rows.dstMemoryType = self._driver.CUmemorytype(_DEVICE_MEMORY)
        rows.srcDevice, rows.srcPitch = source, source_pitch
        rows.dstDevice, rows.dstPitch = target, target_pitch
        rows.WidthInBytes, rows.Height = width, height
        self.call("cuMemcpy2DAsync", rows, self.stream)

    def fill(self, target: int, byte: int, nbytes: int) -> None:
        """Set every byte."""
        self.call("cuMemsetD8Async", target, byte, nbytes, self.stream)

    def synchronize(self) -> None:
        """Wait until all work is done.

        Raises:
            CudaError: some of it failed.
        """
        self.call("cuStreamSynchronize", self.stream)

    def synchronize_all(self) -> None:
        """Likewise, for the streams of other libraries too."""
        self.call("cuCtxSynchronize")

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[CudaGraph]]:
        """Record what goes into the stream instead of doing it; the list holds the graph when the block has ended.

        Raises:
            CudaError: something in the block cannot be recorded.
        """
        graphs: list[CudaGraph] = []
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self.stream, mode)
        try:
            yield graphs
        except BaseException:
            self._driver.cuStreamEndCapture(self.stream)  # the failure inside is the one to report
            raise
        recorded = self.call("cuStreamEndCapture", self.stream)
        try:
            graphs.append(CudaGraph(self, self.call("cuGraphInstantiate", recorded, 0)))
        finally:
            self.call("cuGraphDestroy", recorded)

    def _card(self, ordinal: int, device: Any) -> Card:
        kinds = self._driver.CUdevice_attribute
        major, minor = (
            self.call("cuDeviceGetAttribute", kind, device)
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = bytes(self.call("cuDeviceGetName", _NAME_BYTES, device)).split(b"\0")[0].decode()
        total = int(self.call("cuDeviceTotalMem", device))
        return Card(ordinal=ordinal, name=name, sm=10 * int(major) + int(minor), total_bytes=total)

    def _failure(self, call: str, code: int) -> DeviceError:
        if code == _OUT_OF_MEMORY:
            return OutOfDeviceMemory(f"CUDA: {call}: out of memory of the card; stop other programs that use it")
        found, name = self._driver.cuGetErrorName(self._driver.CUresult(code))
        text = name.decode() if not int(found) and name else "an unknown error"
        remedy = "look at the kernel's log ('dmesg') and whether 'nvidia-smi' still answers, then start again"
        return CudaError(call, code, text, remedy)
