"""Engines run the graphs of a bundle. They differ in how; everything above them sees this protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from deepstitch.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from deepstitch.runtime.bundle import Bundle
    from deepstitch.runtime.preprocess import VisionBatch

__all__ = ["ENGINES", "Array", "BoundRun", "Engine", "GraphRunner", "open_engine"]

Array = npt.NDArray[Any]
BoundRun = Callable[[], None]
ENGINES = ("ort",)


class GraphRunner(Protocol):
    """One loaded graph."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once: arrays in, freshly allocated arrays out, by name."""
        ...

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> BoundRun:
        """Fix the memory of every input and output; each call of the result reads and writes that memory.

        Nothing is copied. An output may share the memory of an input where the manifest allows it
        (``model.kv_cache_in_place``). The result keeps the arrays alive.
        """
        ...


class Engine(Protocol):
    """All graphs of one bundle on one device."""

    @property
    def bundle(self) -> Bundle:
        """The bundle the graphs come from."""
        ...

    @property
    def decoder(self) -> GraphRunner:
        """The decoder graph."""
        ...

    def vision(self, batch: VisionBatch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Encode images and videos: ``image_embeds (T, H)`` and ``deepstack_embeds (T, 3*H)``."""
        ...


def open_engine(name: str, bundle: Bundle, *, threads: int | None = None, packed_cache: bool = False) -> Engine:
    """Load the graphs of ``bundle``.

    Args:
        name: one of :data:`ENGINES`.
        bundle: an opened bundle.
        threads: threads inside one operator; ``None`` takes one per physical core.
        packed_cache: keep weights in the layout the kernels read in a file, and map that.

    Raises:
        InputError: no such engine, or a thread count below 1.
        BundleError: the engine cannot load the graphs.
    """
    if name != "ort":
        hint = did_you_mean(name, ENGINES)
        raise InputError(f"engine {name!r} does not exist{hint}; use one of {', '.join(ENGINES)}")
    from deepstitch.runtime.engine.ort import OrtEngine

    return OrtEngine(bundle, threads=threads, packed_cache=packed_cache)
