"""Calls plugins as TensorRT would: ``driver_v2.cpp`` or ``driver_v3.cpp`` through ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from deepstitch.plugins.build.tensorrt import TensorRT
from deepstitch.plugins.common.case import Array
from deepstitch.plugins.common.schema import DTYPES

HERE = Path(__file__).resolve().parent
HALF, FLOAT32, FLOAT64, INT32, CHAR, INT64 = 0, 1, 2, 5, 6, 10  # TensorRT's PluginFieldType
LINEAR = 0
ALIGNMENT = 256


class Field(Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32))


class Tensor(Structure):
    _fields_ = (("dtype", c_int32), ("format", c_int32), ("rank", c_int32), ("dims", c_int64 * 8), ("data", c_void_p))


def compile_driver(compiler: str, tensorrt: TensorRT, libraries: Path | None, out: Path) -> Path:
    """The driver for this generation of plugins, linked with ``libnvinfer.so.8`` of a folder for the older one."""
    source = HERE / f"driver_v{tensorrt.generation}.cpp"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", *tensorrt.compile_flags, str(source), "-o", str(out)]
    if libraries:
        command += [f"-L{libraries}", "-l:libnvinfer.so.8", f"-Wl,-rpath,{libraries}"]
    finished = subprocess.run([*command, "-ldl"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return out


def aligned(shape: Sequence[int], dtype: Any) -> Array:
    """An array like TensorRT's memory: aligned to 256 bytes, and never without an address. Holds NaN bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + ALIGNMENT, 0xFF, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def aligned_copy(array: Array) -> Array:
    """The same numbers in such an array."""
    made = aligned(array.shape, array.dtype)
    made[...] = array
    return made


def tensors(arrays: Sequence[Array], *, format: int = LINEAR) -> Any:
    """What TensorRT says of tensors, with their addresses."""
    made = (Tensor * max(len(arrays), 1))()
    for tensor, array in zip(made, arrays, strict=False):
        tensor.dtype, tensor.format, tensor.rank = DTYPES.index(array.dtype.name), format, array.ndim
        tensor.dims[: array.ndim] = array.shape
        tensor.data = array.ctypes.data
    return made


def field_of(value: Any) -> tuple[int, Array]:
    """Type and data as TensorRT's parser hands an ONNX attribute on."""
    if isinstance(value, str):
        return CHAR, np.frombuffer(value.encode(), np.uint8)
    if isinstance(value, float):
        return FLOAT32, np.array([value], np.float32)
    return INT32, np.atleast_1d(np.array(value, np.int32))


class Driver:
    """A plugin library in the hands of TensorRT."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("open", "log", "version", "identity"):
            getattr(self.library, f"driver_{name}").restype = c_char_p
        for name in ("create", "deserialize", "clone"):
            getattr(self.library, f"driver_{name}").restype = c_void_p
        for name in ("serialize", "workspace"):
            getattr(self.library, f"driver_{name}").restype = c_size_t

    def open(self, library: Path) -> list[str] | None:
        """A line for each creator the library brings; None where it does not load."""
        found = self.library.driver_open(str(library).encode())
        return None if found is None else found.decode().splitlines()

    def close(self) -> bool:
        """Unload; False where creators are left behind."""
        return bool(self.library.driver_close())

    def version(self) -> int:
        """Of the library, or of the headers where there is none."""
        return int(self.library.driver_version())

    def log(self) -> str:
        """Errors since the last call."""
        return self.library.driver_log().decode()

    def create(self, op: str, attributes: Mapping[str, Any]) -> Plugin | None:
        """A plugin from attributes in the parser's types; None where it was refused."""
        return self.create_from(op, {name: field_of(value) for name, value in attributes.items()})

    def create_from(self, op: str, fields: Mapping[str, tuple[int, Array]]) -> Plugin | None:
        """A plugin from fields: type and data."""
        given = (Field * max(len(fields), 1))()
        for field, (name, (kind, data)) in zip(given, fields.items(), strict=False):
            field.name, field.type, field.length = name.encode(), kind, data.size
            field.data = data.ctypes.data
        return self._plugin(self.library.driver_create(op.encode(), given, len(fields)))

    def deserialize(self, op: str, data: bytes) -> Plugin | None:
        """A plugin from what one wrote; None where it was refused."""
        return self._plugin(self.library.driver_deserialize(op.encode(), data, c_size_t(len(data))))

    def _plugin(self, pointer: int | None) -> Plugin | None:
        return Plugin(self, pointer) if pointer else None


class Plugin:
    """One plugin; a context manager that destroys it."""

    def __init__(self, driver: Driver, pointer: int) -> None:
        self.driver, self.pointer = driver, c_void_p(pointer)

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.driver.library, f"driver_{name}")(self.pointer, *arguments)

    def __enter__(self) -> Plugin:
        return self

    def __exit__(self, *_: object) -> None:
        self._call("destroy")

    def clone(self) -> Plugin:
        return Plugin(self.driver, self._call("clone"))

    def serialize(self) -> bytes:
        size = self._call("serialize", None, c_size_t(0))
        data = ctypes.create_string_buffer(size)
        assert self._call("serialize", data, c_size_t(size)) == size
        return data.raw

    def identity(self) -> str:
        return self._call("identity").decode()

    def num_outputs(self) -> int:
        return int(self._call("num_outputs"))

    def output_shape(self, inputs: Sequence[Array], output: int) -> tuple[int, ...] | None:
        dims = (c_int64 * 8)()
        rank = self._call("output_dims", tensors(inputs), len(inputs), output, dims)
        return None if rank < 0 else tuple(dims[:rank])

    def output_dtype(self, inputs: Sequence[Array], output: int) -> str:
        types = (c_int32 * max(len(inputs), 1))(*(DTYPES.index(each.dtype.name) for each in inputs))
        return DTYPES[self._call("output_type", types, len(inputs), output)]

    def supports(self, position: int, described: Any, inputs: int, outputs: int) -> bool:
        return bool(self._call("supports", position, described, inputs, outputs))

    def configure(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> int:
        return int(self._call("configure", tensors([*inputs, *outputs]), len(inputs), len(outputs)))

    def workspace(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> int:
        return int(self._call("workspace", tensors([*inputs, *outputs]), len(inputs), len(outputs)))

    def enqueue(
        self, inputs: Sequence[Array], outputs: Sequence[Array], workspace: Array | None, *, null: int | None = None
    ) -> int:
        """Run; ``null`` is a tensor whose address is not told."""
        described = tensors([*inputs, *outputs])
        if null is not None:
            described[null].data = None
        scratch = c_void_p(workspace.ctypes.data if workspace is not None and workspace.size else None)
        return int(self._call("enqueue", described, len(inputs), len(outputs), scratch))
