"""Checkpoint folders: which tensor of which shard fills which parameter, with nothing missing and nothing left over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from deepstitch.errors import CheckpointError, did_you_mean, list_names
from deepstitch.models.config import ModelConfig
from deepstitch.tensorfile import TensorEntry, TensorFile, to_float32

__all__ = ["EXPERT_LAYOUTS", "Checkpoint", "WeightSource"]

EXPERT_LAYOUTS = ("hub", "transformers")
_FLOAT_DTYPES = ("F32", "F16", "BF16")
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # old savers wrote the constant frequencies
Float32 = npt.NDArray[np.float32]


class WeightSource(Protocol):
    """One model parameter as it can be read from disk, in pieces along its first axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""

    @property
    def dtype(self) -> str:
        """Safetensors dtype name on disk."""

    @property
    def in_place(self) -> TensorEntry | None:
        """The stored tensor, where its bytes are exactly this parameter; else None."""

    def read_float32(self, start: int = 0, stop: int | None = None) -> Float32:
        """Read rows ``start:stop`` of the first axis as a fresh float32 array."""

    def read_columns_float32(self, start: int, stop: int) -> Float32:
        """Read columns ``start:stop`` of a matrix as a fresh float32 array."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A parameter stored as it is."""

    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """Safetensors dtype name on disk."""
        return self.entry.dtype

    @property
    def in_place(self) -> TensorEntry | None:
        """The stored tensor itself."""
        return self.entry

    def read_float32(self, start: int = 0, stop: int | None = None) -> Float32:
        """Read rows ``start:stop`` of the first axis as a fresh float32 array."""
        return to_float32(self.entry.read()[start:stop], self.entry.dtype)

    def read_columns_float32(self, start: int, stop: int) -> Float32:
        """Read columns ``start:stop`` of a matrix as a fresh float32 array."""
        return to_float32(self.entry.read()[:, start:stop], self.entry.dtype)


class _NotAMatrix:
    """Experts have three axes; only matrices are read by columns."""

    def read_columns_float32(self, start: int, stop: int) -> Float32:
        """Refuse: experts are read one by one.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} holds stacked experts, not a matrix")


@dataclass(frozen=True, slots=True)
class TransposedExperts(_NotAMatrix):
    """Stacked experts whose last two axes are stored the other way round (transformers 5)."""

    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter: the stored one with the last two axes swapped."""
        experts, rows, columns = self.entry.shape
        return experts, columns, rows

    @property
    def dtype(self) -> str:
        """Safetensors dtype name on disk."""
        return self.entry.dtype

    @property
    def in_place(self) -> TensorEntry | None:
        """None: the bytes are in another order."""
        return None

    def read_float32(self, start: int = 0, stop: int | None = None) -> Float32:
        """Read experts ``start:stop``."""
        stored = to_float32(self.entry.read()[start:stop], self.entry.dtype)
        return np.ascontiguousarray(stored.swapaxes(1, 2))


