"""Loaders and runners for bundles that compose with Polygraphy's own::

    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.backend.trt import TrtRunner
    from polygraphy.comparator import Comparator

    definitions = OnnxrtRunner(SessionFromBundle("bundle", "vision_encoder"))
    plugins = TrtRunner(EngineFromBundle("bundle", "vision_encoder"))
    Comparator.compare_accuracy(Comparator.run([definitions, plugins]))

Nothing is loaded before a runner is activated or a loader called.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from deepstitch.errors import InputError, MissingDependency, did_you_mean
from deepstitch.export.compare.polygraphy_engine import graph_session
from deepstitch.manifest import TensorSpec
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import Array, GraphRunner, open_engine

try:
    from polygraphy.backend.base import BaseLoader, BaseRunner
    from polygraphy.common import TensorMetadata
except ImportError:
    raise MissingDependency("polygraphy", "compare", "Polygraphy's loaders") from None

__all__ = ["BundleRunner", "EngineFromBundle", "SessionFromBundle"]

_Folder = str | PathLike[str]


class SessionFromBundle(BaseLoader):
    """Loads a graph into ONNX Runtime on the CPU; each plugin is the function that defines it."""

    def __init__(self, folder: _Folder, graph: str) -> None:
        """Take what to load.

        Args:
            folder: of the bundle.
            graph: ``decoder`` or ``vision_encoder``.
        """
        self._folder = Path(folder)
        self._graph = graph

    def call_impl(self) -> Any:
        """Load it.

        Returns:
            An ``onnxruntime.InferenceSession``.

        Raises:
            InputError: the bundle has no such graph.
            BundleError: it is damaged.
        """
        return graph_session(_opened(self._folder, self._graph), self._graph)


class EngineFromBundle(BaseLoader):
    """Loads a TensorRT engine that ``deepstitch build`` made.

    The plugin library is loaded through TensorRT's registry first: it is not of the kind that Polygraphy's own
    ``LoadPlugins`` opens.
    """

    def __init__(self, folder: _Folder, graph: str) -> None:
        """Take what to load.

        Args:
            folder: of the bundle.
            graph: ``decoder`` or ``vision_encoder``.
        """
        self._folder = Path(folder)
        self._graph = graph

    def call_impl(self) -> Any:
        """Load it.

        Returns:
            A ``tensorrt.ICudaEngine``.

        Raises:
            InputError: the bundle has no such graph.
            BundleError: it has no engines for this card and this TensorRT.
            DeviceError: there is no driver, or TensorRT cannot load the plugin library.
        """
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes

        from deepstitch.runtime.engine.cuda import Cuda
        from deepstitch.runtime.engine.tensorrt.api import TensorRT
        from deepstitch.runtime.engine.tensorrt.opened import open_engines

        bundle = _opened(self._folder, self._graph)
        tensorrt = TensorRT.load()
        engines = open_engines(bundle, version=tensorrt.version, card=Cuda().card)  # 8.6 crashes without a driver
        if engines.plugin_library is not None:
            tensorrt.load_plugins(engines.plugin_library)
        return EngineFromBytes(BytesFromPath(str(engines.plan(self._graph))))()


class BundleRunner(BaseRunner):
    """Runs one graph by an engine of this package, as ``deepstitch run`` does: ``ort``, ``tensorrt`` and others."""

    def __init__(self, folder: _Folder, graph: str, engine: str | None = None, name: str | None = None) -> None:
        """Take what to run.

        Args:
            folder: of the bundle.
            graph: ``decoder`` or ``vision_encoder``.
            engine: one of :data:`deepstitch.runtime.engine.ENGINES`; None: the one for the bundle's target.
            name: of the runner, in Polygraphy's reports.
        """
        super().__init__(name=name, prefix=f"deepstitch-{engine or 'engine'}-{graph}")
        self._folder = Path(folder)
        self._graph = graph
        self._engine = engine
        self._runner: GraphRunner | None = None
        self._inputs: tuple[TensorSpec, ...] = ()

    def activate_impl(self) -> None:
        """Open the engine."""
        bundle = _opened(self._folder, self._graph)
        self._inputs = bundle.graph(self._graph).inputs
        self._runner = open_engine(self._engine, bundle).graph(self._graph)

    def get_input_metadata_impl(self) -> Any:
        """Names, types and shapes of the graph's inputs."""
        metadata = TensorMetadata()
        for spec in self._inputs:
            shape = [size if isinstance(size, int) else None for size in spec.shape]
            metadata.add(spec.name, dtype=spec.dtype, shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        assert self._runner is not None, "Polygraphy activates a runner first"
        began = time.perf_counter()
        outputs = self._runner.run(feed_dict)
        self.inference_time = time.perf_counter() - began
        return outputs

    def deactivate_impl(self) -> None:
        """Let the engine go."""
        self._runner = None
        self._inputs = ()


def _opened(folder: Path, graph: str) -> Bundle:
    bundle = Bundle.open(folder)
    graphs = bundle.manifest.graphs
    if graph not in graphs:
        hint = did_you_mean(graph, graphs)
        raise InputError(f"{folder}: there is no graph {graph!r}{hint}; it has {', '.join(graphs)}")
    return bundle
