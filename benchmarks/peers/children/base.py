"""What every child does: open the runtime, measure the figures it is asked for, write what it found as it goes."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.peers.figures import DECODE_STEPS, FIGURES, IMAGE_TEXT_TOKENS, Figure
from benchmarks.peers.quality import divergence

__all__ = ["NotSupported", "Runtime", "main", "picture", "random_ids"]

_MIN_SECONDS = 1.0
_MAX_REPEATS = 5
_ERROR_END = 150
_SMALL = (256, 256)  # picture to warm up with


class NotSupported(RuntimeError):
    """The runtime cannot do this; the message says why."""


class Runtime(Protocol):
    """What a child measures. ``settings`` are the runtime's own, for this figure."""

    def prefill(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """Seconds from token ids to the logits of the last one, from an empty context."""

    def decode(self, ids: npt.NDArray[np.int64], steps: int, settings: dict[str, Any]) -> list[float]:
        """Seconds of each of ``steps`` greedy steps after the context ``ids``."""

    def encode(self, pixels: npt.NDArray[np.uint8], settings: dict[str, Any]) -> float:
        """Seconds of the vision encoder alone, preprocessing left out."""

    def first_token(self, pixels: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> float:
        """Seconds from pixels and the ids of the text after them to the first token."""

    def logits(self, ids: npt.NDArray[np.int64], settings: dict[str, Any]) -> npt.NDArray[np.float32]:
        """``(n, vocab)`` logits of every position."""

    def notes(self) -> dict[str, Any]:
        """What else is worth noting about the latest figure: bytes of the cache, time outside the engine."""


def random_ids(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Token ids of plain text tokens; the sample tokenizer's own, which every vocabulary here holds."""
    return np.random.default_rng(seed).integers(0, 890, count)


def picture(width: int, height: int) -> npt.NDArray[np.uint8]:
    """``(height, width, 3)`` noise."""
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def main(open_runtime: Callable[[dict[str, Any]], Runtime]) -> None:
    """Read the request named on the command line, measure, and keep the result file up to date."""
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    version = importlib.metadata.version(request["package"])
    result: dict[str, Any] = {"runs": [], "version": version, "base_rss_bytes": _resident("VmRSS")}
    target = Path(request["result"])

    def save() -> None:
        temporary = target.with_suffix(".part")
        temporary.write_text(json.dumps(result), "utf-8")
        temporary.replace(target)

    try:
        start = time.perf_counter()
        runtime = open_runtime(request)
        result["load_seconds"] = time.perf_counter() - start
    except Exception as error:
        result["error"] = _one_line(error)
        save()
        return
    result["loaded_rss_bytes"] = _resident("VmRSS")
    for run in request["runs"]:
        try:
            found = _measure(runtime, FIGURES[run["figure"]], run["settings"], request, result)
        except Exception as error:
            found = {"error": _one_line(error)}
        result["runs"].append({**run, **found})
        save()
    sys.stdout.flush()
    os._exit(0)  # no teardown of native libraries: it is not measured, and some of them crash in it


def _measure(
    runtime: Runtime, figure: Figure, settings: dict[str, Any], request: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    gc.collect()
    _reset_peak()
    value, extra = MEASURES[figure.kind](runtime, figure, settings, request, result)
    return {"value": value, **extra, **runtime.notes(), "peak_rss_bytes": _resident("VmHWM")}


def _prefill(
    runtime: Runtime, figure: Figure, settings: dict[str, Any], request: dict[str, Any], *_: Any
) -> tuple[float, dict[str, Any]]:
    ids = random_ids(figure.tokens)
    warm_up = figure.tokens if request["open"].get("compile") else min(figure.tokens, 256)  # compiled per shape
    runtime.prefill(ids[:warm_up], settings)
    return figure.tokens / _median(lambda: runtime.prefill(ids, settings)), {}


def _decode(
    runtime: Runtime, figure: Figure, settings: dict[str, Any], request: dict[str, Any], *_: Any
) -> tuple[float, dict[str, Any]]:
    steps = runtime.decode(random_ids(figure.tokens), request.get("steps", DECODE_STEPS) + 4, settings)[4:]
    return len(steps) / sum(steps), {"best_step_seconds": min(steps), "median_step_seconds": statistics.median(steps)}


def _image(
    runtime: Runtime, figure: Figure, settings: dict[str, Any], request: dict[str, Any], *_: Any
) -> tuple[float, dict[str, Any]]:
    pixels = picture(*figure.size)
    runtime.encode(pixels if request["open"].get("compile") else picture(*_SMALL), settings)
    return _median(lambda: runtime.encode(pixels, settings)), {}


def _first_token(
    runtime: Runtime, figure: Figure, settings: dict[str, Any], request: dict[str, Any], *_: Any
) -> tuple[float, dict[str, Any]]:
    pixels, ids = picture(*figure.size), random_ids(IMAGE_TEXT_TOKENS - 2)  # two more stand around the picture
    runtime.first_token(pixels if request["open"].get("compile") else picture(*_SMALL), ids, settings)
    return _median(lambda: runtime.first_token(pixels, ids, settings)), {}


def _load(
    runtime: Runtime, _: Figure, settings: dict[str, Any], __: dict[str, Any], result: dict[str, Any]
) -> tuple[float, dict[str, Any]]:
    start = time.perf_counter()
    runtime.prefill(random_ids(1), settings)
    return result["load_seconds"], {"first_prompt_seconds": time.perf_counter() - start}


def _memory(
    runtime: Runtime, figure: Figure, settings: dict[str, Any], __: dict[str, Any], result: dict[str, Any]
) -> tuple[float, dict[str, Any]]:
    runtime.decode(random_ids(figure.tokens), 8, settings)
    return _resident("VmHWM") / 2**20, {"base_mib": result["base_rss_bytes"] / 2**20}


def _quality(
    runtime: Runtime, figure: Figure, settings: dict[str, Any], request: dict[str, Any], *_: Any
) -> tuple[float, dict[str, Any]]:
    reference = request["reference"]
    logits = runtime.logits(random_ids(figure.tokens), settings)
    if request.get("write_reference"):
        np.save(reference, logits)
    found = divergence(np.load(reference), logits)
    return found.pop("kl"), found


MEASURES: dict[str, Callable[..., tuple[float, dict[str, Any]]]] = {
    "prefill": _prefill,
    "decode": _decode,
    "image": _image,
    "first_token": _first_token,
    "load": _load,
    "memory": _memory,
    "quality": _quality,
}


def _median(run: Callable[[], float]) -> float:
    """Median over as many runs as fit a second, one at least."""
    seconds: list[float] = []
    while len(seconds) < _MAX_REPEATS and sum(seconds) < _MIN_SECONDS:
        seconds.append(run())
    return statistics.median(seconds)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) > 2 * _ERROR_END:  # libraries say what was wrong first or last, and C++ signatures in between
        text = f"{text[:_ERROR_END]} … {text[-_ERROR_END:]}"
    return f"{type(error).__name__}: {text}"


def _resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (most since the last reset); 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
