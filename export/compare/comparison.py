"""The comparison itself: make the inputs, run the reference, run the bundle, measure."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from tqdm.auto import tqdm

from deepstitch.errors import BundleError, InputError, UnsupportedError
from deepstitch.export.compare.built_engines import only_engines
from deepstitch.export.compare.candidate import Candidate
from deepstitch.export.compare.cases import CASES, Case
from deepstitch.export.compare.definition_engine import comparison_engine
from deepstitch.export.compare.inputs import CaseInputs, InputMaker
from deepstitch.export.compare.memory import check_memory
from deepstitch.export.compare.metrics import StageResult, compare_stage
from deepstitch.export.compare.polygraphy_engine import PolygraphyEngine, polygraphy_agrees
from deepstitch.export.compare.references import PyTorchReference, Reference, ReferenceOpener
from deepstitch.export.compare.report import Comparison
from deepstitch.export.compare.stages import Stages
from deepstitch.export.compare.stored_weights import compare_stored_weights
from deepstitch.export.compare.tolerance import Tolerance
from deepstitch.manifest import Manifest
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import open_engine
from deepstitch.runtime.engine.ort import ORT_TARGETS

__all__ = [
    "AGAINST",
    "checkpoint_of",
    "compare_bundle",
    "default_reference",
    "make_inputs",
    "measure",
    "reference_opener",
    "run_reference",
]

AGAINST = ("pytorch", "transformers", "portable", "definitions")
_GRAPHS = ("portable", "definitions")  # references that are graphs too, so that Polygraphy is asked for its verdict
_SKIPPED = "does not apply: the model takes text only"


def compare_bundle(
    bundle: Bundle,
    *,
    against: str = "pytorch",
    checkpoint: Path | None = None,
    reference: Path | None = None,
    cases: Sequence[Case] = CASES,
    settings: Sequence[str] = (),
    expert_layout: str | None = None,
    engine: str | None = None,
    script: Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare an opened bundle with its model.

    The reference runs first and is gone before the bundle's graphs are loaded: they never share the memory. An engine
    that was asked for is opened before it: whatever keeps it from running shall not be found out at the end.

    Args:
        bundle: what to compare.
        against: ``pytorch`` and ``transformers`` read ``checkpoint``; ``portable`` reads ``reference``; ``definitions``
            runs the bundle's own graphs in ONNX Runtime, each plugin by the function that defines it.
        checkpoint: folder of the model the bundle was exported from; None takes the one the manifest remembers.
        reference: bundle folder of the same model.
        cases: which cases.
        settings: changed limits, ``NAME=VALUE``.
        expert_layout: layout of the experts in ``checkpoint``, where their shapes cannot tell.
        engine: what runs the bundle, one of :data:`deepstitch.runtime.engine.ENGINES`; None: ONNX Runtime on the CPU,
            plugins by their definitions.
        script: also write a Polygraphy script of this comparison here.
        progress: show bars on stderr, if it is a terminal.

    Raises:
        DeepstitchError: something is missing or refused; nothing was compared.
    """
    began = time.perf_counter()
    if script is not None and bundle.manifest.target not in ORT_TARGETS:
        only_engines(bundle.folder)  # the script runs them; refused before any work
    opener, others = reference_opener(bundle, against, checkpoint, reference, expert_layout)
    tolerance = Tolerance.for_bundles(bundle.manifest, *others).replace(settings)
    inputs, skipped = make_inputs(bundle, cases)
    opened = Candidate(open_engine(engine, bundle)) if engine is not None else None
    expected = run_reference(opener, inputs, against, progress)
    if script is not None:
        from deepstitch.export.compare.polygraphy_script import write_script

        write_script(script, bundle, inputs, expected, tolerance)
    results: list[StageResult] = []
    if against == "pytorch":
        results += compare_stored_weights(bundle, checkpoint_of(bundle, checkpoint, "--against pytorch"), expert_layout)
    polygraphy: dict[str, bool] = {}
    # its verdict is asked for where a reference runs in it, or where it is there anyway
    asks_polygraphy = against == "portable" or (against in _GRAPHS and find_spec("polygraphy") is not None)
    measured = 0
    with _candidate(bundle, opened, through_polygraphy=against == "portable") as candidate:
        bar = tqdm(inputs, desc="bundle", disable=None if progress else True)
        for each, stages in zip(bar, expected, strict=True):
            actual = _stages(candidate, each, skipped, may_skip=opened is not None)
            if actual is None:
                continue
            measured += 1
            results += measure(each.case.name, actual, stages, tolerance)
            if asks_polygraphy:
                polygraphy[each.case.name] = polygraphy_agrees(actual, stages, tolerance)
    if not measured:
        raise InputError(f"{bundle.folder}: no case fits the engine; {next(iter(skipped.values()))}")
    return Comparison(
        bundle=str(bundle.folder),
        target=bundle.manifest.target,
        weights=bundle.manifest.weights,
        against=against,
        tolerance=tolerance,
        results=tuple(results),
        skipped=skipped,
        polygraphy=polygraphy,
        seconds=time.perf_counter() - began,
        engine=engine,
    )


