"""Bytes per second that all threads together read from memory: ``python -m benchmarks.peers.measure_bandwidth 2``.

Each thread takes the dot product of its part of an array far larger than the caches, block by block; numpy releases the
interpreter's lock meanwhile. Prints the best of several passes as JSON.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import threading
import time

import numpy as np
import numpy.typing as npt

TOTAL_BYTES = 1 << 30
PASSES = 6
_BLOCK = 1 << 20


def _read(part: npt.NDArray[np.float32]) -> None:
    for start in range(0, len(part), _BLOCK):
        block = part[start : start + _BLOCK]
        np.dot(block, block)


def measure(threads: int) -> float:
    """Bytes per second."""
    parts = [np.ones(TOTAL_BYTES // 4 // threads, np.float32) for _ in range(threads)]
    best = 0.0
    for _ in range(PASSES):
        workers = [threading.Thread(target=_read, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"bytes_per_second": measure(int(sys.argv[1]))}) + "\n")