@dataclass(frozen=True, slots=True)
class SeparateExperts(_NotAMatrix):
    """Experts stored one linear layer at a time (Qwen3-MoE text): stacked, transposed and concatenated on
    reading.

    Attributes:
        parts: per expert, the tensors ``[rows, columns]`` whose transposes lie side by side in the parameter.
    """

    parts: tuple[tuple[TensorEntry, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        rows = sum(entry.shape[0] for entry in self.parts[0])
        return len(self.parts), self.parts[0][0].shape[1], rows

    @property
    def dtype(self) -> str:
        """Safetensors dtype name on disk."""
        return self.parts[0][0].dtype

    @property
    def in_place(self) -> TensorEntry | None:
        """None: no single stored tensor has these bytes."""
        return None

    def read_float32(self, start: int = 0, stop: int | None = None) -> Float32:
        """Read experts ``start:stop``."""
        experts = []
        for entries in self.parts[start:stop]:
            linear = [to_float32(entry.read(), entry.dtype) for entry in entries]
            experts.append(np.concatenate(linear).T)
        return np.ascontiguousarray(np.stack(experts))


class Checkpoint:
    """An opened checkpoint folder: config and tensor headers; no tensor data is read."""

    def __init__(self, folder: Path, config: ModelConfig, entries: dict[str, TensorEntry]) -> None:
        self.folder = folder
        self.config = config
        self.entries: Mapping[str, TensorEntry] = entries

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and the headers of all shards.

        Raises:
            CheckpointError: a file is missing or damaged, or two shards hold the same tensor.
            ConfigError: config.json cannot be used.
            UnsupportedError: the model is not supported.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder; deepstitch reads local folders, download the checkpoint first (hf download)"
            )
        config = ModelConfig.from_file(folder)
        entries: dict[str, TensorEntry] = {}
        for path in _shards(folder):
            for name, entry in TensorFile.open(path).items():
                if name in entries:
                    raise CheckpointError(f"tensor '{name}' is in two files: {entries[name].path.name} and {path.name}")
                entries[name] = entry
        _check_index(folder, entries)
        return cls(folder, config, entries)

    @property
    def files(self) -> tuple[Path, ...]:
        """The shards that hold tensors, sorted."""
        return tuple(sorted({entry.path for entry in self.entries.values()}))

    def sources(self, *, language_only: bool = False, expert_layout: str | None = None) -> dict[str, WeightSource]:
        """Account for every tensor of the checkpoint and every parameter of the model.

        Args:
            language_only: fill the language side of a disaggregated pair; ``model.visual.*`` is ignored by
                name.
            expert_layout: one of :data:`EXPERT_LAYOUTS`, where the shapes cannot tell.

        Returns:
            For every parameter name of :func:`deepstitch.models.build_model` where to read it.

        Raises:
            CheckpointError: a tensor is missing, left over, misshapen or of a non-float dtype.
        """
        from deepstitch.models.build import expected_parameters

        available = {name: entry for name, entry in self.entries.items() if not name.endswith(_IGNORED_SUFFIXES)}
        prefix = ""
        if language_only and self.config.vision is not None:
            available = {name: entry for name, entry in available.items() if not name.startswith("model.visual.")}
            prefix = "model.language_model."
        expected = expected_parameters(self.config, language_only=language_only)
        sources: dict[str, WeightSource] = {}
        used: set[str] = set()
        missing: list[str] = []
        for name, shape in expected.items():
            stored = prefix + name.removeprefix("model.") if prefix and name.startswith("model.") else name
            found = self._find(stored, shape, available, expert_layout)
            if found is None:
                missing.append(stored)
                continue
            source, names = found
            used.update(names)
            sources[name] = source
        if self.config.text.tie_word_embeddings and "lm_head.weight" in available:
            _check_tied_head(available["lm_head.weight"], sources)
            used.add("lm_head.weight")
        self._refuse(missing, set(available) - used)
        return sources

    def _refuse(self, missing: list[str], extra: Iterable[str]) -> None:
        extra = set(extra)
        if missing and extra:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} tensors are missing ({list_names(missing)}) and {len(extra)} "
                "are not part "
                f"of a {self.config.model_type} model ({list_names(extra)}); config.json and weights do not "
                "belong together"
            )
        if missing:
            hint = did_you_mean(missing[0], self.entries)
            raise CheckpointError(f"{self.folder}: {len(missing)} tensors are missing: {list_names(missing)}{hint}")
        if extra:
            raise CheckpointError(
                f"{self.folder}: {len(extra)} tensors are not part of a {self.config.model_type} model with "
                "this config: "
                f"{list_names(extra)}"
            )

    def _find(
        self,
        name: str,
        shape: tuple[int, ...],
        available: Mapping[str, TensorEntry],
        expert_layout: str | None,
    ) -> tuple[WeightSource, list[str]] | None:
        """The source of one parameter and the stored names it uses, or None where the tensor is missing."""
        if ".mlp.experts." in name:
            return self._find_experts(name, shape, available, expert_layout)
        entry = available.get(name)
        if entry is None:
            return None
        _check_dtype(entry)
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.path}: tensor '{name}' is {list(entry.shape)}, config.json asks for {list(shape)}"
            )
        return StoredTensor(entry), [name]

    def _find_experts(
        self,
        name: str,
        shape: tuple[int, ...],
        available: Mapping[str, TensorEntry],
        expert_layout: str | None,
    ) -> tuple[WeightSource, list[str]] | None:
        stem, which = name.rsplit(".", 1)
        gate_up, down = available.get(f"{stem}.gate_up_proj"), available.get(f"{stem}.down_proj")
        if gate_up is not None and down is not None:
            _check_dtype(gate_up)
            _check_dtype(down)
            layout = self._expert_layout(gate_up, down, expert_layout)
            entry = gate_up if which == "gate_up_proj" else down
            return (StoredTensor(entry) if layout == "hub" else TransposedExperts(entry)), [name]
        parts = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
        width = shape[2] // len(parts)
        rows = []
        for expert in range(shape[0]):
            names = [f"{stem}.{expert}.{part}.weight" for part in parts]
            if any(part not in available for part in names):
                return None
            for part in names:
                _check_dtype(available[part])
                if available[part].shape != (width, shape[1]):
                    found = list(available[part].shape)
                    raise CheckpointError(f"tensor '{part}' is {found}, config.json asks for {[width, shape[1]]}")
            rows.append(tuple(available[part] for part in names))
        return SeparateExperts(tuple(rows)), [entry.name for row in rows for entry in row]

    def _expert_layout(self, gate_up: TensorEntry, down: TensorEntry, stated: str | None) -> str:
        """Decide by the pair of shapes, so that one square matrix does not mislead."""
        text = self.config.text
        experts, hidden, width = text.num_experts, text.hidden_size, text.moe_intermediate_size
        shapes = {
            "hub": ((experts, hidden, 2 * width), (experts, width, hidden)),
            "transformers": ((experts, 2 * width, hidden), (experts, hidden, width)),
        }
        fitting = [layout for layout, pair in shapes.items() if pair == (gate_up.shape, down.shape)]
        if not fitting:
            raise CheckpointError(
                f"{gate_up.path}: experts '{gate_up.name}' {list(gate_up.shape)} and '{down.name}' "
                f"{list(down.shape)} fit "
                f"neither layout of E={experts}, H={hidden}, I={width}: expected {_either(shapes)}"
            )
        if stated is not None and stated not in fitting:
            raise CheckpointError(
                f"--expert-layout {stated} contradicts the shape of '{gate_up.name}' {list(gate_up.shape)}"
            )
        if stated is None and len(fitting) > 1:
            raise CheckpointError(f"the shapes of '{gate_up.name}' fit both layouts; state one with --expert-layout")
        return stated or fitting[0]


