"""What the tests of the comparison share: reference outputs, made once per process, and damaged bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import onnx

from deepstitch.export.compare.candidate import Candidate
from deepstitch.export.compare.cases import CASES
from deepstitch.export.compare.comparison import make_inputs, measure, reference_opener, run_reference
from deepstitch.export.compare.metrics import StageResult
from deepstitch.export.compare.tolerance import Tolerance
from deepstitch.manifest import MANIFEST_NAME, file_sha256
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import Engine, open_engine


@cache
def expected(bundle: Path, checkpoint: Path, against: str = "pytorch") -> tuple:
    """Inputs of all cases and what the reference makes of them; the target does not matter."""
    opened = Bundle.open(bundle)
    opener, _ = reference_opener(opened, against, checkpoint, None, None)
    inputs, _ = make_inputs(opened, CASES)
    return inputs, run_reference(opener, inputs, against, progress=False)


def results(folder: Path, made: tuple, wrap: Callable[[Engine], Engine] = lambda engine: engine) -> list[StageResult]:
    """Run a bundle over inputs and expectations of :func:`expected`; ``wrap`` may spoil the engine."""
    bundle = Bundle.open(folder, verify="full")
    candidate = Candidate(wrap(open_engine("ort", bundle, threads=1)))
    tolerance = Tolerance.for_bundles(bundle.manifest)
    measured = []
    for inputs, stages in zip(*made, strict=True):
        measured += measure(inputs.case.name, candidate.run(inputs), stages, tolerance)
    return measured


def failures(measured: Sequence[StageResult]) -> dict[str, str]:
    """First failed stage of every failed case."""
    first: dict[str, str] = {}
    for result in measured:
        if not result.passed:
            first.setdefault(result.case, result.stage)
    return first


def spoiled(folder: Path, target: Path, spoil: Callable[[Path], object]) -> Path:
    """A damaged copy of a bundle whose manifest says that all is well."""
    shutil.copytree(folder, target)
    spoil(target)
    path = target / MANIFEST_NAME
    manifest = json.loads(path.read_text("utf-8"))
    for name, record in manifest["files"].items():
        record |= {"sha256": file_sha256(target / name), "size": (target / name).stat().st_size}
    path.write_text(json.dumps(manifest), "utf-8")
    return target


def edit_decoder(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        model = onnx.load(folder / "decoder.onnx", load_external_data=False)
        edit(model)
        onnx.save(model, folder / "decoder.onnx")

    return spoil
