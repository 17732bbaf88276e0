"""Canonical graphs kept in the user's cache folder: tracing takes far longer than the rest of a small export.

A graph depends on the architecture, on the code that traces it and on the libraries that do, and on no weight. All of
that is the key, so that what is found is what would be traced. What is damaged is traced again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
from pathlib import Path

import onnx
import onnx_ir as ir

from deepstitch import models
from deepstitch.export.contract import DECODER, VISION_ENCODER
from deepstitch.models.config import ModelConfig
from deepstitch.plugins.common import mrope_function
from deepstitch.runtime.verify import cache_folder

__all__ = ["canonical_graph"]

_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")
_MAX_BYTES = 256 << 20  # some hundred graphs, or the largest published model's twenty times
_NOWHERE = "weights-are-bound-later"
_DIGEST_BYTES = 32


def canonical_graph(name: str, config: ModelConfig) -> ir.Model:
    """The canonical graph of a config; its initializers are names, shapes and types.

    Args:
        name: ``decoder`` or ``vision_encoder``.
        config: of the model.
    """
    path = cache_folder() / "traces" / f"{_key(name, config)}.onnx"
    content = _read(path)
    if content is None:
        from deepstitch.export import trace  # brings torch

        tracers = {DECODER: trace.trace_decoder, VISION_ENCODER: trace.trace_vision_encoder}
        content = _serialized(tracers[name](config))
        with contextlib.suppress(OSError):  # no room to keep it: the next export takes some seconds more
            _write(path, content)
    return _deserialized(content)  # also what was just traced, so that later names are the same


def _key(name: str, config: ModelConfig) -> str:
    """Of everything a graph depends on; what traces it are the sources of the models and of this folder."""
    digest = hashlib.sha256(repr((name, config.vision if name == VISION_ENCODER else config)).encode())
    digest.update(repr([(library, importlib.metadata.version(library)) for library in _LIBRARIES]).encode())
    folders = (Path(str(models.__file__)).parent, Path(__file__).parent)
    sources = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    for path in (*sources, Path(mrope_function.__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:_DIGEST_BYTES]


def _serialized(model: ir.Model) -> bytes:
    """The graph with weights that point to a file which nobody reads."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None and value.shape is not None, "a traced weight has a type and a shape"
            value.const_value = ir.ExternalTensor(_NOWHERE, 0, 0, value.dtype, shape=ir.Shape(value.shape), name=name)
    return ir.serde.serialize_model(model).SerializeToString()


def _deserialized(content: bytes) -> ir.Model:
    model = ir.serde.deserialize_model(onnx.load_from_string(content))
    for value in model.graph.initializers.values():
        pointer = value.const_value
        if isinstance(pointer, ir.ExternalTensor):
            value.dtype, value.shape, value.const_value = pointer.dtype, ir.Shape(pointer.shape), None
    return model


def _read(path: Path) -> bytes | None:
    """A graph that was kept; None: there is none, or it is damaged."""
    try:
        stored = path.read_bytes()
        os.utime(path)  # used now; the oldest are removed first
    except OSError:
        return None
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_room(path.parent, len(content))
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_room(folder: Path, nbytes: int) -> None:
    """Remove the graphs that were not used for longest, until there is room for another."""
    ages = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*.onnx"))
    total = sum(size for _, size, _ in ages) + nbytes
    for _, size, path in ages:
        if total <= _MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size
