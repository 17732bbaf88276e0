"""The bundle on disk: weights streamed tensor by tensor, graphs, copied files, manifest; all or nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from deepstitch.errors import OutputError
from deepstitch.manifest import FileRecord, file_sha256
from deepstitch.tensorfile import DTYPE_BYTES, TensorEntry

__all__ = [
    "COPIED_FILES",
    "REFERENCE_FOLDER",
    "WEIGHTS_FILE",
    "BackgroundHashes",
    "WritableTensor",
    "atomic_folder",
    "copy_files",
    "link_checkpoint",
    "refuse_existing",
    "write_weights",
]

WEIGHTS_FILE = "weights.safetensors"
REFERENCE_FOLDER = "checkpoint"
COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_ALIGNMENT = 4096  # of the first tensor, so that mapped pages start with it
Progress = Callable[[int], object]


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``target`` on success and vanishes on any failure.

    Args:
        target: the folder to create.
        overwrite: replace an existing bundle folder.

    Raises:
        OutputError: the folder exists and may not be replaced, or cannot be written.
    """
    target = target.absolute()
    refuse_existing(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"-o {target}: cannot be written ({error.strerror})") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(previous / target.name)
            temporary.rename(target)
            shutil.rmtree(previous)
        else:
            temporary.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"-o {target}: the disk is full; nothing was written") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is a bundle and may be replaced.

    Raises:
        OutputError: it may not.
    """
    if not target.exists():
        return
    if not overwrite:
        raise OutputError(f"-o {target}: exists already; choose another folder or pass --overwrite")
    if not target.is_dir() or (not (target / "manifest.json").is_file() and any(target.iterdir())):
        raise OutputError(f"-o {target}: is not a bundle, so --overwrite does not replace it; choose another folder")


class WritableTensor(Protocol):
    """A tensor of a weight file that is to be written."""

    @property
    def name(self) -> str:
        """In the file."""
        ...

    @property
    def dtype(self) -> str:
        """Of safetensors."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        ...

    @property
    def nbytes(self) -> int:
        """In the file."""
        ...

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """The stored bytes in order, a bounded block at a time."""
        ...


def write_weights(
    tensors: Iterable[WritableTensor], path: Path, progress: Progress
) -> tuple[dict[str, TensorEntry], FileRecord]:
    """Write one safetensors file, a bounded block of one tensor at a time.

    Args:
        tensors: what to write.
        path: the file.
        progress: called with the number of bytes just written.

    Returns:
        Where each tensor lies, and the file's identity.
    """
    # Wide dtypes first keeps every tensor aligned to its element size; the format allows no gaps.
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    entries: dict[str, TensorEntry] = {}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    start = 8 + len(encoded)
    digest = hashlib.sha256()
    position = start
    with path.open("wb") as file:
        for piece in (len(encoded).to_bytes(8, "little"), encoded):
            digest.update(piece)
            file.write(piece)
        for tensor in ordered:
            entries[tensor.name] = TensorEntry(path, tensor.name, tensor.dtype, tensor.shape, position, tensor.nbytes)
            for block in tensor.blocks():
                view = block.data.cast("B") if block.size else b""
                digest.update(view)
                file.write(view)
                progress(block.nbytes)
            position += tensor.nbytes
    return entries, FileRecord(sha256=digest.hexdigest(), size=position)


class BackgroundHashes:
    """Hashes files in threads while the caller does something else; leaving the context abandons what is not done.

    Reading and hashing 61 GB takes as long as tracing the graphs, and neither needs the other.
    """

    def __init__(self, paths: Iterable[Path], progress: Progress) -> None:
        """Start.

        Args:
            paths: the files.
            progress: called, from any thread, with the number of bytes just hashed.
        """
        self._progress = progress
        self._abandoned = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        self._digests = {path: self._pool.submit(file_sha256, path, self._advance, past_cache=True) for path in paths}

    def _advance(self, count: int) -> None:
        if self._abandoned.is_set():
            raise CancelledError
        self._progress(count)

    def __enter__(self) -> BackgroundHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._abandoned.set()
        self._pool.shutdown(cancel_futures=True)

    def records(self) -> dict[Path, FileRecord]:
        """Wait for all files and return their identities."""
        return {
            path: FileRecord(sha256=digest.result(), size=path.stat().st_size) for path, digest in self._digests.items()
        }


def link_checkpoint(shards: Iterable[Path], folder: Path) -> None:
    """Hard-link the checkpoint's shards into the bundle: no second copy, and the bundle outlives the checkpoint folder.

    A symbolic link or a path outside the bundle would do as well on disk, but ONNX Runtime refuses weights that lie
    outside the graph's folder.

    Args:
        shards: the checkpoint's safetensors files.
        folder: the bundle.

    Raises:
        OutputError: the bundle is on another file system.
    """
    (folder / REFERENCE_FOLDER).mkdir()
    for shard in shards:
        try:
            os.link(shard.resolve(), folder / REFERENCE_FOLDER / shard.name)
        except OSError as error:
            raise OutputError(
                f"--by-reference: cannot hard-link {shard} into the bundle ({error.strerror}); put the bundle on "
                "the checkpoint's file system, or leave the flag out to write a copy"
            ) from None


def copy_files(checkpoint: Path, folder: Path) -> list[Path]:
    """Copy processor, tokenizer and template files untouched; return the copies."""
    copies = []
    for name in COPIED_FILES:
        if (checkpoint / name).is_file():
            copies.append(Path(shutil.copyfile(checkpoint / name, folder / name)))
    return copies
