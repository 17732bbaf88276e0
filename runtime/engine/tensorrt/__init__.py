"""TensorRT 8.6, 10 and 11 on one card."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepstitch.errors import InputError
from deepstitch.memory_estimate import kept_pictures
from deepstitch.runtime.bundle import DECODER, VISION_ENCODER, Bundle
from deepstitch.runtime.engine import EngineLimits, GraphRunner
from deepstitch.runtime.engine.cuda import Card, Cuda
from deepstitch.runtime.engine.device_memory import DeviceMemory
from deepstitch.runtime.engine.memory import DeviceArray, Memory
from deepstitch.runtime.engine.tensorrt.allocator import gpu_allocator
from deepstitch.runtime.engine.tensorrt.api import TensorRT
from deepstitch.runtime.engine.tensorrt.graph import TensorRTGraph
from deepstitch.runtime.engine.tensorrt.opened import OpenedEngines, check_bundle, open_engines
from deepstitch.runtime.engine.tensorrt.profiles import Profiles
from deepstitch.runtime.preprocess import VisionBatch

__all__ = ["TensorRTEngine"]


class TensorRTEngine:
    """The engines of a bundle. Everything they do goes through one stream, in memory of one pool.

    Attributes:
        bundle: where they are from.
    """

    def __init__(self, bundle: Bundle, *, graphs: Collection[str] | None = None) -> None:
        """Open the engines for the first card.

        Args:
            bundle: an opened bundle.
            graphs: open only these; None opens all of the bundle.

        Raises:
            BundleError: the bundle is for another runtime, or has no engines that fit.
            DeviceError: there is no driver or card, or not enough memory.
            UnsupportedError: TensorRT is not installed.
            MissingDependency: cuda-bindings is not installed.
        """
        check_bundle(bundle)
        self.bundle = bundle
        tensorrt = TensorRT.load()
        cuda = Cuda()  # before anything of TensorRT's is made: 8.6 crashes where there is no driver
        opened = open_engines(bundle, version=tensorrt.version, card=cuda.card)
        if opened.plugin_library is not None:
            tensorrt.load_plugins(opened.plugin_library)
        self._memory = DeviceMemory(cuda)
        self._allocator = gpu_allocator(tensorrt.module, self._memory)
        self._runtime = tensorrt.module.Runtime(tensorrt.logger)
        self._runtime.gpu_allocator = self._allocator
        names = list(bundle.manifest.graphs if graphs is None else graphs)
        self._graphs = {name: self._open(tensorrt, opened, name) for name in names}
        self._scratch = self._memory.empty((max(graph.scratch_bytes for graph in self._graphs.values()),), np.uint8)
        for graph in self._graphs.values():
            graph.attach(self._scratch)
        self._limits = _limits(self._graphs, cuda.card)

    def graph(self, name: str) -> GraphRunner:
        """One graph by its name."""
        return self._graphs[name]

    @property
    def decoder(self) -> GraphRunner:
        """The decoder graph."""
        return self._graphs[DECODER]

    @property
    def memory(self) -> Memory:
        """That of the card."""
        return self._memory

    @property
    def limits(self) -> EngineLimits:
        """What the engines were built for."""
        return self._limits

    def vision(self, batch: VisionBatch) -> tuple[DeviceArray, DeviceArray]:
        """Encode images and videos, in as few calls as the engine takes; the rows stay on the card.

        Returns:
            ``image_embeds (T, H)`` and ``deepstack_embeds (T, num_deepstack*H)``, float32.

        Raises:
            InputError: the model is text-only, or a picture is larger than the engine was built for.
        """
        if VISION_ENCODER not in self._graphs:
            raise InputError(f"{self.bundle.folder}: this model takes text only; leave out images and videos")
        graph = self._graphs[VISION_ENCODER]
        tokens = int(batch.tokens_per_item.sum())
        outputs = {}
        for spec in graph.contract.outputs:
            width = spec.shape[1]
            assert isinstance(width, int)
            outputs[spec.name] = self._memory.empty((tokens, width), spec.dtype)
        start = 0
        for part in _parts(batch, patches=graph.largest("P"), segments=graph.largest("N+1") - 1):
            stop = start + int(part.tokens_per_item.sum())
            graph.bind(part.graph_inputs(), {name: rows[start:stop] for name, rows in outputs.items()})()
            start = stop
        return outputs["image_embeds"], outputs["deepstack_embeds"]

    def _open(self, tensorrt: TensorRT, opened: OpenedEngines, name: str) -> TensorRTGraph:
        contract = self.bundle.graph(name)
        profiles = Profiles(name, contract.inputs, opened.graph(name).profiles)
        engine = _deserialized(tensorrt, self._runtime, opened.plan(name))
        return TensorRTGraph(tensorrt, engine, contract, profiles, self._memory)


def _deserialized(tensorrt: TensorRT, runtime: Any, plan: Path) -> Any:
    """The engine in a file, which is read as TensorRT comes to it."""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            engine = runtime.deserialize_cuda_engine(view)
        finally:
            view.release()
    if engine is None:
        raise tensorrt.failure(
            f"does not open {plan}",
            "if memory ran out, stop other programs on the card or build engines for less; else build them again",
        )
    return engine


def _limits(graphs: dict[str, TensorRTGraph], card: Card) -> EngineLimits:
    if DECODER not in graphs:
        return EngineLimits()
    decoder = graphs[DECODER]
    context = decoder.largest("C")
    return EngineLimits(
        context=context,
        chunk=decoder.largest("S"),
        logits=decoder.largest("L"),
        cache_bytes=kept_pictures(card.total_bytes),
        remedy=f"build the engines again with a larger --max-context than {context}",
    )


def _parts(batch: VisionBatch, *, patches: int, segments: int) -> Iterator[VisionBatch]:
    """Items in runs that fit into one call; one that does not fit alone is a run too, for the engine to refuse."""
    items: list[int] = []
    taken = np.zeros(2, np.int64)
    for item, grid in enumerate(batch.grid_thw):
        sizes = np.array([grid.prod(), grid[0]])  # patches, and a segment for each step in time
        if items and (taken + sizes > (patches, segments)).any():
            yield batch.take(items)
            items, taken = [], np.zeros(2, np.int64)
        items.append(item)
        taken = taken + sizes
    yield batch if len(items) == len(batch.grid_thw) else batch.take(items)
