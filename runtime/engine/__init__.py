"""Engines run the graphs of a bundle. They differ in how; everything above them sees this protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from deepstitch.errors import BundleError, InputError, did_you_mean
from deepstitch.runtime.engine.memory import Array, Memory, Tensor

if TYPE_CHECKING:
    from deepstitch.runtime.bundle import Bundle
    from deepstitch.runtime.preprocess import VisionBatch

__all__ = [
    "ENGINES",
    "Array",
    "BoundRun",
    "Engine",
    "EngineLimits",
    "GraphRunner",
    "Tensor",
    "default_engine",
    "open_engine",
]

BoundRun = Callable[[], None]
ENGINES = ("ort", "ort-cuda", "tensorrt")

# Which engine runs the graphs of which target.
_ENGINE_OF_TARGET: Mapping[str, str] = MappingProxyType(
    {"portable": "ort", "ort-cpu": "ort", "ort-cuda": "ort-cuda", "trt8": "tensorrt", "trt10": "tensorrt"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The largest calls an engine takes; None: any.

    Attributes:
        context: tokens a row of the KV cache holds, which is allocated whole; None: the model's, taken as needed.
        chunk: new tokens of a row in one call.
        logits: tokens of a row whose logits one call gives.
        cache_bytes: what outputs of the vision encoder may take between two questions, where they lie with the engine.
        remedy: what helps against too small a ``context``, besides shorter prompts.
    """

    context: int | None = None
    chunk: int | None = None
    logits: int | None = None
    cache_bytes: int | None = None
    remedy: str | None = None


class GraphRunner(Protocol):
    """One loaded graph."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once: arrays in, freshly allocated arrays out, by name."""
        ...

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun:
        """Fix the memory of every input and output; each call of the result reads and writes that memory.

        Where a graph runs, nothing is copied: arrays of the host are bound in place by an engine of the host, arrays of
        a device by one of that device, which moves arrays of the host in every call. An output may share the memory of
        an input where the manifest allows it (``model.kv_cache_in_place``). The result keeps the arrays alive; when a
        call returns, outputs on the host can be read.
        """
        ...


class Engine(Protocol):
    """All graphs of one bundle on one device."""

    @property
    def bundle(self) -> Bundle:
        """The bundle the graphs come from."""
        ...

    def graph(self, name: str) -> GraphRunner:
        """One graph by its name."""
        ...

    @property
    def decoder(self) -> GraphRunner:
        """The decoder graph."""
        ...

    @property
    def memory(self) -> Memory:
        """Where the KV cache lies, and what visual rows are copied into."""
        ...

    @property
    def limits(self) -> EngineLimits:
        """The largest calls."""
        ...

    def vision(self, batch: VisionBatch) -> tuple[Tensor, Tensor]:
        """Encode images and videos: ``image_embeds (T, H)`` and ``deepstack_embeds (T, 3*H)``, float32."""
        ...


def default_engine(bundle: Bundle) -> str:
    """The engine that runs the graphs of a bundle's target.

    Raises:
        BundleError: there is none.
    """
    target = bundle.manifest.target
    if target not in _ENGINE_OF_TARGET:
        raise BundleError(
            f"{bundle.folder}: exported with --target {target}, which this deepstitch cannot run; use one of "
            f"{', '.join(_ENGINE_OF_TARGET)}"
        )
    return _ENGINE_OF_TARGET[target]


def open_engine(name: str | None, bundle: Bundle, *, threads: int | None = None, packed_cache: bool = False) -> Engine:
    """Load the graphs of ``bundle``.

    Args:
        name: one of :data:`ENGINES`; None: the one of the bundle's target.
        bundle: an opened bundle.
        threads: threads inside one operator; ``None`` takes one per physical core.
        packed_cache: keep weights in the layout the kernels read in a file, and map that.

    Raises:
        InputError: no such engine, a thread count below 1, or an option the engine does not have.
        BundleError: the engine cannot load the graphs.
    """
    name = name or default_engine(bundle)
    if name not in ENGINES:
        hint = did_you_mean(name, ENGINES)
        raise InputError(f"engine {name!r} does not exist{hint}; use one of {', '.join(ENGINES)}")
    if packed_cache and name != "ort":
        raise InputError("--packed-cache is for ONNX Runtime on the CPU; leave it out")
    if name == "ort-cuda":
        from deepstitch.runtime.engine.ort_cuda import OrtCudaEngine

        return OrtCudaEngine(bundle)
    if name == "tensorrt":
        from deepstitch.runtime.engine.tensorrt import TensorRTEngine

        return TensorRTEngine(bundle)
    from deepstitch.runtime.engine.ort import OrtEngine

    return OrtEngine(bundle, threads=threads, packed_cache=packed_cache)
