"""Writes a comparison down as a Python script that needs Polygraphy and the bundle, nothing of deepstitch.

The script runs the graphs in ONNX Runtime, or where they have plugins the engines that were built of them.

Beside ``NAME.py`` lie, in Polygraphy's own JSON, ``NAME.<graph>.inputs.json`` (what ``polygraphy run
--load-inputs`` reads) and ``NAME.<graph>.reference.json`` (what ``--load-outputs`` reads).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepstitch.engine_manifest import EngineManifest
from deepstitch.errors import InputError, OutputError
from deepstitch.export.compare.built_engines import fits, most_logits, only_engines
from deepstitch.export.compare.candidate import Candidate
from deepstitch.export.compare.inputs import CaseInputs
from deepstitch.export.compare.polygraphy_engine import require_polygraphy
from deepstitch.export.compare.polygraphy_template import ONNX_RUNTIME, TEMPLATE, TENSORRT
from deepstitch.export.compare.stages import DECODE, PREFILL, VISION, Floats, Stages
from deepstitch.export.compare.tolerance import Tolerance
from deepstitch.runtime.bundle import DECODER, VISION_ENCODER, Bundle
from deepstitch.runtime.engine import Array, BoundRun, EngineLimits, Tensor
from deepstitch.runtime.engine.memory import HOST, to_host
from deepstitch.runtime.engine.ort import ORT_TARGETS
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
        InputError: the graphs have plugins, and no engines were built of them, or none that a case fits.
        OutputError: a file cannot be written.
    """
    require_polygraphy("--polygraphy-script")
    engines = None if bundle.manifest.target in ORT_TARGETS else _Engines.of(bundle)
    left_out = engines.too_small_for(inputs) if engines is not None else []
    limits = EngineLimits(chunk=engines.built.limits.prefill_chunk if engines is not None else None)
    most = most_logits(engines.built) if engines is not None else _LOGIT_ROWS
    vision: list[tuple[str, Call, Call]] = []
    decoder: list[tuple[str, Call, Call]] = []
    for each, stages in zip(inputs, expected, strict=True):
        name = each.case.name
        if name in left_out:
            continue
        if each.vision is not None:
            outputs = {"image_embeds": stages[VISION], "deepstack_embeds": _deepstack(stages)}
            vision.append((name, dict(each.vision.graph_inputs()), outputs))
        recorder = _RecordingEngine(bundle, stages, limits)
        Candidate(recorder).run(each)
        decoder += [
            (name, call, {"logits": logits})
            for call, logits in _with_logits(recorder.decoder.calls, each, stages, most)
        ]
    graphs = {VISION_ENCODER: vision, DECODER: decoder} if vision else {DECODER: decoder}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for graph, calls in graphs.items():
            _save(path, graph, calls)
        path.write_text(_script(path, bundle, graphs, tolerance, engines, left_out), "utf-8")
    except OSError as error:
        raise OutputError(f"--polygraphy-script {path}: cannot be written ({error.strerror})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engines:
    """TensorRT's, where the graphs have plugins."""

    folder: Path
    built: EngineManifest

    @classmethod
    def of(cls, bundle: Bundle) -> _Engines:
        folder, built = only_engines(bundle.folder)
        return cls(folder=folder, built=built)

    def too_small_for(self, inputs: Sequence[CaseInputs]) -> list[str]:
        """Names of cases, not of all."""
        found = [each.case.name for each in inputs if not fits(self.built, each)]
        if len(found) == len(inputs):
            raise InputError(f"--polygraphy-script: no case fits {self.folder}; build with larger limits")
        return found

    def files(self, bundle: Bundle) -> dict[str, str]:
        """Plans by graph, relative to the bundle."""
        where = self.folder.relative_to(bundle.folder)
        return {name: (where / graph.file).as_posix() for name, graph in self.built.graphs.items()}

    def runners(self, bundle: Bundle) -> str:
        """How the script opens them."""
        plugins = self.built.plugins
        library = (self.folder.relative_to(bundle.folder) / plugins.file).as_posix() if plugins is not None else None
        return TENSORRT["runners"].replace("PLUGIN_FILE", repr(library))


class _RecordingGraph:
    """Stands for the decoder graph: keeps what the runtime feeds it, the cache aside."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Never used by the runtime's decoder."""
        raise NotImplementedError

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.bind`."""
        return partial(self._record, {name: to_host(each) for name, each in inputs.items() if _CACHE not in name})

    def _record(self, inputs: Mapping[str, Array]) -> None:
        self.calls.append({name: array.copy() for name, array in inputs.items()})


class _RecordingEngine:
    """Hands the decoder the reference's visual rows, so that each graph is compared by itself."""

    memory = HOST

    def __init__(self, bundle: Bundle, stages: Stages, limits: EngineLimits) -> None:
        self.bundle = bundle
        self.limits = limits
        self.decoder = _RecordingGraph()
        self._stages = stages

    def graph(self, name: str) -> _RecordingGraph:
        """The decoder; nobody asks for the other one."""
        return self.decoder

    def vision(self, batch: VisionBatch) -> tuple[Floats, Floats]:
        """The reference's outputs."""
        return self._stages[VISION], _deepstack(self._stages)


def _deepstack(stages: Stages) -> Floats:
    taps = [array for name, array in stages.items() if name.startswith("deepstack.")]
    return np.concatenate(taps, axis=1) if taps else np.zeros((len(stages[VISION]), 0), np.float32)


def _with_logits(calls: Sequence[Call], inputs: CaseInputs, stages: Stages, most: int) -> list[tuple[Call, Floats]]:
    """Pair every call with the reference's logits ``(B, L, vocab)`` at some of the positions it asks for."""
    lengths = [len(row.prompt) for row in inputs.rows]
    steps = [len(row.decode_ids) for row in inputs.rows]
    prefill = np.split(stages[PREFILL], np.cumsum(lengths)[:-1])
    decode = np.split(stages[DECODE], np.cumsum(steps)[:-1]) if DECODE in stages else [each[:0] for each in prefill]
    rows = [np.concatenate(parts) for parts in zip(prefill, decode, strict=True)]
    paired = []
    for call in calls:
        last = call["query_lengths"][:, None] - 1
        call["logit_index"] = np.minimum(_thinned(call["logit_index"], most), last)  # padding asks for nothing
        places = call["past_lengths"][:, None] + call["logit_index"]
        paired.append((call, np.stack([row[place] for row, place in zip(rows, places, strict=True)])))
    return paired


def _thinned(index: Array, most: int) -> Array:
    """At most so many of the positions ``(B, L)``, the last among them."""
    count = index.shape[1]
    chosen = np.unique(np.linspace(count - 1, 0, min(count, most)).astype(np.int64))
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
    path: Path,
    bundle: Bundle,
    graphs: Mapping[str, Sequence[tuple[str, Any, Any]]],
    tolerance: Tolerance,
    engines: _Engines | None,
    left_out: Sequence[str],
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
    how = ONNX_RUNTIME if engines is None else TENSORRT
    files = {graph: bundle.graph(graph).file for graph in graphs} if engines is None else engines.files(bundle)
    return TEMPLATE.substitute(
        needs=how["needs"],
        standard=how["standard"],
        imports=how["imports"],
        runners=how["runners"] if engines is None else engines.runners(bundle),
        bundle=repr(folder),
        name=repr(path.stem),
        graphs=repr({graph: files[graph] for graph in graphs}),
        cases=repr({graph: [case for case, _, _ in calls] for graph, calls in graphs.items()}),
        left_out=repr(left_out),
        limits=repr(limits),
        layers=bundle.manifest.model.num_hidden_layers,
        heads=cache.heads,
        width=cache.width,
        dtype=repr(cache.dtype),
    )
