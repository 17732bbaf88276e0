"""Integer weights of a bundle read back as what they mean: the model that the bundle has to compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.blockwise import WeightFormat, dequantize, unpack_zero_points
from deepstitch.export.quantize.recipe import is_expert
from deepstitch.runtime.bundle import Bundle
from deepstitch.tensorfile import TensorFile

__all__ = ["stored_parameters"]

_INTERLEAVING_TARGETS = ("ort-cpu",)  # QMoE reads gate and up rows in turn


def stored_parameters(bundle: Bundle) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Name and float32 values, in the parameter's own layout, of everything the bundle stores as integers."""
    manifest = bundle.manifest
    if manifest.quantization is None:
        return
    tensors = TensorFile.open(bundle.folder / manifest.embedding.file)
    for name, text in manifest.quantization.formats.items():
        stored = WeightFormat.parse(text)
        scales = np.asarray(tensors[f"{name}.scales"].read())
        zero_points = None
        if not stored.symmetric:
            zero_points = unpack_zero_points(
                np.asarray(tensors[f"{name}.zero_points"].read()), scales.shape, stored.bits
            )
        values = _bytes(np.asarray(tensors[name].read()), stored).reshape(*scales.shape, -1)
        if name.endswith("experts.gate_up_proj") and manifest.target in _INTERLEAVING_TARGETS:
            values, scales = _gate_then_up(values), _gate_then_up(scales)
            zero_points = None if zero_points is None else _gate_then_up(zero_points)
        weight = dequantize(values, scales, zero_points, stored)
        yield name, np.ascontiguousarray(weight.swapaxes(1, 2)) if is_expert(name) else weight


def _bytes(values: npt.NDArray[Any], stored: WeightFormat) -> npt.NDArray[np.uint8]:
    """Unsigned numbers, byte by byte, from those or from the words that plugins read."""
    if values.dtype == np.uint8:
        return values
    unsigned = np.ascontiguousarray(values).view(np.uint8)
    return unsigned ^ np.uint8(stored.middle) if stored.bits == 8 else unsigned


def _gate_then_up(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``[E, 2I, ...]`` with gate and up rows alternating → gate rows first."""
    experts, count = rows.shape[:2]
    return rows.reshape(experts, count // 2, 2, *rows.shape[2:]).swapaxes(1, 2).reshape(rows.shape)
