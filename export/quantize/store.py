"""Quantized weights on their way into a bundle: finished units survive an interruption."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
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
        self._stem = f".{output.name}.quantize-"
        self.folder = output.absolute().parent / f"{self._stem}{work}"
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

    def state(self, layer: int) -> Path:
        """Where the hidden states in front of a layer are kept; the file exists only for one or two layers."""
        return self.folder / f"hidden.{layer}.state"

    def add_state(self, layer: int, save: Callable[[Path], object]) -> None:
        """Keep the hidden states in front of a layer.

        Args:
            layer: its index; one more than the last for those behind it.
            save: writes them to a path.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.state(layer).with_suffix(".partial")
        save(temporary)
        temporary.replace(self.state(layer))

    def remove_states(self, *, but: int) -> None:
        """Delete all hidden states but those in front of one layer."""
        for path in self.folder.glob("hidden.*.state"):
            if path != self.state(but):
                path.unlink()

    def others(self) -> dict[Path, int]:
        """Folders that exports to the same place with other flags have begun and not finished, and their bytes."""
        pattern = f"{glob.escape(self._stem)}*"
        folders = [path for path in sorted(self.folder.parent.glob(pattern)) if path != self.folder and path.is_dir()]
        return {path: sum(each.stat().st_size for each in path.iterdir()) for path in folders}

    def remove(self) -> None:
        """Delete the folder; the bundle has everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, unit: str) -> Path:
        return self.folder / f"{unit}.safetensors"
