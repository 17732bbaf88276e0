"""Which weights a checkpoint holds, in one number."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from deepstitch.tensorfile import TensorEntry

__all__ = ["fingerprint"]

_SAMPLE_BYTES = 2048


def fingerprint(entries: Mapping[str, TensorEntry]) -> str:
    """sha256 of every tensor's name, dtype, shape and ends: equal for copies of a checkpoint, whatever its shards.

    Not of all values, which would read the whole checkpoint; whoever trains a tensor changes its ends.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.dtype} {list(entry.shape)}".encode())
        with entry.path.open("rb") as file:
            for start in (0, max(0, entry.nbytes - _SAMPLE_BYTES)):
                file.seek(entry.offset + start)
                digest.update(file.read(min(_SAMPLE_BYTES, entry.nbytes)))
    return digest.hexdigest()
