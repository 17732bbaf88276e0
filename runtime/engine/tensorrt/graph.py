"""One TensorRT engine behind the protocol of engines: execution contexts, bound memory, CUDA graphs."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from deepstitch.errors import BundleError, DeviceError
from deepstitch.manifest import Graph, TensorSpec
from deepstitch.runtime.engine.cuda import CudaGraph
from deepstitch.runtime.engine.device_memory import DeviceMemory
from deepstitch.runtime.engine.memory import Array, DeviceArray, Tensor
from deepstitch.runtime.engine.tensorrt.api import TensorRT
from deepstitch.runtime.engine.tensorrt.profiles import Profiles

__all__ = ["TensorRTGraph"]

_LOG = logging.getLogger("deepstitch.tensorrt")
_ALIGNMENT = 256  # of every address TensorRT is given
_AGAIN = "build the engines again with 'deepstitch build'"


class _Context:
    """An execution context with a profile of its own.

    Attributes:
        native: TensorRT's.
        recorded: a recording of it, and all that this depends on. It may be launched until sizes or addresses of the
            context change, also by a later call of the same: the pool hands out the same memory again.
    """

    def __init__(self, native: Any) -> None:
        self.native = native
        self.recorded: tuple[Hashable, CudaGraph] | None = None
        self._owner: weakref.ref[_Call] | None = None  # a call that is gone must take its memory with it

    def has(self, call: _Call) -> bool:
        """Whether sizes and addresses are those of this call."""
        return self._owner is not None and self._owner() is call

    def give_to(self, call: _Call | None) -> None:
        """Before they change, to nobody; after that, to whom they belong."""
        self.recorded = None
        self._owner = None if call is None else weakref.ref(call)


class TensorRTGraph:
    """A deserialized engine. All contexts, of this graph and others, take turns in one block of device memory."""

    def __init__(
        self, tensorrt: TensorRT, engine: Any, contract: Graph, profiles: Profiles, memory: DeviceMemory
    ) -> None:
        """Make a context for every profile.

        Args:
            tensorrt: the package.
            engine: an ``ICudaEngine``.
            contract: inputs and outputs as the bundle declares them.
            profiles: of the engine.
            memory: where inputs and outputs go.

        Raises:
            BundleError: the engine is of another graph.
            DeviceError: no context can be made.
        """
        self.tensorrt = tensorrt
        self.memory = memory
        self.contract = contract
        self._engine = engine
        self._profiles = profiles
        self.dtypes = self._checked_types()
        self._contexts = [self._new_context(number) for number in range(len(profiles))]

    @property
    def scratch_bytes(self) -> int:
        """Device memory its contexts work in."""
        return int(getattr(self._engine, self.tensorrt.rules.size))

    def attach(self, scratch: DeviceArray) -> None:
        """Give the contexts their memory."""
        for context in self._contexts:
            if self.tensorrt.rules.sized:
                context.native.set_device_memory(scratch.pointer, scratch.nbytes)
            else:
                context.native.device_memory = scratch.pointer

    def largest(self, axis: str) -> int:
        """The largest size of a named axis of the inputs."""
        return self._profiles.largest(axis)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.run`."""
        context = self._context_for(inputs)
        context.give_to(None)
        self._set_shapes(context, inputs)
        outputs = {}
        for spec in self.contract.outputs:
            shape = tuple(context.native.get_tensor_shape(spec.name))
            outputs[spec.name] = np.empty(shape, spec.dtype)
        self.bind(inputs, outputs)()
        return outputs

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> _Call:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.bind`.

        Raises:
            InputError: the engine was built for smaller inputs.
        """
        return _Call(self, self._context_for(inputs), inputs, outputs)

    def prepare(self, context: _Context, call: _Call) -> None:
        """Give a context the sizes and addresses of a call, unless it has them."""
        if context.has(call):
            return
        context.give_to(None)
        self._set_shapes(context, call.inputs)
        for name, address in call.addresses.items():
            if not context.native.set_tensor_address(name, address):
                raise self.tensorrt.failure(f"does not take the address of {name}", _AGAIN)
        context.give_to(call)

    def execute(self, context: _Context) -> None:
        """Put one run into the stream."""
        if not context.native.execute_async_v3(self.memory.cuda.stream_handle):
            raise self.tensorrt.failure(f"does not run {self.contract.file}", f"start again, or {_AGAIN}")

    def _context_for(self, inputs: Mapping[str, Tensor]) -> _Context:
        return self._contexts[self._profiles.choose({name: tuple(each.shape) for name, each in inputs.items()})]

    def _set_shapes(self, context: _Context, inputs: Mapping[str, Tensor]) -> None:
        for name, tensor in inputs.items():
            if name in self.dtypes and not context.native.set_input_shape(name, tuple(tensor.shape)):
                raise self.tensorrt.failure(f"does not take {name} of shape {list(tensor.shape)}", _AGAIN)

    def _checked_types(self) -> dict[str, np.dtype[Any]]:
        """Types of the engine's tensors, which before TensorRT 10 has no int64: those of the graph are int32 there."""
        engine, found = self._engine, {}
        declared = {spec.name: spec for spec in (*self.contract.inputs, *self.contract.outputs)}
        for number in range(engine.num_io_tensors):
            name = engine.get_tensor_name(number)
            dtype = self.tensorrt.dtype(engine.get_tensor_dtype(name))
            shape = tuple(engine.get_tensor_shape(name))
            if name not in declared or not _fits(declared[name], dtype, shape):
                raise BundleError(
                    f"{self.contract.file}: its engine has a tensor {name} {dtype}{list(shape)}, the bundle's graph "
                    f"has {declared.get(name, 'none')}; {_AGAIN}"
                )
            found[name] = np.dtype(dtype)
        for spec in self.contract.outputs:
            if spec.name not in found:
                raise BundleError(f"{self.contract.file}: its engine has no output {spec.name}; {_AGAIN}")
        return found

    def _new_context(self, profile: int) -> _Context:
        if self.tensorrt.rules.strategy:
            strategy = self.tensorrt.module.ExecutionContextAllocationStrategy.USER_MANAGED
            native = self._engine.create_execution_context(strategy)
        else:
            native = self._engine.create_execution_context_without_device_memory()
        if native is None:
            raise self.tensorrt.failure(f"makes no context for {self.contract.file}", "stop other programs on the card")
        if not native.set_optimization_profile_async(profile, self.memory.cuda.stream_handle):
            raise self.tensorrt.failure(f"does not take profile {profile} of {self.contract.file}", _AGAIN)
        self.memory.cuda.synchronize()
        return _Context(native)


def _fits(spec: TensorSpec, dtype: str, shape: tuple[int, ...]) -> bool:
    types = (spec.dtype, "int32") if spec.dtype == "int64" else (spec.dtype,)
    if dtype not in types or len(shape) != len(spec.shape):
        return False
    return all(isinstance(axis, str) or axis == size for axis, size in zip(spec.shape, shape, strict=True))


class _Call:
    """Bound memory. Inputs on the host go to the card in one copy, outputs come back behind the graph.

    From its second run on, the copies and the graph are one CUDA graph: one launch instead of one for every kernel.

    Attributes:
        inputs: as given.
        addresses: on the card, of all tensors.
    """

    def __init__(
        self, graph: TensorRTGraph, context: _Context, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        self._graph = graph
        self._context = context
        self._memory = graph.memory
        self.inputs = dict(inputs)
        self._outputs = dict(outputs)
        self.addresses: dict[str, int] = {}
        self._loads: list[tuple[Array, Array]] = []  # (of the caller, page-locked)
        self._stores: list[tuple[Array, Array]] = []  # likewise
        self._downloads: list[tuple[Array, DeviceArray]] = []  # (page-locked, on the card)
        self._recordable = True
        self._place_inputs()
        for name, tensor in outputs.items():
            self.addresses[name] = self._output(name, tensor).pointer
        self._key = self._dependencies()

    def __call__(self) -> None:
        """Run once; when this returns, all of it is done."""
        cuda = self._memory.cuda
        cuda.make_current()
        for given, staging in self._loads:
            staging[...] = given  # narrows int64 where the engine has none
        recorded = self._recording()
        if recorded is not None:
            recorded.launch()
        else:
            self._graph.prepare(self._context, self)
            self._enqueue()
        cuda.synchronize()
        for given, staging in self._stores:
            given[...] = staging

    def _recording(self) -> CudaGraph | None:
        """Of this call, or of one with the same sizes and addresses; made once the context has run with them."""
        context = self._context
        if context.recorded is None and self._recordable and context.has(self):
            self._record()
        return context.recorded[1] if context.recorded is not None and context.recorded[0] == self._key else None

    def _enqueue(self) -> None:
        cuda = self._memory.cuda
        if self._loads:
            cuda.upload(self._on_card.pointer, self._on_host.ctypes.data, self._on_card.nbytes)
        self._graph.execute(self._context)
        for staging, tensor in self._downloads:
            cuda.download(staging.ctypes.data, tensor.pointer, tensor.nbytes)

    def _record(self) -> None:
        """Keep one run as a CUDA graph; the context has run with these sizes and addresses before, as it must have."""
        try:
            with self._memory.cuda.recording() as recorded:
                self._enqueue()
            self._context.recorded = (self._key, recorded[0])
        except DeviceError as error:
            self._recordable = False
            _LOG.info("runs of %s are not recorded: %s", self._graph.contract.file, error)

    def _dependencies(self) -> Hashable:
        """All that a recording depends on."""
        sizes = tuple(tuple(tensor.shape) for tensor in self.inputs.values())
        staging = [staging.ctypes.data for staging, _ in self._downloads]
        if self._loads:
            staging.append(self._on_host.ctypes.data)
        return sizes, tuple(self.addresses.values()), tuple(staging)

    def _place_inputs(self) -> None:
        """Put those on the host into one block, to be copied at once."""
        offsets: dict[str, int] = {}
        total = 0
        for name, tensor in self.inputs.items():
            if name not in self._graph.dtypes:
                continue  # TensorRT found that nothing depends on it
            if isinstance(tensor, DeviceArray):
                self.addresses[name] = self._address(name, tensor)
            else:
                offsets[name] = total
                nbytes = tensor.size * self._graph.dtypes[name].itemsize
                total += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if not offsets:
            return
        self._on_host = self._memory.staging((total,), np.uint8)
        self._on_card = self._memory.empty((total,), np.uint8)
        for name, offset in offsets.items():
            given, dtype = self.inputs[name], self._graph.dtypes[name]
            assert isinstance(given, np.ndarray)
            block = self._on_host[offset : offset + given.size * dtype.itemsize]
            self._loads.append((given, block.view(dtype).reshape(given.shape)))
            self.addresses[name] = self._on_card.pointer + offset

    def _output(self, name: str, tensor: Tensor) -> DeviceArray:
        if isinstance(tensor, DeviceArray):
            self._address(name, tensor)
            return tensor
        dtype = self._graph.dtypes[name]
        staging = tensor
        if tensor.dtype != dtype or not self._memory.is_staging(tensor):
            staging = self._memory.staging(tensor.shape, dtype)
            self._stores.append((tensor, staging))
        on_card = self._memory.empty(tensor.shape, dtype)
        self._downloads.append((staging, on_card))
        return on_card

    def _address(self, name: str, tensor: DeviceArray) -> int:
        if tensor.dtype != self._graph.dtypes[name]:
            raise ValueError(f"{name} is {tensor.dtype}, the engine has {self._graph.dtypes[name]}")
        if tensor.pointer % _ALIGNMENT:  # some rows of a tensor, and rows are not of a multiple of that
            raise DeviceError(
                f"{self._graph.contract.file}: rows of {name} begin at {tensor.pointer:#x}, TensorRT takes multiples "
                f"of {_ALIGNMENT} only; give one prompt and one picture at a time, or build the engines again with a "
                "--max-context that is a multiple of 64 and with more --images"
            )
        return tensor.pointer
