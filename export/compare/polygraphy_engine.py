"""Bundles run through Polygraphy's ONNX Runtime runner, for comparisons of graphs with graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.errors import MissingDependency
from deepstitch.export.compare.stages import LOGIT_STAGES, Stages
from deepstitch.export.compare.tolerance import Tolerance
from deepstitch.runtime.bundle import DECODER, VISION_ENCODER, Bundle
from deepstitch.runtime.engine import Array, BoundRun, EngineLimits, GraphRunner, Tensor
from deepstitch.runtime.engine.memory import HOST, Memory, to_host
from deepstitch.runtime.preprocess import VisionBatch

__all__ = ["PolygraphyEngine", "graph_session", "polygraphy_agrees", "require_polygraphy"]


def require_polygraphy(purpose: str) -> None:
    """Check that Polygraphy is there.

    Raises:
        MissingDependency: it is not.
    """
    try:
        import polygraphy.backend.onnxrt
        import polygraphy.comparator  # noqa: F401
    except ImportError:
        raise MissingDependency("polygraphy", "compare", purpose) from None


class PolygraphyGraph:
    """One graph behind an activated ``OnnxrtRunner``."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.run`."""
        return dict(self._runner.infer(dict(inputs)))

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.bind`; outputs are copied out of the runner's."""
        on_host = ({name: to_host(each) for name, each in side.items()} for side in (inputs, outputs))
        return partial(self._run_bound, *on_host)

    def _run_bound(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        results = self.run(inputs)
        for name, array in outputs.items():
            np.copyto(array, results[name])


class PolygraphyEngine:
    """An engine for :class:`deepstitch.export.compare.candidate.Candidate`."""

    def __init__(self, bundle: Bundle, graphs: Mapping[str, PolygraphyGraph]) -> None:
        self.bundle = bundle
        self._graphs = graphs

    @classmethod
    @contextlib.contextmanager
    def open(cls, bundle: Bundle) -> Iterator[PolygraphyEngine]:
        """Load all graphs of a bundle; leaving the context closes them.

        Raises:
            MissingDependency: Polygraphy is not installed.
        """
        require_polygraphy("comparing two bundles")
        from polygraphy.backend.onnxrt import OnnxrtRunner
        from polygraphy.logger import G_LOGGER

        with contextlib.ExitStack() as stack:
            stack.enter_context(G_LOGGER.verbosity(G_LOGGER.CRITICAL))  # it writes to stdout, which may be JSON
            graphs = {}
            for name in bundle.manifest.graphs:
                runner = OnnxrtRunner(partial(graph_session, bundle, name), name=name)
                graphs[name] = PolygraphyGraph(stack.enter_context(runner))
            yield cls(bundle, graphs)

    def graph(self, name: str) -> GraphRunner:
        """One graph by its name."""
        return self._graphs[name]

    @property
    def decoder(self) -> GraphRunner:
        """The decoder graph."""
        return self._graphs[DECODER]

    @property
    def memory(self) -> Memory:
        """That of the host."""
        return HOST

    @property
    def limits(self) -> EngineLimits:
        """Those of the model."""
        return EngineLimits()

    def vision(self, batch: VisionBatch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """See :meth:`deepstitch.runtime.engine.Engine.vision`."""
        outputs = self._graphs[VISION_ENCODER].run(batch.graph_inputs())
        return outputs["image_embeds"], outputs["deepstack_embeds"]


def graph_session(bundle: Bundle, name: str) -> Any:
    """What Polygraphy's own loader makes, without warning in every call that caches are copied.

    Plugins are the functions that define them.
    """
    import onnxruntime

    from deepstitch.export.compare.definition_engine import definition_session
    from deepstitch.runtime.engine.ort import ORT_TARGETS

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if bundle.manifest.target not in ORT_TARGETS:
        return definition_session(bundle, name, options)
    path = str(bundle.graph_path(name))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def polygraphy_agrees(actual: Stages, expected: Stages, tolerance: Tolerance) -> bool:
    """The verdict of Polygraphy's comparator on the errors of one case."""
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    limits = {
        stage: tolerance.limit(stage).absolute(float(np.abs(array).max(initial=0))) for stage, array in expected.items()
    }
    results = RunResults()
    results.add([actual], runner_name="bundle")
    results.add([expected], runner_name="reference")
    quantiles = {stage: 1 - tolerance.outliers if stage in LOGIT_STAGES else 1.0 for stage in expected}
    function = SimpleCompareFunc(atol=limits, rtol=0.0, check_error_stat="quantile", error_quantile=quantiles)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return bool(Comparator.compare_accuracy(results, compare_func=function))
