"""Opens a library of operators and runs one on numpy arrays: on the CPU through the host shim, or on a GPU."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from deepstitch.errors import did_you_mean, list_names
from deepstitch.plugins.common.case import Array
from deepstitch.plugins.common.cuda_driver import CudaDriver
from deepstitch.plugins.common.schema import DTYPES, PluginError

__all__ = ["Call", "DeviceLibrary", "Instance", "PluginLibrary"]

ABI_VERSION = 1
_KINDS = {"int": 0, "float": 1, "string": 2, "ints": 3}
_MESSAGE_BYTES = 2048


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("kind", c_int32),
        ("count", c_int32),
        ("integer", c_int64),
        ("real", c_double),
        ("text", c_char_p),
        ("integers", POINTER(c_int64)),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (("dtype", c_int32), ("rank", c_int32), ("dims", c_int64 * 8), ("data", c_void_p))


class Memory(Protocol):
    """Where the tensors of a library lie."""

    def allocate(self, nbytes: int) -> int:
        """Address of new memory."""

    def free(self, pointer: int) -> None:
        """Give it back."""

    def upload(self, pointer: int, data: int, nbytes: int) -> None:
        """Copy from host memory at ``data``."""

    def download(self, data: int, pointer: int, nbytes: int) -> None:
        """Copy to host memory at ``data``, after what was launched before."""

    def fill(self, pointer: int, byte: int, nbytes: int) -> None:
        """Set every byte."""


class _HostMemory:
    """Of exactly the size asked for, so that an address sanitizer sees one byte too many."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def allocate(self, nbytes: int) -> int:
        pointer = self._library.deepstitch_allocate(c_size_t(nbytes))
        if not pointer:
            raise PluginError(f"no memory for {nbytes} bytes")
        return int(pointer)

    def free(self, pointer: int) -> None:
        self._library.deepstitch_free(c_void_p(pointer))

    def upload(self, pointer: int, data: int, nbytes: int) -> None:
        ctypes.memmove(pointer, data, nbytes)

    def download(self, data: int, pointer: int, nbytes: int) -> None:
        ctypes.memmove(data, pointer, nbytes)

    def fill(self, pointer: int, byte: int, nbytes: int) -> None:
        ctypes.memset(pointer, byte, nbytes)


class PluginLibrary:
    """A library built by ``deepstitch.plugins.build``; its functions are those of ``common/abi.h``."""

    def __init__(self, library: ctypes.CDLL, memory: Memory, path: Path) -> None:
        self._library = library
        self.memory = memory
        self.path = path

    @classmethod
    def open(cls, path: Path) -> PluginLibrary:
        """Open a library that runs on the CPU.

        Raises:
            PluginError: no such file, not such a library, or one of another version.
        """
        library = _load(path)
        return cls(library, _HostMemory(library), path)

    def describe(self) -> dict[str, Any]:
        """What ``deepstitch_describe`` in ``common/abi.h`` says: launcher, targets, operators with their attributes."""
        return dict(json.loads(self._library.deepstitch_describe()))

    def create(self, op_type: str, attributes: Mapping[str, Any]) -> Instance:
        """An operator with these attributes.

        Raises:
            PluginError: there is no such operator, or it refuses an attribute.
        """
        kinds = {each["name"]: each["kind"] for op in self.describe()["ops"] if op["name"] == op_type
                 for each in op["attributes"]}  # fmt: skip
        given = (_Attribute * len(attributes))(
            *(_attribute(name, value, kinds.get(name)) for name, value in attributes.items())
        )
        handle = c_void_p()
        self.checked("deepstitch_create", op_type.encode(), given, len(given), byref(handle))
        return Instance(self, handle)

    def deserialize(self, op_type: str, data: bytes) -> Instance:
        """The operator that :meth:`Instance.serialize` wrote.

        Raises:
            PluginError: the bytes are damaged, or of another operator or version.
        """
        handle = c_void_p()
        self.checked("deepstitch_deserialize", op_type.encode(), data, c_size_t(len(data)), byref(handle))
        return Instance(self, handle)

    def run(
        self, op_type: str, attributes: Mapping[str, Any], inputs: Mapping[str, Array], *, order_seed: int = 0
    ) -> dict[str, Array]:
        """Run an operator once.

        Args:
            op_type: for example ``MoEExperts``.
            attributes: as a node would give them.
            inputs: by name.
            order_seed: host shim: another order of blocks and threads per number; 0 is the natural one.

        Raises:
            PluginError: refused, or the kernel failed.
        """
        with self.create(op_type, attributes) as instance, instance.prepare(inputs) as call:
            call.enqueue(order_seed)
            return call.outputs()

    def checked(self, function: str, *arguments: Any) -> None:
        """Call a function of the library that reports errors as text; for this module."""
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        if getattr(self._library, function)(*arguments, message, c_size_t(_MESSAGE_BYTES)) != 0:
            raise PluginError(message.value.decode("utf-8", "replace"))

    def signature(self, handle: c_void_p) -> dict[str, Any]:
        """Inputs and outputs of an instance; for this module."""
        return dict(json.loads(self._library.deepstitch_signature(handle)))

    def destroy(self, handle: c_void_p) -> None:
        """Free an instance; for this module."""
        self._library.deepstitch_destroy(handle)