def _stages(candidate: Candidate, inputs: CaseInputs, skipped: dict[str, str], *, may_skip: bool) -> Stages | None:
    """What a bundle makes of a case; None where an engine was not built large enough for it, which is noted."""
    try:
        return candidate.run(inputs)
    except InputError as error:
        if not may_skip:
            raise
        skipped[inputs.case.name] = f"does not fit the engine: {error}"
        return None


def default_reference(bundle: Bundle, engine: str | None) -> str:
    """What a bundle is compared with: the model, or what defines the plugins where an engine runs these."""
    has_plugins = bundle.manifest.target not in ORT_TARGETS
    return "definitions" if engine is not None and has_plugins else "pytorch"


def make_inputs(bundle: Bundle, cases: Sequence[Case]) -> tuple[list[CaseInputs], dict[str, str]]:
    """Inputs of the cases that apply, and why the others do not.

    Raises:
        InputError: none applies.
    """
    make = InputMaker(bundle.folder, bundle.manifest)
    made = {case.name: make(case) for case in cases}
    inputs = [each for each in made.values() if each is not None]
    if not inputs:
        raise InputError(f"{bundle.folder}: none of the cases {', '.join(made)} applies to a text-only model")
    return inputs, {name: _SKIPPED for name, each in made.items() if each is None}


def reference_opener(
    bundle: Bundle, against: str, checkpoint: Path | None, reference: Path | None, expert_layout: str | None
) -> tuple[ReferenceOpener, tuple[Manifest, ...]]:
    """Check what the reference needs; return how to load it, and its manifest if it is a bundle.

    Raises:
        InputError: the checkpoint or the reference bundle was not given, or there are no plugins to be defined.
        UnsupportedError: the model does not fit into memory.
        BundleError: the reference bundle is damaged or of another model.
    """
    if against == "definitions":
        if bundle.manifest.target in ORT_TARGETS:
            raise InputError(
                f"--against definitions: {bundle.folder} was exported for {bundle.manifest.target} and has no plugins; "
                "compare with --against pytorch"
            )
        return lambda: _polygraphy_candidate(bundle), ()
    if against == "portable":
        if reference is None:
            raise InputError("--against portable needs --reference BUNDLE, a bundle of the same model to compare with")
        other = Bundle.open(reference)
        _same_model(bundle, other)
        return lambda: _polygraphy_candidate(other), (other.manifest,)
    checkpoint = checkpoint_of(bundle, checkpoint, f"--against {against}")
    check_memory(checkpoint, expert_layout)
    if against == "transformers":
        if bundle.manifest.quantization is not None:
            raise UnsupportedError(
                f"--against transformers: {bundle.folder} holds integer weights, transformers has the checkpoint's; "
                "compare with --against pytorch, which takes the weights as stored, or measure with --quality FILE"
            )
        _refuse_what_transformers_misreads(checkpoint)

    @contextlib.contextmanager
    def load() -> Iterator[Reference]:
        if against == "pytorch":
            yield PyTorchReference(checkpoint, expert_layout, bundle=bundle)
            return
        from deepstitch.export.compare.transformers_reference import TransformersReference

        yield TransformersReference(checkpoint, bundle.manifest.model)

    return load, ()


