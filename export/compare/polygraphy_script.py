"""Writes a comparison down as a Python script that needs Polygraphy and the bundle, nothing of deepstitch.

Beside ``NAME.py`` lie, in Polygraphy's own JSON, ``NAME.<graph>.inputs.json`` (what ``polygraphy run
--load-inputs`` reads) and ``NAME.<graph>.reference.json`` (what ``--load-outputs`` reads).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from deepstitch.errors import OutputError
from deepstitch.export.compare.candidate import Candidate
from deepstitch.export.compare.inputs import CaseInputs
from deepstitch.export.compare.polygraphy_engine import require_polygraphy
from deepstitch.export.compare.stages import DECODE, PREFILL, VISION, Floats, Stages
from deepstitch.export.compare.tolerance import Tolerance
from deepstitch.runtime.bundle import DECODER, VISION_ENCODER, Bundle
from deepstitch.runtime.engine import Array, BoundRun
from deepstitch.runtime.kvcache import cache_tensors
from deepstitch.runtime.preprocess import VisionBatch

__all__ = ["write_script"]

_LOGIT_ROWS = 16  # per call; logits of a real vocabulary at every position would make gigabytes of JSON
_CACHE = "past_key_values."
Call = dict[str, Array]


def write_script(
    path: Path, bundle: Bundle, inputs: Sequence[CaseInputs], expected: Sequence[Stages], tolerance: Tolerance
) -> None:
    """Write the script and its data.

    Args:
        path: the script, ``NAME.py``.
        bundle: whose graphs it runs.
        inputs: the cases.
        expected: what the reference computed for each.
        tolerance: the limits.

    Raises:
        MissingDependency: Polygraphy is not installed.
        OutputError: a file cannot be written.
    """
    require_polygraphy("--polygraphy-script")
    vision: list[tuple[str, Call, Call]] = []
    decoder: list[tuple[str, Call, Call]] = []
    for each, stages in zip(inputs, expected, strict=True):
        name = each.case.name
        if each.vision is not None:
            outputs = {"image_embeds": stages[VISION], "deepstack_embeds": _deepstack(stages)}
            vision.append((name, dict(each.vision.graph_inputs()), outputs))
        recorder = _RecordingEngine(bundle, stages)
        Candidate(recorder).run(each)
        decoder += [
            (name, call, {"logits": logits}) for call, logits in _with_logits(recorder.decoder.calls, each, stages)
        ]
    graphs = {VISION_ENCODER: vision, DECODER: decoder} if vision else {DECODER: decoder}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for graph, calls in graphs.items():
            _save(path, graph, calls)
        path.write_text(_script(path, bundle, graphs, tolerance), "utf-8")
    except OSError as error:
        raise OutputError(f"--polygraphy-script {path}: cannot be written ({error.strerror})") from None


class _RecordingGraph:
    """Stands for the decoder graph: keeps what the runtime feeds it, the cache aside."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Never used by the runtime's decoder."""
        raise NotImplementedError

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> BoundRun:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.bind`."""
        return partial(self._record, {name: array for name, array in inputs.items() if not name.startswith(_CACHE)})

    def _record(self, inputs: Mapping[str, Array]) -> None:
        self.calls.append({name: array.copy() for name, array in inputs.items()})


class _RecordingEngine:
    """Hands the decoder the reference's visual rows, so that each graph is compared by itself."""

    def __init__(self, bundle: Bundle, stages: Stages) -> None:
        self.bundle = bundle
        self.decoder = _RecordingGraph()
        self._stages = stages

    def vision(self, batch: VisionBatch) -> tuple[Floats, Floats]:
        """The reference's outputs."""
        return self._stages[VISION], _deepstack(self._stages)


def _deepstack(stages: Stages) -> Floats:
    taps = [array for name, array in stages.items() if name.startswith("deepstack.")]
    return np.concatenate(taps, axis=1) if taps else np.zeros((len(stages[VISION]), 0), np.float32)


def _with_logits(calls: Sequence[Call], inputs: CaseInputs, stages: Stages) -> list[tuple[Call, Floats]]:
    """Pair every call with the reference's logits ``(B, L, vocab)`` at the positions it asks for."""
    lengths = [len(row.prompt) for row in inputs.rows]
    steps = [len(row.decode_ids) for row in inputs.rows]
    prefill = np.split(stages[PREFILL], np.cumsum(lengths)[:-1])
    decode = np.split(stages[DECODE], np.cumsum(steps)[:-1]) if DECODE in stages else [each[:0] for each in prefill]
    rows = [np.concatenate(parts) for parts in zip(prefill, decode, strict=True)]
    paired = []
    for call in calls:
        last = call["query_lengths"][:, None] - 1
        call["logit_index"] = np.minimum(_thinned(call["logit_index"]), last)  # padding asks for nothing
        places = call["past_lengths"][:, None] + call["logit_index"]
        paired.append((call, np.stack([row[place] for row, place in zip(rows, places, strict=True)])))
    return paired


def _thinned(index: Array) -> Array:
    """At most ``_LOGIT_ROWS`` of the positions ``(B, L)``, the last among them."""
    count = index.shape[1]
    chosen = np.unique(np.linspace(0, count - 1, min(count, _LOGIT_ROWS)).astype(np.int64))
    return np.ascontiguousarray(index[:, chosen])


def _data_file(path: Path, graph: str, kind: str) -> Path:
    return path.with_name(f"{path.stem}.{graph}.{kind}.json")


def _save(path: Path, graph: str, calls: Sequence[tuple[str, Call, Call]]) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    reference = RunResults()
    reference.add(
        [{name: np.ascontiguousarray(array) for name, array in outputs.items()} for _, _, outputs in calls],
        runner_name="reference",
    )
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json([inputs for _, inputs, _ in calls], str(_data_file(path, graph, "inputs")))
        reference.save(str(_data_file(path, graph, "reference")))


def _script(
    path: Path, bundle: Bundle, graphs: Mapping[str, Sequence[tuple[str, Any, Any]]], tolerance: Tolerance
) -> str:
    """The text of the script; the bundle's path is relative, so that both can move together."""
    vision, logits = tolerance.limit(VISION), tolerance.limit(PREFILL)
    limits = {
        "image_embeds": (vision.value, vision.relative, 1.0),
        "deepstack_embeds": (vision.value, vision.relative, 1.0),
        "logits": (logits.value, logits.relative, 1 - tolerance.outliers),
    }
    cache = cache_tensors(bundle.graph(DECODER))[0]
    folder = Path(os.path.relpath(bundle.folder, path.parent)).as_posix()
    return _TEMPLATE.substitute(
        bundle=repr(folder),
        name=repr(path.stem),
        graphs=repr({graph: bundle.graph(graph).file for graph in graphs}),
        cases=repr({graph: [case for case, _, _ in calls] for graph, calls in graphs.items()}),
        limits=repr(limits),
        layers=bundle.manifest.model.num_hidden_layers,
        heads=cache.heads,
        width=cache.width,
        dtype=repr(cache.dtype),
    )


_TEMPLATE = Template(
    '''\
"""Compares the graphs of a deepstitch bundle with saved outputs of a reference.

Needs: pip install polygraphy onnxruntime numpy
Every graph gets the reference's own inputs; the decoder keeps its KV cache from call to call of one case.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from polygraphy.json import load_json
from polygraphy.logger import G_LOGGER

HERE = Path(__file__).resolve().parent
BUNDLE = HERE / $bundle
NAME = $name
GRAPHS = $graphs
CASES = $cases  # of each call
# output: (error, whether it is relative to the largest magnitude, quantile of the errors it holds for)
LIMITS = $limits
HEADS, WIDTH, DTYPE = $heads, $width, $dtype  # of the KV cache
CACHE = [f"past_key_values.{layer}.{part}" for layer in range($layers) for part in ("key", "value")]


def run_decoder(runner, calls):
    """Logits of every call. A call over empty rows starts a new cache, the others continue the last one."""
    capacity = max(int(call["past_lengths"].max()) + call["inputs_embeds"].shape[1] for call in calls)
    cache = {}
    for call in calls:
        if not call["past_lengths"].any():
            shape = (len(call["past_lengths"]), HEADS, capacity, WIDTH)
            cache = {name: np.zeros(shape, DTYPE) for name in CACHE}
        outputs = runner.infer({**call, **cache})
        cache = {name: outputs[name.replace("past_key_values.", "present.")] for name in CACHE}
        yield {"logits": outputs["logits"]}


def compare(graph):
    """Whether every call of a graph is within its limits."""
    calls = load_json(str(HERE / f"{NAME}.{graph}.inputs.json"))
    reference = RunResults.load(str(HERE / f"{NAME}.{graph}.reference.json"))["reference"]
    passed = True
    with OnnxrtRunner(SessionFromOnnx(str(BUNDLE / GRAPHS[graph]), providers=["cpu"]), name=graph) as runner:
        outputs = run_decoder(runner, calls) if graph == "decoder" else (runner.infer(call) for call in calls)
        for number, (actual, expected) in enumerate(zip(outputs, reference)):
            limits, quantiles = {}, {}
            for name, array in expected.items():
                value, relative, quantiles[name] = LIMITS[name]
                limits[name] = value * float(np.abs(array).max()) if relative else value
            results = RunResults()
            results.add([dict(actual)], runner_name=graph)
            results.add([dict(expected.items())], runner_name="reference")
            function = SimpleCompareFunc(
                atol=limits, rtol=0.0, check_error_stat="quantile", error_quantile=quantiles
            )
            good = bool(Comparator.compare_accuracy(results, compare_func=function))
            print(f"{graph} call {number} of case {CASES[graph][number]}: {'passed' if good else 'FAILED'}")
            passed = passed and good
    return passed


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(3)
    with G_LOGGER.verbosity(G_LOGGER.ERROR):  # without this line Polygraphy shows statistics of every output
        passed = [compare(graph) for graph in GRAPHS]
    sys.exit(0 if all(passed) else 1)
'''
)
