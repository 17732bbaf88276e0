"""Quantized weights as tensors of a bundle: the same integers in the layout that each operator reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deepstitch.blockwise import WeightFormat, pack, unpack
from deepstitch.export.quantize.store import QuantizedStore
from deepstitch.tensorfile import DTYPE_BYTES

__all__ = ["Form", "QuantizedTensor", "QuantizedWeight"]

Form = Literal["onnx", "nbits", "qmoe", "qmoe-interleaved", "plugin"]
"""``onnx``: DequantizeLinear. ``nbits``: MatMulNBits. ``qmoe``: QMoE, interleaved where gate and up rows alternate.
``plugin``: words of four signed or eight four-bit numbers, for the plugins."""

_STEP_BYTES = 32 << 20
_UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """One tensor of the bundle's weight file.

    Attributes:
        name: in the file.
        dtype: safetensors dtype.
        shape: in the file.
        graph_dtype: what the graph declares it as; four-bit numbers are bytes in the file.
        graph_shape: likewise.
        store: where finished tensors lie.
        weight: what it belongs to.
        form: layout.
        constant: fill value of a tensor that is not in the store.
        stored_name: in the store, where it is another.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    graph_dtype: ir.DataType
    graph_shape: tuple[int, ...]
    store: QuantizedStore
    weight: QuantizedWeight
    form: Form
    constant: int | None = None
    stored_name: str | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The stored bytes in order, a bounded block at a time."""
        if self.constant is not None:
            yield from self._filled(self.constant)
            return
        array = self.store[self.stored_name or self.name].read()
        step = 2 * max(1, _STEP_BYTES // max(1, 2 * array.nbytes // len(array)))  # even: two numbers to a byte
        for start in range(0, len(array), step):
            yield self._arranged(np.ascontiguousarray(array[start : start + step]))

    def _filled(self, value: int) -> Iterator[npt.NDArray[Any]]:
        byte = value | value << 4 if self.weight.stored.bits == 4 else value
        for start in range(0, self.nbytes, _STEP_BYTES):
            yield np.full(min(_STEP_BYTES, self.nbytes - start), byte, np.uint8)

    def _arranged(self, part: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.form == "qmoe-interleaved":
            experts, rows = part.shape[:2]
            part = part.reshape(experts, 2, rows // 2, -1).swapaxes(1, 2)
        if self.form == "onnx" and self.name.endswith(".zero_points") and self.weight.stored.bits == 4:
            blocks = self.weight.shape[-1] // self.weight.stored.block
            part = pack(unpack(part, 4)[..., :blocks].reshape(-1), 4)  # ONNX pads the tensor, not each row
        if self.form == "plugin" and self.dtype == "I32":
            signed = part ^ 0x80 if self.weight.stored.bits == 8 else part  # the middle, 128, becomes 0
            part = signed.reshape(*signed.shape[:-2], -1).view("<i4")
        return np.ascontiguousarray(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A parameter that is stored as integers.

    Attributes:
        name: of the parameter.
        stored: its format.
        shape: as matrices ``[..., N, K]``.
        store: where the finished integers are found.
    """

    name: str
    stored: WeightFormat
    shape: tuple[int, ...]
    store: QuantizedStore

    def tensors(self, form: Form, *, packed_name: str | None = None) -> tuple[QuantizedTensor, ...]:
        """Values, scales and, if there are any in this form, zero points.

        Args:
            form: layout.
            packed_name: of the values in form ``plugin``, where something else reads the same numbers in another form.
        """
        scales = self.stored.scales_shape(self.shape)
        values = self._packed(packed_name or self.name) if form == "plugin" else self._values(form)
        tensors = [values, self._tensor(form, ".scales", "F32", scales, ir.DataType.FLOAT)]
        if form == "onnx" or not self.stored.symmetric:
            tensors.append(self._zero_points(form, scales))
        return tuple(tensors)

    def _values(self, form: Form) -> QuantizedTensor:
        in_blocks = self.stored.values_shape(self.shape)
        in_rows = (*in_blocks[:-2], in_blocks[-2] * in_blocks[-1])
        if form == "onnx":
            return self._tensor(form, "", "U8", in_rows, _UNSIGNED[self.stored.bits], self.shape)
        return self._tensor(form, "", "U8", in_blocks if form == "nbits" else in_rows, ir.DataType.UINT8)

    def _packed(self, name: str) -> QuantizedTensor:
        words = (*self.shape[:-1], self.shape[-1] * self.stored.bits // 32)
        tensor = self._tensor("plugin", "", "I32", words, ir.DataType.INT32)
        return dataclasses.replace(tensor, name=name, stored_name=self.name)

    def _zero_points(self, form: Form, scales: tuple[int, ...]) -> QuantizedTensor:
        if form != "onnx":
            shape = self.stored.zero_points_shape(self.shape)
            return self._tensor(form, ".zero_points", "U8", shape, ir.DataType.UINT8)
        size = (-(-math.prod(scales) * self.stored.bits // 8),)
        constant = self.stored.middle if self.stored.symmetric else None
        dtype = _UNSIGNED[self.stored.bits]
        return self._tensor(form, ".zero_points", "U8", size, dtype, scales, constant=constant)

    def _tensor(
        self,
        form: Form,
        suffix: str,
        dtype: str,
        shape: tuple[int, ...],
        graph_dtype: ir.DataType,
        graph_shape: tuple[int, ...] | None = None,
        *,
        constant: int | None = None,
    ) -> QuantizedTensor:
        return QuantizedTensor(
            name=self.name + suffix,
            dtype=dtype,
            shape=shape,
            graph_dtype=graph_dtype,
            graph_shape=graph_shape or shape,
            store=self.store,
            weight=self,
            form=form,
            constant=constant,
        )
