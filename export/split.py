"""One half of a bundle as a bundle of its own: for the encode process or for the language process of a pair.

The halves keep what both processes need: token embedding, tokenizer, chat template, pixel settings and the manifest's
facts. Of the weights each has those that its graph reads, byte for byte as they were compared with the model.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from tqdm.auto import tqdm

from deepstitch.errors import BundleError, InputError
from deepstitch.export.writer import WEIGHTS_FILE, atomic_folder, refuse_existing, write_weights
from deepstitch.manifest import MANIFEST_NAME, EmbeddingTable, FileRecord, Manifest, file_sha256
from deepstitch.runtime.bundle import DECODER, VISION_ENCODER, Bundle
from deepstitch.runtime.verify import remember_files
from deepstitch.tensorfile import TensorEntry, TensorFile

__all__ = ["SIDES", "split_bundle"]

SIDES = MappingProxyType({"encode": VISION_ENCODER, "language": DECODER})
"""Graph of each side."""

_BLOCK_BYTES = 64 << 20
_BESIDE = (".scales", ".zero_points")  # of a table of integers

Place = tuple[str, int, int]  # file, first byte, bytes


@dataclass(frozen=True, slots=True)
class _CopiedTensor:
    """A tensor of a bundle on its way into another."""

    entry: TensorEntry
    name: str

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The stored bytes in order, a bounded block at a time."""
        flat = np.asarray(self.entry.read()).reshape(-1)
        step = _BLOCK_BYTES // flat.itemsize
        for start in range(0, len(flat), step):
            yield flat[start : start + step]


def split_bundle(bundle: Bundle, side: str, output: Path, *, overwrite: bool = False, progress: bool = True) -> Path:
    """Write one half of ``bundle``; it appears whole or not at all.

    Args:
        bundle: a whole one.
        side: one of :data:`SIDES`.
        output: folder to create.
        overwrite: replace an existing bundle.
        progress: show a bar on stderr.

    Raises:
        InputError: the model reads text only.
        OutputError: the folder exists, or cannot be written.
        BundleError: the graph's weights are not those of the bundle's files.
    """
    manifest, name = bundle.manifest, SIDES[side]
    if manifest.vision is None:
        raise InputError(f"{bundle.folder}: this model reads text only; there is nothing to split")
    if output.resolve() == bundle.folder.resolve():
        raise InputError(f"{output}: is the bundle itself; choose another folder for its half")
    refuse_existing(output, overwrite=overwrite)
    model = onnx.load(bundle.graph_path(name), load_external_data=False)
    stored = _stored(bundle)
    table = _table(bundle)
    names = _names((*table, *(stored[place] for place in _places(bundle, model, stored))))
    total = sum(entry.nbytes for entry in names)
    with (
        atomic_folder(output, overwrite=overwrite) as folder,
        tqdm(total=total, desc=f"{side} side", unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        tensors = [_CopiedTensor(entry, name) for entry, name in names.items()]
        written, record = write_weights(tensors, folder / WEIGHTS_FILE, bar.update)
        _point_at(model, {place: written[names[entry]] for place, entry in stored.items() if entry in names})
        files = {WEIGHTS_FILE: record}
        graph = folder / manifest.graphs[name].file
        onnx.save(model, graph)
        onnx.checker.check_model(graph)
        for path in (graph, *_copy_others(bundle, folder)):
            files[path.relative_to(folder).as_posix()] = FileRecord(sha256=file_sha256(path), size=path.stat().st_size)
        half = dataclasses.replace(
            manifest,
            graphs={name: manifest.graphs[name]},
            files=files,
            embedding=EmbeddingTable(file=WEIGHTS_FILE, tensor=table[0].name, stored=manifest.embedding.stored),
            command=f"{manifest.command} && {shlex.join(_words(bundle, side, output))}",
            checkpoint=_checkpoint(bundle, output),
        )
        (folder / MANIFEST_NAME).write_text(half.to_json(), "utf-8")
    remember_files(output, half)
    return output


def _stored(bundle: Bundle) -> dict[Place, TensorEntry]:
    """Every tensor of the bundle's weight files, by where it lies."""
    found = {}
    for file in _weight_files(bundle.manifest):
        for entry in TensorFile.open(bundle.folder / file).values():
            found[file, entry.offset, entry.nbytes] = entry
    return found


def _weight_files(manifest: Manifest) -> list[str]:
    return [file for file in manifest.files if file.endswith(".safetensors")]


def _table(bundle: Bundle) -> list[TensorEntry]:
    """The token embedding, then what lies beside a table of integers."""
    place = bundle.manifest.embedding
    tensors = TensorFile.open(bundle.folder / place.file)
    beside = [place.tensor + each for each in _BESIDE] if place.stored else []
    return [tensors[place.tensor], *(tensors[each] for each in beside if each in tensors)]


def _weights(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, Place]]:
    """Initializers that lie outside of the graph's file."""
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            yield tensor, (info.location, info.offset or 0, info.length or 0)


def _places(bundle: Bundle, model: onnx.ModelProto, stored: Mapping[Place, TensorEntry]) -> list[Place]:
    places = []
    for tensor, place in _weights(model):
        if place not in stored:
            raise BundleError(
                f"{bundle.folder}: initializer '{tensor.name}' is no tensor of the bundle's weight files; export again"
            )
        places.append(place)
    return places


def _names(entries: Iterable[TensorEntry]) -> dict[TensorEntry, str]:
    """What each is called in one file; a bundle by reference may have two of a name in several."""
    names: dict[TensorEntry, str] = {}
    taken: set[str] = set()
    for entry in dict.fromkeys(entries):
        name = entry.name
        while name in taken:
            name += "_"
        taken.add(name)
        names[entry] = name
    return names


def _point_at(model: onnx.ModelProto, moved: Mapping[Place, TensorEntry]) -> None:
    """Let the initializers find their bytes in the new file."""
    for tensor, place in list(_weights(model)):
        entry = moved[place]
        del tensor.external_data[:]
        for key, value in (("location", WEIGHTS_FILE), ("offset", entry.offset), ("length", entry.nbytes)):
            tensor.external_data.add(key=key, value=str(value))


def _copy_others(bundle: Bundle, folder: Path) -> Iterator[Path]:
    """Files that are neither graphs nor weights."""
    manifest = bundle.manifest
    left_out = {graph.file for graph in manifest.graphs.values()} | set(_weight_files(manifest))
    for file in manifest.files:
        if file not in left_out:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            yield Path(shutil.copyfile(bundle.folder / file, folder / file))


def _words(bundle: Bundle, side: str, output: Path) -> list[str]:
    return ["deepstitch", "split", bundle.folder.resolve().name, f"--{side}-side", output.name]


def _checkpoint(bundle: Bundle, output: Path) -> str | None:
    """Where the checkpoint is, seen from the new folder."""
    if bundle.manifest.checkpoint is None:
        return None
    return Path(os.path.relpath((bundle.folder / bundle.manifest.checkpoint).resolve(), output.resolve())).as_posix()
