"""Weights in the layout the kernels read, kept on disk and mapped from there.

ONNX Runtime rearranges ("packs") the weights of most kernels when it loads a graph, into memory of the process: next
to a mapped file that is the model a second time, memory the system can only swap. ONNX Runtime can also write a graph
with its packed weights to a file. Loaded from there, packed weights are pages of a file: read when first used,
shared between processes, dropped under pressure. What it costs: disk, about 2.3 times the graph's weights, and one slow
first load. Loading does not get faster, because ONNX Runtime packs once more to see that the file is right.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnxruntime

from deepstitch.errors import BundleError
from deepstitch.manifest import Graph
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import Array
from deepstitch.runtime.verify import CACHE_VARIABLE, cache_folder

__all__ = ["packed_graph"]

_GROWTH = 2.5  # weights as they are and packed, scales included in both
# Bytes; smaller weights stay inside the graph. ONNX Runtime aligns what is larger than 1 MiB, and packed weights that
# lie behind unaligned ones are read back wrong.
_SMALLEST_EXTERNAL = str((1 << 20) + 1)
_PROBE_SIZES = MappingProxyType({"B": 1, "S": 8, "L": 1, "R": 1, "P": 16, "N+1": 2})
_PROBE_VALUES = MappingProxyType(
    {"query_lengths": 8, "logit_index": 7, "position_ids": range(8), "cu_seqlens": (0, 16)}
)
_PROBE_CAPACITY = 64
_TOLERANCE = 1e-4  # sums may run in another order; misplaced weights give anything

Options = Callable[[], onnxruntime.SessionOptions]


def packed_graph(bundle: Bundle, name: str, session_options: Options) -> Path:
    """The ONNX file of a graph whose weights are packed; written if this machine has none for this bundle.

    Args:
        bundle: an opened bundle.
        name: a graph of it.
        session_options: gives fresh options, those the graph will be loaded with.

    Raises:
        BundleError: the file cannot be written, or does not give what the graph gives.
    """
    folder = cache_folder() / "packed" / _key(bundle, name)
    path = folder / f"{name}.onnx"
    if path.is_file():
        return path
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _sweep(folder.parent)
        _check_space(temporary, sum(record.size for record in bundle.manifest.files.values()))
        _write(bundle.graph_path(name), temporary / path.name, session_options)
        _compare(bundle.graph(name), bundle.graph_path(name), temporary / path.name, session_options)
        _move(temporary, folder, path)
    except OSError as error:
        raise BundleError(
            f"{folder}: packed weights cannot be written ({error.strerror}); free some space, let {CACHE_VARIABLE} "
            "name another folder, or load without packed_cache"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _sweep(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote."""
    for path in folder.glob("*.*"):
        number = path.suffix[1:]
        if number.isdigit() and not Path("/proc", number).exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)


def _move(temporary: Path, folder: Path, path: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not path.is_file():  # otherwise another process was faster
            raise


def _check_space(folder: Path, bundle_bytes: int) -> None:
    needed, free = int(_GROWTH * bundle_bytes), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free >> 20} MiB are free, {needed >> 20} MiB may be needed")


def _compare(graph: Graph, source: Path, target: Path, session_options: Options) -> None:
    """Both files have to give the same numbers.

    ONNX Runtime 1.31 writes packed weights without regard to the alignment they were packed at, which the size limit
    for external weights avoids for every shape seen so far. It does not notice itself: the logits are NaN.
    """
    probe = _probe(graph)
    outputs = []
    for path in (source, target):
        session = _session(path, session_options())
        outputs.append(session.run([graph.outputs[0].name], probe))
        del session  # one at a time
    left, right = (each[0] for each in outputs)
    if not np.allclose(left, right, rtol=_TOLERANCE, atol=_TOLERANCE * np.abs(left).max()):  # so is NaN
        raise BundleError(f"{source}: this graph does not survive packing; load it without packed_cache")


def _probe(graph: Graph) -> dict[str, Array]:
    """Inputs for a short run: eight tokens onto an empty cache, or one picture of 4 x 4 patches."""
    random = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for spec in graph.inputs:
        shape = [size if isinstance(size, int) else _PROBE_SIZES.get(size, _PROBE_CAPACITY) for size in spec.shape]
        value = np.zeros(shape, spec.dtype)
        if spec.name in _PROBE_VALUES:
            value[...] = _PROBE_VALUES[spec.name]
        elif spec.dtype == "float32" and not spec.name.startswith("past_key_values."):
            value[...] = random.standard_normal(shape)
        inputs[spec.name] = value
    return inputs


def _session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _write(source: Path, target: Path, session_options: Options) -> None:
    options = session_options()
    options.optimized_model_filepath = str(target)
    for entry, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", f"{target.stem}.bin"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", _SMALLEST_EXTERNAL),
    ):
        options.add_session_config_entry(entry, value)
    _session(source, options)


def _key(bundle: Bundle, name: str) -> str:
    """Everything the packed layout depends on: the weights, ONNX Runtime, the processor's instructions."""
    files = {file: dataclasses.asdict(record) for file, record in bundle.manifest.files.items()}
    parts = [name, files, onnxruntime.__version__, platform.machine(), _processor()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
