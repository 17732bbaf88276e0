"""What the builder measured about kernels, kept from build to build."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

__all__ = ["TimingCache"]

_LOG = logging.getLogger("deepstitch.tensorrt")


class TimingCache:
    """Of one build; every engine of it adds what it measured."""

    def __init__(self, *sources: Path) -> None:
        """Begin with the first file that can be read.

        Args:
            sources: the most wanted first; one that is damaged is passed over, as all of it can be measured again.
        """
        self._data = next((data for data in map(_read, sources) if data), b"")

    def attach(self, config: Any) -> None:
        """Give it to a builder; what is of another TensorRT or card, or damaged, is of no use and begun anew."""
        if not self._data or not _accepted(config, self._data):
            _accepted(config, b"")

    def take(self, config: Any) -> None:
        """Keep what a builder has after its work."""
        cache = config.get_timing_cache()
        if cache is not None:
            self._data = bytes(cache.serialize())

    def write(self, path: Path) -> None:
        """Write it."""
        path.write_bytes(self._data)


def _accepted(config: Any, data: bytes) -> bool:
    try:
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
    except (RuntimeError, TypeError, ValueError) as error:
        _LOG.debug("timing cache: %s", error)
    if data:
        _LOG.warning("the timing cache is damaged, or of another TensorRT or card; everything is measured again")
    return False


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