class DeviceLibrary(PluginLibrary):
    """A library whose kernels run on an NVIDIA GPU. ``order_seed`` must be 0: it is the stream there."""

    driver: CudaDriver

    @classmethod
    def open(cls, path: Path, device: int = 0) -> DeviceLibrary:
        """Open a library and make the primary context of a device current.

        Raises:
            PluginError: no driver, no device, no such file, or not such a library.
        """
        driver = CudaDriver(device)
        opened = cls(_load(path), driver, path)
        opened.driver = driver
        return opened


class Instance:
    """An operator with attributes. Close it, or use it in a ``with``."""

    def __init__(self, library: PluginLibrary, handle: c_void_p) -> None:
        self.library = library
        self.handle = handle
        signature = library.signature(handle)
        self.inputs: list[dict[str, Any]] = signature["inputs"]
        self.outputs: list[dict[str, Any]] = signature["outputs"]

    def serialize(self) -> bytes:
        """Attributes as the plugin keeps them in an engine."""
        needed = c_size_t()
        self.library.checked("deepstitch_serialize", self.handle, None, c_size_t(0), byref(needed))
        data = ctypes.create_string_buffer(needed.value)
        self.library.checked("deepstitch_serialize", self.handle, data, needed, byref(needed))
        return data.raw

    def prepare(self, inputs: Mapping[str, Array], *, shared: Mapping[str, str] = MappingProxyType({})) -> Call:
        """Check inputs, copy them to where the kernels run, and make room for the outputs.

        Args:
            inputs: by name.
            shared: outputs that are written over an input of the same type and shape, with that input.

        Raises:
            PluginError: an input is missing, unknown, or refused, or an output cannot be where an input is.
        """
        names = [each["name"] for each in self.inputs]
        for name in inputs:
            if name not in names:
                raise PluginError(f"there is no input {name}{did_you_mean(name, names)}")
        if missing := [name for name in names if name not in inputs]:
            needed = f"these attributes need {len(names)}: {', '.join(names)}"
            raise PluginError(f"got {len(inputs)} inputs; {needed}; {list_names(missing)} missing")
        return Call(self, [inputs[name] for name in names], shared)

    def close(self) -> None:
        """Free it. Calls made from it must be closed before."""
        if self.handle:
            self.library.destroy(self.handle)
            self.handle = c_void_p()

    def __enter__(self) -> Instance:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Call:
    """An operator with its inputs in place, to be run as often as wanted. Close it, or use it in a ``with``."""

    def __init__(self, instance: Instance, arrays: Sequence[Array], shared: Mapping[str, str]) -> None:
        self._instance = instance
        self._memory = instance.library.memory
        self._pointers: list[int] = []
        self._arrays = [np.ascontiguousarray(each) if each.ndim else each for each in arrays]
        names = [each["name"] for each in instance.inputs]
        self._inputs = (_Tensor * len(arrays))(*(_tensor(n, a) for n, a in zip(names, self._arrays, strict=True)))
        self._outputs = (_Tensor * len(instance.outputs))()
        outputs = [each["name"] for each in instance.outputs]
        self._shared = {_place_of(output, outputs): _place_of(name, names) for output, name in shared.items()}
        self._workspace = c_size_t()
        self._call("deepstitch_prepare", self._outputs, len(self._outputs), byref(self._workspace))
        try:
            self._place()
        except BaseException:
            self.close()
            raise

    def _call(self, function: str, *arguments: Any) -> None:
        checked = self._instance.library.checked
        checked(function, self._instance.handle, self._inputs, len(self._inputs), *arguments)

    def _allocate(self, nbytes: int) -> int:
        self._pointers.append(self._memory.allocate(nbytes))
        return self._pointers[-1]

    def _place(self) -> None:
        for tensor, array in zip(self._inputs, self._arrays, strict=True):
            tensor.data = self._allocate(array.nbytes)
            self._memory.upload(tensor.data, array.ctypes.data, array.nbytes)
        for place, tensor in enumerate(self._outputs):
            if place in self._shared:
                over = self._inputs[self._shared[place]]
                if (tensor.dtype, _shape(tensor)) != (over.dtype, _shape(over)):
                    name = self._instance.outputs[place]["name"]
                    raise PluginError(f"{name} is no tensor like the input it is to be written over")
                tensor.data = over.data
            else:
                tensor.data = self._allocate(_nbytes(tensor))
        self._scratch = self._allocate(self._workspace.value)

    @property
    def workspace_bytes(self) -> int:
        """What the operator asked for."""
        return int(self._workspace.value)

    def enqueue(self, stream: int = 0, *, fill: bool = True) -> None:
        """Run, or on a GPU start.

        Args:
            stream: a CUstream; host shim: the seed of the order.
            fill: first write NaN bytes over workspace and outputs, shared ones left out.

        Raises:
            PluginError: refused, or the kernel failed (on a GPU that shows at the next copy).
        """
        if fill:
            for place, tensor in enumerate(self._outputs):
                if place not in self._shared:
                    self._memory.fill(tensor.data, 0xFF, _nbytes(tensor))
            self._memory.fill(self._scratch, 0xFF, self._workspace.value)
        self._call("deepstitch_enqueue", self._outputs, len(self._outputs), c_void_p(self._scratch), c_void_p(stream))

    def outputs(self) -> dict[str, Array]:
        """Copies of the outputs, by name."""
        arrays = {}
        for spec, tensor in zip(self._instance.outputs, self._outputs, strict=True):
            array = np.empty(_shape(tensor), DTYPES[tensor.dtype])
            self._memory.download(array.ctypes.data, tensor.data, array.nbytes)
            arrays[spec["name"]] = array
        return arrays

    def close(self) -> None:
        """Free the memory."""
        while self._pointers:
            self._memory.free(self._pointers.pop())

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(Path(path).resolve()))
        version = library.deepstitch_abi_version()
    except (OSError, AttributeError) as error:
        raise PluginError(f"{path} is not a library of deepstitch operators: {error}") from None
    if version != ABI_VERSION:
        raise PluginError(
            f"{path} has interface version {version}; this deepstitch needs {ABI_VERSION}: build it again"
        )
    library.deepstitch_describe.restype = c_char_p
    library.deepstitch_signature.restype = c_char_p
    library.deepstitch_allocate.restype = c_void_p
    library.deepstitch_destroy.argtypes = [c_void_p]
    library.deepstitch_create.restype = c_int
    return library


