"""Block-wise integer weights: how they are stored, and what they mean.

A matrix ``[..., N, K]`` is cut along K into blocks of equal size. Each block has one float32 scale and, if asymmetric,
one zero point: ``value = (q - zero_point) * scale`` with unsigned ``q``. Four-bit numbers lie two to a byte, the lower
half first. This is the storage of ``com.microsoft.MatMulNBits`` (ONNX Runtime, ContribOperators.md), and byte for byte
that of ONNX's own UINT4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["WeightFormat", "dequantize", "pack", "unpack", "unpack_zero_points"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way to store a matrix.

    Attributes:
        bits: per weight, 4 or 8.
        block: weights that share a scale.
        symmetric: the zero point is the middle, ``2**(bits-1)``, and not stored.
    """

    bits: int
    block: int
    symmetric: bool = True

    @property
    def middle(self) -> int:
        """The zero point of symmetric storage."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """The largest stored number."""
        return (1 << self.bits) - 1

    def values_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Bytes of a stack of matrices ``[..., N, K]``: ``[..., N, K / block, block * bits / 8]``."""
        return (*shape[:-1], shape[-1] // self.block, self.block * self.bits // 8)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``[..., N, K / block]``."""
        return (*shape[:-1], shape[-1] // self.block)

    def zero_points_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Bytes, each row padded to whole ones: ``[..., N, ceil(K / block * bits / 8)]``."""
        return (*shape[:-1], -(-(shape[-1] // self.block) * self.bits // 8))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of ``[..., N, K]``, scales and zero points included."""
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        blocks = shape[-1] // self.block
        zero_points = 0 if self.symmetric else self.zero_points_shape(shape)[-1]
        return rows * (blocks * (self.block * self.bits // 8 + 4) + zero_points)

    def __str__(self) -> str:
        return f"int{self.bits}/{self.block}{'' if self.symmetric else '+zp'}"

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """The inverse of ``str``.

        Raises:
            ValueError: not such a text.
        """
        found = re.fullmatch(r"int([48])/(\d+)(\+zp)?", text)
        if found is None:
            raise ValueError(f"{text!r} is not a weight format such as int4/32")
        return cls(bits=int(found[1]), block=int(found[2]), symmetric=found[3] is None)


def pack(numbers: Bytes, bits: int) -> Bytes:
    """Put four-bit numbers two to a byte along the last axis, padding an odd one with zero; bytes stay as they are."""
    if bits == 8:
        return numbers
    if numbers.shape[-1] % 2:
        numbers = np.concatenate([numbers, np.zeros((*numbers.shape[:-1], 1), np.uint8)], axis=-1)
    return numbers[..., 0::2] | np.left_shift(numbers[..., 1::2], 4, dtype=np.uint8)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """The inverse of :func:`pack`; padding stays."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def unpack_zero_points(packed: Bytes, shape: tuple[int, ...], bits: int) -> Bytes:
    """Zero points ``shape = [..., N, K/block]`` from bytes.

    Four-bit ones come in rows padded to whole bytes (MatMulNBits), or as one padded run (ONNX UINT4); where a row has
    an even number the two are the same.
    """
    if bits == 8:
        return packed.reshape(shape)
    row_bytes = -(-shape[-1] // 2)
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    if packed.size == rows * row_bytes:
        return unpack(packed.reshape(*shape[:-1], row_bytes), 4)[..., : shape[-1]]
    return unpack(packed.reshape(-1), 4)[: rows * shape[-1]].reshape(shape)


def dequantize(
    values: npt.NDArray[Any], scales: npt.NDArray[np.float32], zero_points: Bytes | None, stored: WeightFormat
) -> npt.NDArray[np.float32]:
    """Values of stored matrices.

    Args:
        values: ``[..., N, K/block, block*bits/8]`` uint8.
        scales: ``[..., N, K/block]`` float32.
        zero_points: ``[..., N, K/block]`` uint8, not packed; None where symmetric.
        stored: their format.

    Returns:
        ``[..., N, K]`` float32.
    """
    numbers = unpack(values, stored.bits).astype(np.float32)
    if zero_points is None:
        numbers -= stored.middle
    else:
        numbers -= zero_points[..., None]
    numbers *= scales[..., None]
    return numbers.reshape(*scales.shape[:-1], -1)
