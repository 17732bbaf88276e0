"""Execution contexts: sizes and addresses for one run after the other, which ONNX Runtime computes."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._api import MAJOR, Object, fails, make, native, record
from ._base import Severity, say
from ._enums import NUMPY_NAMES, data_type
from ._graph import Graph
from ._memory import ALIGNMENT, Memory
from ._plan import Tensor
from ._stream import enqueue, is_capturing


def tensor_of(engine: Object, name: str) -> Tensor | None:
    return next((each for each in engine._state.plan.tensors if each.name == name), None)


def new_context(engine: Object, own: bool) -> IExecutionContext | None:
    state = engine._state
    memory = Memory(state.allocator, state.plan.device_memory) if own else None
    if fails("context-memory") or (memory is not None and memory.failed):
        say(state.logger, Severity.ERROR, "Error Code 2: OutOfMemory (no further information)")
        return None
    # The first context of 8.6 has the first profile, every other has to choose one that nobody has.
    profile = 0 if MAJOR >= 10 or not state.contexts else -1
    made = make(
        IExecutionContext,
        engine=engine,
        profile=profile,
        shapes={},
        addresses={},
        memory=memory,
        device_memory=0 if not own else -1,
        run_before=set(),
        name="",
        auxiliary=[],
    )
    state.contexts.append(weakref.ref(made))
    return made


@native
class IExecutionContext(Object):
    @property
    def engine(self) -> Object:
        return self._state.engine

    @property
    def name(self) -> str:
        return self._state.name

    @name.setter
    def name(self, value: str) -> None:
        self._state.name = value

    @property
    def active_optimization_profile(self) -> int:
        return self._state.profile

    @active_optimization_profile.setter
    def active_optimization_profile(self, value: int) -> None:
        _choose_profile(self, value)

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not _missing_shapes(self)

    @property
    def device_memory(self) -> int:
        return self._state.device_memory

    @device_memory.setter
    def device_memory(self, value: int) -> None:
        self._state.device_memory = value

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self._state.engine._state.plan.device_memory // (self._state.profile + 1):
            return self._say("Error Code 3: API Usage Error (setDeviceMemoryV2: the memory is too small)")
        self._state.device_memory = memory
        return None

    def update_device_memory_size_for_shapes(self) -> int:
        return self._state.engine._state.plan.device_memory

    def set_aux_streams(self, aux_streams: list[int]) -> None:
        self._state.auxiliary = list(aux_streams)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return _choose_profile(self, profile_index)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        engine, given = self._state.engine, tuple(int(axis) for axis in shape)
        tensor = tensor_of(engine, name)
        if tensor is None or not tensor.is_input:
            return self._say(f"Error Code 3: API Usage Error (setInputShape: there is no input {name})")
        if self._state.profile < 0:
            return self._say("Error Code 3: API Usage Error (setInputShape: no optimization profile is chosen)")
        low, _, high = profile_shape(engine, tensor, self._state.profile)
        if len(low) != len(given) or any(not a <= b <= c for a, b, c in zip(low, given, high, strict=True)):
            return self._say(
                f"Error Code 3: API Usage Error (Parameter check failed, condition: engineDims.d[i] == dims.d[i]. "
                f"Supplied binding dimension {list(given)} of {name} is not in the range of [{low}, {high}] of "
                f"optimization profile {self._state.profile}.)"
            )
        self._state.shapes[name] = given
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        tensor = tensor_of(self._state.engine, name)
        return () if tensor is None else _current_shape(self, tensor)

    def infer_shapes(self) -> list[str]:
        return _missing_shapes(self)

    def get_max_output_size(self, name: str) -> int:
        tensor = tensor_of(self._state.engine, name)
        return -1 if tensor is None else _nbytes(tensor, _current_shape(self, tensor))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if tensor_of(self._state.engine, name) is None:
            return self._say(f"Error Code 3: API Usage Error (setTensorAddress: there is no tensor {name})")
        if memory % ALIGNMENT and memory:
            return self._say(f"Error Code 3: API Usage Error ({name}: address is not aligned to {ALIGNMENT} bytes)")
        self._state.addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._state.addresses.get(name, 0)

    def execute_async_v3(self, stream_handle: int) -> bool:
        problem = _not_ready(self, stream_handle)
        if problem:
            return self._say(problem)
        engine, shapes = self._state.engine, _shapes(self)
        job = _Job(graph=engine._state.graph, shapes=shapes, addresses=dict(self._state.addresses))
        self._state.run_before.add(_key(self))
        return enqueue(stream_handle, job.run) == 0

    def _say(self, text: str) -> bool:
        say(self._state.engine._state.logger, Severity.ERROR, text)
        return False


def _choose_profile(context: IExecutionContext, index: int) -> bool:
    state, engine = context._state, context._state.engine._state
    if not 0 <= index < max(len(engine.plan.profiles), 1):
        return context._say(f"Error Code 3: API Usage Error (setOptimizationProfileAsync: there is no {index})")
    others = [each() for each in engine.contexts if each() is not None and each() is not context]
    if MAJOR < 10 and any(each._state.profile == index for each in others):
        return context._say(
            f"Error Code 3: API Usage Error (Profile {index} has been chosen for another IExecutionContext. Use "
            "another profileIndex or destroy the IExecutionContext that uses it.)"
        )
    state.profile, state.shapes = index, {}  # the sizes have to be given again
    return True


def _missing_shapes(context: IExecutionContext) -> list[str]:
    tensors = context._state.engine._state.plan.tensors
    dynamic = [each for each in tensors if each.is_input and any(isinstance(axis, str) for axis in each.shape)]
    return [each.name for each in dynamic if each.name not in context._state.shapes]


def static_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(axis if isinstance(axis, int) else -1 for axis in tensor.shape)


def profile_shape(engine: Object, tensor: Tensor, index: int) -> list[tuple[int, ...]]:
    shapes = engine._state.plan.profiles[index] if engine._state.plan.profiles else {}
    return [tuple(each) for each in shapes.get(tensor.name, (static_shape(tensor),) * 3)]


def _current_shape(context: IExecutionContext, tensor: Tensor) -> tuple[int, ...]:
    """As far as the sizes of the inputs are given."""
    if _missing_shapes(context):
        return context._state.shapes.get(tensor.name, static_shape(tensor))
    shapes = _shapes(context)
    if tensor.is_input:
        return shapes[tensor.name]
    return context._state.engine._state.graph.output_shapes(shapes)[tensor.name]


def _key(context: IExecutionContext) -> tuple[Any, ...]:
    return context._state.profile, *sorted(context._state.shapes.items())


def _shapes(context: IExecutionContext) -> dict[str, tuple[int, ...]]:
    tensors = context._state.engine._state.plan.tensors
    return {each.name: context._state.shapes.get(each.name, each.shape) for each in tensors if each.is_input}


def _not_ready(context: IExecutionContext, stream: int) -> str | None:
    state = context._state
    if fails("execute"):
        return "Error Code 1: Cuda Runtime (an illegal memory access was encountered)"
    if missing := _missing_shapes(context):
        return f"Error Code 3: API Usage Error (enqueueV3: the sizes of {', '.join(missing)} are not given)"
    if missing := [each.name for each in state.engine._state.plan.tensors if not state.addresses.get(each.name)]:
        return f"Error Code 3: API Usage Error (enqueueV3: Address is not set for {', '.join(missing)})"
    if not state.device_memory:
        return "Error Code 3: API Usage Error (enqueueV3: the context has no device memory)"
    if is_capturing(stream) and _key(context) not in state.run_before:
        return (
            "Error Code 1: Cuda Runtime (operation not permitted when stream is capturing: sizes have changed, run "
            "once before the capture)"
        )
    return None


def _nbytes(tensor: Tensor, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _engine_dtype(tensor.dtype).itemsize


def _engine_dtype(dtype: str) -> np.dtype[Any]:
    """Of the engine's own tensor: before TensorRT 10 an int64 of the graph is an int32."""
    return np.dtype(NUMPY_NAMES[data_type(dtype).name])


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One run, with the sizes and addresses it was enqueued with; a captured graph runs it again."""

    graph: Graph
    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]

    def run(self) -> None:
        record("kernel", {"graph": self.graph.model.graph.name})
        inputs = {}
        for tensor in self.graph.tensors:
            if tensor.is_input:
                inputs[tensor.name] = self._view(tensor, self.shapes[tensor.name]).astype(tensor.dtype)
        outputs = self.graph.run(inputs)
        for tensor in self.graph.tensors:
            if not tensor.is_input:
                made = outputs[tensor.name]
                self._view(tensor, made.shape)[...] = made

    def _view(self, tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
        dtype = _engine_dtype(tensor.dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        raw = (ctypes.c_ubyte * nbytes).from_address(self.addresses[tensor.name])
        return np.frombuffer(raw, dtype).reshape(shape)
