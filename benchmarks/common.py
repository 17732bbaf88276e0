"""What every benchmark needs: the machine in words, medians, JSON, a child process whose peak memory is measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["commit", "machine", "run_child", "spread", "write_report"]

_PACKAGES = ("deepstitch", "torch", "transformers", "onnx", "onnxruntime", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, Python and package versions."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    flags = " ".join(next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "avx512_vnni": "avx512_vnni" in flags,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def run_child(arguments: list[str]) -> dict[str, Any]:
    """Run a command to its end; return its wall seconds and its own peak resident memory.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        stdout, stderr = child.communicate()
    seconds = time.perf_counter() - start
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {child.returncode}\n{stderr}")
    # the largest child so far; callers run the larger one last, or one per process
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": seconds, "peak_rss_bytes": peak, "stdout": stdout}


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the working tree of ``folder``, short, with ``+`` where tracked files differ; None without git."""
    command = ["git", "--no-optional-locks", "-C", str(folder), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_report(name: str, report: dict[str, Any], output: Path | None, *, show: bool = True) -> None:
    """Print a report as JSON, unless it is not to be shown, and write it where asked."""
    text = json.dumps({"benchmark": name, "commit": commit(), "machine": machine(), **report}, indent=1)
    if show:
        sys.stdout.write(text + "\n")
    if output is not None:
        output.write_text(text + "\n", "utf-8")
