"""Quantized numbers as the kernels hold them, for references and cases.

Weights are those of :mod:`deepstitch.blockwise`, symmetric. Four-bit ones are its bytes viewed as int32, eight to a
word; eight-bit ones are two's complement, its bytes with the highest bit inverted, four to a word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch import blockwise

__all__ = [
    "dequantize_weights",
    "pack_int4",
    "pack_int8",
    "quantize_activations",
    "quantize_weights",
    "unpack_int4",
    "unpack_int8",
    "unpack_weights",
]

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int8]
_BITS = {"int4": 4, "int8": 8}


def quantize_activations(x: npt.NDArray[Any], block: int) -> tuple[Numbers, Floats]:
    """Quantize each block of a row to int8 by its largest magnitude.

    Args:
        x: ``[..., K]`` float32 or float16; K is a multiple of ``block``.
        block: numbers that share a scale.

    Returns:
        Numbers ``[..., K]`` in -127 … 127, and scales ``[..., K / block]`` float32: ``amax / 127``.
    """
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    scales = largest / np.float32(127)
    divisor = np.where(scales == 0, np.float32(1), scales)
    numbers = np.where(scales == 0, np.float32(0), np.rint(blocks / divisor))
    return np.clip(numbers, -127, 127).astype(np.int8).reshape(x.shape), scales[..., 0]


def pack_int8(numbers: Numbers) -> Words:
    """``[..., K]`` in -128 … 127 to ``[..., K / 4]`` words, the lowest byte first."""
    return np.ascontiguousarray(numbers.astype(np.int8)).view("<i4")


def unpack_int8(words: Words) -> Numbers:
    """The inverse of :func:`pack_int8`."""
    return np.ascontiguousarray(words).view(np.int8)


def pack_int4(numbers: Numbers) -> Words:
    """``[..., K]`` in -8 … 7 to ``[..., K / 8]`` words, the lowest four bits first, 8 added."""
    return np.ascontiguousarray(blockwise.pack((numbers + 8).astype(np.uint8), 4)).view("<i4")


def unpack_int4(words: Words) -> Numbers:
    """The inverse of :func:`pack_int4`."""
    return blockwise.unpack(np.ascontiguousarray(words).view(np.uint8), 4).astype(np.int8) - np.int8(8)


def quantize_weights(w: Floats, bits: int, block: int) -> tuple[Words, Floats]:
    """Quantize a stack of matrices, symmetric.

    Args:
        w: ``[..., N, K]``.
        bits: 4 or 8.
        block: weights that share a scale; divides K.

    Returns:
        Words ``[..., N, K * bits / 32]`` int32 and scales ``[..., N, K / block]`` float32.
    """
    largest = (1 << (bits - 1)) - 1
    blocks = np.asarray(w, np.float32).reshape(*w.shape[:-1], -1, block)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(largest)
    numbers = np.rint(blocks / np.where(scales == 0, np.float32(1), scales)).astype(np.int8).reshape(w.shape)
    return (pack_int4 if bits == 4 else pack_int8)(numbers), scales[..., 0]


def unpack_weights(words: Words, weight_format: str) -> Numbers:
    """Signed numbers ``[..., N, K]`` of "int4" or "int8" words."""
    return (unpack_int4 if _BITS[weight_format] == 4 else unpack_int8)(words)


def dequantize_weights(words: Words, scales: npt.NDArray[Any], weight_format: str) -> Floats:
    """Values ``[..., N, K]`` of packed words ``[..., N, K * bits / 32]`` and scales ``[..., N, K / block]``."""
    numbers = unpack_weights(words, weight_format).astype(np.float32)
    blocks = numbers.reshape(*scales.shape, -1) * scales.astype(np.float32)[..., None]
    return blocks.reshape(numbers.shape)
