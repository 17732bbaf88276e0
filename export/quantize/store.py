"""Quantized weights on their way into a bundle: finished units survive an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from deepstitch.tensorfile import TensorEntry, TensorFile

__all__ = ["QuantizedStore", "identity"]


def identity(facts: Mapping[str, Any]) -> str:
    """Short digest of everything that decides the integers."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


class QuantizedStore:
    """A folder of one safetensors file per finished unit, next to the bundle that is being made.

    Its name holds the identity of the work, so that the same command finds it again and another one does not.
    """

    def __init__(self, output: Path, work: str) -> None:
        """Open; the folder is created with the first unit.

        Args:
            output: the bundle folder to come.
            work: see :func:`identity`.
        """
        self.folder = output.absolute().parent / f".{output.name}.quantize-{work}"
        self._entries: dict[str, TensorEntry] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._entries.update(TensorFile.open(path))

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def has_unit(self, unit: str) -> bool:
        """Whether a unit was finished, now or before an interruption."""
        return self._path(unit).is_file()

    def add_unit(self, unit: str, arrays: Mapping[str, Any]) -> None:
        """Write all tensors of a unit; it counts as finished once the file has its name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(unit)
        temporary = path.with_suffix(".partial")
        safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        temporary.replace(path)
        self._entries.update(TensorFile.open(path))

    def remove(self) -> None:
        """Delete the folder; the bundle has everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, unit: str) -> Path:
        return self.folder / f"{unit}.safetensors"
