"""The runtime and its engines."""

from __future__ import annotations

import ctypes
from typing import Any

from ._api import MAJOR, Object, State, fails, make, native
from ._base import IGpuAllocator, ILogger, Severity, say
from ._context import IExecutionContext, new_context, profile_shape, static_shape, tensor_of
from ._enums import DataType, ExecutionContextAllocationStrategy, TensorIOMode, TensorLocation, data_type
from ._graph import Graph
from ._memory import Memory
from ._plan import Plan
from ._plugins import IPluginRegistry, find, get_plugin_registry


@native
class Runtime(Object):
    def __init__(self, logger: ILogger) -> None:
        if fails("driver"):
            say(logger, Severity.INTERNAL_ERROR, "CUDA initialization failure with error: 35")
            if MAJOR < 10:
                ctypes.string_at(0)  # so does the real one
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._state = State(logger=logger, allocator=None, host_code=False, max_threads=1)

    @property
    def logger(self) -> ILogger:
        return self._state.logger

    @property
    def gpu_allocator(self) -> IGpuAllocator | None:
        return self._state.allocator

    @gpu_allocator.setter
    def gpu_allocator(self, value: IGpuAllocator | None) -> None:
        if value is not None and not isinstance(value, IGpuAllocator):
            raise TypeError("gpu_allocator: incompatible function arguments; supported: IGpuAllocator")
        self._state.allocator = value

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._state.host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._state.host_code = value

    @property
    def max_threads(self) -> int:
        return self._state.max_threads

    @max_threads.setter
    def max_threads(self, value: int) -> None:
        self._state.max_threads = value

    def get_plugin_registry(self) -> IPluginRegistry:
        return get_plugin_registry()

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            plan = Plan.from_bytes(bytes(serialized_engine))
            problem = plan.problem() or _missing_plugin(plan)
        except ValueError as error:
            problem = str(error)
        memory = None
        if problem is None:
            memory = Memory(self._state.allocator, plan.weight_bytes)
            if memory.failed or fails("deserialize-memory"):
                problem = f"Error Code 2: OutOfMemory (Requested size was {plan.weight_bytes} bytes.)"
        if problem is not None:
            say(self._state.logger, Severity.ERROR, problem)
            return None
        shared = {"logger": self._state.logger, "allocator": self._state.allocator, "memory": memory}
        return make(ICudaEngine, plan=plan, graph=Graph(plan.onnx, plan.onnx_path), contexts=[], runtime=self, **shared)


def _missing_plugin(plan: Plan) -> str | None:
    for name, version, namespace in plan.plugins:
        if find(name, version, namespace) is None:
            return (
                f"Error Code 1: Serialization (getPluginCreator could not find plugin: {name} version: {version} "
                f"namespace: {namespace})"
            )
    return None


@native
class ICudaEngine(Object):
    @property
    def name(self) -> str:
        return self._state.plan.name

    @property
    def num_layers(self) -> int:
        return self._state.plan.num_layers

    @property
    def num_aux_streams(self) -> int:
        return 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._state.plan.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return max(len(self._state.plan.profiles), 1)

    @property
    def device_memory_size(self) -> int:
        return self._state.plan.device_memory

    @property
    def device_memory_size_v2(self) -> int:
        return self._state.plan.device_memory

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self._state.plan.device_memory // (profile_index + 1)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._state.plan.device_memory // (profile_index + 1)

    def get_tensor_name(self, index: int) -> str:
        return self._state.plan.tensors[index].name

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        tensor = tensor_of(self, name)
        return TensorIOMode.NONE if tensor is None else TensorIOMode.INPUT if tensor.is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        tensor = tensor_of(self, name)
        return DataType.FLOAT if tensor is None else data_type(tensor.dtype)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        tensor = tensor_of(self, name)
        return () if tensor is None else static_shape(tensor)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return profile_shape(self, tensor_of(self, name), profile_index)

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> IExecutionContext | None:
        own = strategy is None or strategy is not getattr(ExecutionContextAllocationStrategy, "USER_MANAGED", 0)
        return new_context(self, own)

    def create_execution_context_without_device_memory(self) -> IExecutionContext | None:
        return new_context(self, False)