def _either(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    return " or ".join(f"{list(gate_up)} with {list(down)}" for gate_up, down in shapes.values())


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype not in _FLOAT_DTYPES:
        raise CheckpointError(
            f"{entry.path}: tensor '{entry.name}' has dtype {entry.dtype}; weights must be one of "
            f"{', '.join(_FLOAT_DTYPES)}"
        )


def _check_tied_head(head: TensorEntry, sources: Mapping[str, WeightSource]) -> None:
    """Some savers write the tied matrix twice; two different matrices mean that config.json is wrong."""
    name = next((name for name in sources if name.endswith("embed_tokens.weight")), None)
    if name is None:
        return  # reported as missing
    embedding, step = sources[name], 4096
    _check_dtype(head)
    equal = head.shape == embedding.shape and all(
        np.array_equal(StoredTensor(head).read_float32(row, row + step), embedding.read_float32(row, row + step))
        for row in range(0, head.shape[0], step)
    )
    if not equal:
        raise CheckpointError(
            f"{head.path}: tie_word_embeddings is true, but lm_head.weight differs from {name}; "
            "set tie_word_embeddings to false in config.json if the model has a head of its own"
        )


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(names)} shards are missing: {list_names(missing)}; download them"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    raise CheckpointError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json; only safetensors are read"
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        valid = isinstance(weight_map, dict) and all(
            isinstance(name, str) and "/" not in name and "\\" not in name for name in weight_map.values()
        )
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from None
    if not valid:
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names in this folder")
    return weight_map


def _check_index(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in entries:
            raise CheckpointError(f"{index}: tensor '{name}' should be in {file} but is not there")
        if entries[name].path.name != file:
            raise CheckpointError(f"{index}: tensor '{name}' should be in {file} but is in {entries[name].path.name}")
