"""Is there room for the reference? Asked before anything is loaded or written."""

from __future__ import annotations

import math
import os
from pathlib import Path

from deepstitch.errors import UnsupportedError
from deepstitch.models.checkpoint import Checkpoint

__all__ = ["check_memory", "free_memory_bytes", "reference_bytes"]

_FLOAT_BYTES = 4
_OVERHEAD_BYTES = 1 << 30  # torch itself, activations, and the stages that are kept
_GIB = 1 << 30
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def reference_bytes(checkpoint: Checkpoint, expert_layout: str | None = None) -> int:
    """Memory the reference takes: parameters in float32, the largest twice while it is read, overhead.

    The bundle is loaded after the reference is gone; it takes no more than that.
    """
    sizes = [math.prod(source.shape) for source in checkpoint.sources(expert_layout=expert_layout).values()]
    return _FLOAT_BYTES * (sum(sizes) + max(sizes)) + _OVERHEAD_BYTES


def free_memory_bytes() -> int:
    """Memory free on the machine, or in this process's control group if that is less."""
    free = [_machine_bytes()]
    try:
        limit, used = ((_CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            free.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no control groups, or of the first version
    return max(0, min(free))


def _machine_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(folder: Path, expert_layout: str | None = None) -> None:
    """Refuse a reference that does not fit.

    Raises:
        UnsupportedError: it does not; the message has the numbers.
        CheckpointError: the checkpoint is damaged.
    """
    needed, free = reference_bytes(Checkpoint.open(folder), expert_layout), free_memory_bytes()
    if needed > free:
        raise UnsupportedError(
            f"{folder}: to compare, this model is loaded in float32, which takes {needed / _GIB:.1f} GiB; "
            f"{free / _GIB:.1f} GiB are free. Export with --no-compare, or compare on a larger machine"
        )