def _attribute(name: str, value: Any, kind: str | None) -> _Attribute:
    """In the kind the operator wants where that is the same number; else by the value's own type, to be refused."""
    made = _Attribute(name=name.encode())
    if isinstance(value, str):
        made.kind, made.text = _KINDS["string"], value.encode()
    elif isinstance(value, list | tuple | np.ndarray):
        made.kind, made.count = _KINDS["ints"], len(value)
        made.integers = (c_int64 * len(value))(*(int(each) for each in value))
    elif kind == "float" or isinstance(value, float | np.floating):
        made.kind, made.real = _KINDS["float"], float(value)
    elif isinstance(value, int | np.integer):
        made.kind, made.integer = _KINDS["int"], int(value)
    else:
        raise PluginError(f"attribute {name} is {value!r}; an int, a float, a text or a list of ints is needed")
    return made


def _tensor(name: str, array: Array) -> _Tensor:
    if array.dtype.name not in DTYPES:
        raise PluginError(f"{name} is {array.dtype.name}; it must be one of {', '.join(DTYPES)}")
    if array.ndim > 8:
        raise PluginError(f"{name} has {array.ndim} dimensions; at most 8 are supported")
    return _Tensor(DTYPES.index(array.dtype.name), array.ndim, (c_int64 * 8)(*array.shape), None)


def _place_of(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise PluginError(f"there is no tensor {name}{did_you_mean(name, names)}")
    return names.index(name)


def _shape(tensor: _Tensor) -> tuple[int, ...]:
    return tuple(tensor.dims[: tensor.rank])


def _nbytes(tensor: _Tensor) -> int:
    count = int(np.prod(_shape(tensor), dtype=np.int64))
    return count * np.dtype(DTYPES[tensor.dtype]).itemsize