def run_reference(opener: ReferenceOpener, inputs: Sequence[CaseInputs], name: str, progress: bool) -> list[Stages]:
    """Load the reference, run every case, and give its memory back."""
    with opener() as reference:
        expected = [reference.run(each) for each in tqdm(inputs, desc=name, disable=None if progress else True)]
        del reference
    gc.collect()
    return expected


def measure(case: str, actual: Stages, expected: Stages, tolerance: Tolerance) -> list[StageResult]:
    """Compare all stages of one case."""
    return [compare_stage(case, stage, actual.get(stage), array, tolerance) for stage, array in expected.items()]


@contextlib.contextmanager
def _candidate(bundle: Bundle, opened: Candidate | None, *, through_polygraphy: bool) -> Iterator[Candidate]:
    if opened is not None:
        yield opened
        return
    if not through_polygraphy:
        yield Candidate(comparison_engine(bundle))
        return
    with _polygraphy_candidate(bundle) as candidate:
        yield candidate


@contextlib.contextmanager
def _polygraphy_candidate(bundle: Bundle) -> Iterator[Candidate]:
    with PolygraphyEngine.open(bundle) as engine:
        yield Candidate(engine)


def checkpoint_of(bundle: Bundle, given: Path | None, flag: str) -> Path:
    """The checkpoint folder to compare a bundle with: the given one, else the one its manifest remembers.

    Raises:
        InputError: there is none, or it is of another model.
    """
    checkpoint = given or _remembered(bundle)
    if checkpoint is None:
        raise InputError(
            f"{flag} needs --checkpoint DIR, the folder that was exported; a bundle does not hold the PyTorch model"
        )
    _same_checkpoint(bundle, checkpoint)
    return checkpoint


def _remembered(bundle: Bundle) -> Path | None:
    """The checkpoint folder the bundle was exported from, if this machine still has it."""
    if bundle.manifest.checkpoint is None:
        return None
    folder = (bundle.folder / bundle.manifest.checkpoint).resolve()
    return folder if (folder / "config.json").is_file() else None


def _same_model(bundle: Bundle, other: Bundle) -> None:
    for name in (
        "model_type",
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "num_deepstack",
        "num_parameters",
    ):
        mine, theirs = (getattr(each.manifest.model, name) for each in (bundle, other))
        if mine != theirs:
            raise BundleError(
                f"--reference {other.folder}: {name} is {theirs!r}, the compared bundle has {mine!r}; "
                "give a bundle of the same model"
            )


def _refuse_what_transformers_misreads(checkpoint: Path) -> None:
    """transformers 5 tells the layouts of experts apart tensor by tensor, and a square one it takes for its own."""
    from deepstitch.models.checkpoint import Checkpoint

    opened = Checkpoint.open(checkpoint)
    text = opened.config.text
    if text.num_experts == 0 or text.hidden_size not in (text.moe_intermediate_size, 2 * text.moe_intermediate_size):
        return
    stacked = f"{'model.language_model' if opened.config.vision else 'model'}.layers"
    experts = [name for name in opened.entries if name.startswith(stacked) and name.endswith("experts.gate_up_proj")]
    sources = opened.sources()
    if any(sources[name].in_place is not None for name in experts):
        raise UnsupportedError(
            f"--against transformers: {checkpoint} holds square expert matrices (H={text.hidden_size}, "
            f"I={text.moe_intermediate_size}) in the published layout, which transformers loads transposed without "
            "saying so; compare with --against pytorch"
        )


def _same_checkpoint(bundle: Bundle, checkpoint: Path) -> None:
    from deepstitch.models import ModelConfig

    config, facts = ModelConfig.from_file(checkpoint / "config.json"), bundle.manifest.model
    found = (
        config.model_type,
        config.text.hidden_size,
        config.text.vocab_size,
        config.text.num_hidden_layers,
    )
    expected = (facts.model_type, facts.hidden_size, facts.vocab_size, facts.num_hidden_layers)
    if found != expected:
        raise InputError(
            f"--checkpoint {checkpoint}: model type, hidden size, vocabulary and layers are {found}, "
            f"the bundle has {expected}; give the checkpoint that was exported"
        )
