"""Loggers, host memory, sizes, and what Python classes derive from."""

from __future__ import annotations

import sys
from typing import Any

from ._api import MAJOR, Object, State, native
from ._enums import DataType, Severity


@native
class ILogger(Object):
    Severity = Severity

    def __init__(self) -> None: ...

    def log(self, severity: Severity, msg: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


ILogger.Severity = Severity  # the table has no nested classes


@native
class Logger(ILogger):
    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        self._state = State(min_severity=min_severity)

    @property
    def min_severity(self) -> Severity:
        return self._state.min_severity

    @min_severity.setter
    def min_severity(self, value: Severity) -> None:
        self._state.min_severity = value

    def log(self, severity: Severity, msg: str) -> None:
        if int(severity) <= int(self._state.min_severity):
            print(f"[TRT] [{severity.name[0]}] {msg}", file=sys.stderr)


for _each in Severity:
    setattr(ILogger, _each.name, _each)


def say(logger: ILogger, severity: Severity, text: str) -> None:
    """What TensorRT says through the logger it was given; what is raised there, its bindings drop."""
    try:
        logger.log(severity, text)
    except BaseException as error:
        print(f"[ERROR] Exception caught in log(): {error!r}", file=sys.stderr)


class IHostMemory(bytes):
    """Bytes that TensorRT owns: a buffer with a size and a type, nothing else of ``bytes``."""

    nbytes = property(lambda self: memoryview(self).nbytes)
    dtype = property(lambda self: DataType.INT8)

    def __len__(self) -> int:
        raise TypeError("object of type 'IHostMemory' has no len()")

    def __getitem__(self, _: Any) -> Any:
        raise TypeError("'IHostMemory' object is not subscriptable")


@native
class Dims(Object):
    __slots__ = ()

    def __init__(self, shape: Any = ()) -> None:
        self._state = State(shape=tuple(int(each) for each in shape))

    def __len__(self) -> int:
        return len(self._state.shape)

    def __getitem__(self, arg0: Any) -> Any:
        return self._state.shape[arg0]

    def __iter__(self) -> Any:
        return iter(self._state.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | tuple | Dims) and tuple(other) == self._state.shape

    __hash__ = None

    def __repr__(self) -> str:
        return str(self._state.shape)


if MAJOR >= 10:

    @native
    class IProgressMonitor(Object):
        def __init__(self) -> None: ...

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_start"')

        def phase_finish(self, phase_name: str) -> None:
            raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::phase_finish"')

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise RuntimeError('Tried to call pure virtual function "IProgressMonitor::step_complete"')

    @native
    class IVersionedInterface(Object): ...


class _Allocator(Object if MAJOR < 10 else IVersionedInterface):
    pass


def _missing(name: str) -> Any:
    def refuse(self: Any, **_: Any) -> None:
        raise NotImplementedError(f"{name}() was not overriden. Please provide an implementation for this method.")

    return refuse


@native
class IGpuAllocator(_Allocator):
    def __init__(self) -> None: ...

    allocate = _missing("allocate")
    allocate_async = _missing("allocate_async")
    reallocate = _missing("reallocate")
    deallocate = _missing("deallocate")
    deallocate_async = _missing("deallocate_async")
    free = _missing("free")


if MAJOR >= 10:

    @native
    class IGpuAsyncAllocator(IGpuAllocator):
        def __init__(self) -> None: ...

        allocate_async = _missing("allocate_async")
        deallocate_async = _missing("deallocate_async")
