"""Engines on an NVIDIA GPU: do they compute what the model computes, and how fast are they?

    python -m benchmarks.engines_gpu --work gpu --prepare                        # where torch is; needs no GPU
    python -m benchmarks.engines_gpu --work gpu --prepared --plugins libdeepstitch_plugins_trt8.so   # where the GPU is
    python -m benchmarks.engines_gpu --plugins libdeepstitch_plugins_trt8.so     # both

Of the sample model and of a mid-size mixture of experts with random weights, bundles for the TensorRT that is
installed and for ONNX Runtime's CUDA kernels. For each: the engines are built, the cases of ``deepstitch compare`` run
on them and are held against the portable graphs of the same weights on a CPU, and the whole path is timed: a picture
and a question to the first token, a long prompt, and the tokens after it. Where torch has CUDA, transformers does the
same with the language side. Everything that uses the card runs in a process of its own, one at a time; what fails is
in the report with its reason, and the rest goes on. The report is written again after every step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import spread, write_report
from deepstitch.models.sample.files import CHECKPOINT

RESULTS = Path(__file__).with_name("results")
QUESTION = "What color is the circle?"
EXPECTED = "expected.npz"
TARGETS = ("trt8", "trt10", "ort-cuda")
CHILD_SECONDS = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        models: what each is stored as, by name; ``sample`` or a shape of :mod:`benchmarks.checkpoints`.
        context: tokens a row has room for.
        chunk: prompt tokens per decoder call, and logits of one.
        prompt: tokens of the long prompt, about.
        tokens: of an answer.
        rounds: of every measurement.
        side: of the picture, in pixels.
        cases: of the comparison; empty for all.
    """

    models: dict[str, tuple[str, ...]]
    context: int
    chunk: int
    prompt: int
    tokens: int
    rounds: int
    side: int
    cases: tuple[str, ...] = ()


FULL = Plan(
    models={"sample": ("fp32", "int8"), "mid": ("fp16", "int4")},
    context=2048,
    chunk=256,
    prompt=1024,
    tokens=64,
    rounds=5,
    side=512,
)
TINY = Plan(
    models={"sample": ("fp32",)}, context=256, chunk=64, prompt=40, tokens=4, rounds=1, side=64, cases=("multi-turn",)
)


def prepare(work: Path, plan: Plan, targets: tuple[str, ...]) -> None:
    """Export every bundle, and keep what the portable graphs make of every case."""
    for model, kinds in plan.models.items():
        checkpoint = checkpoint_of(work, model)
        for weights in kinds:
            folder = work / f"{model}-{weights}"
            if not (folder / EXPECTED).is_file():
                portable = export(checkpoint, folder / "portable", "portable", weights)
                np.savez(folder / EXPECTED, **dict(stages_of(portable, "ort", plan.cases)))
            for target in targets:
                if not (folder / target).is_dir():
                    export(checkpoint, folder / target, target, weights)


def checkpoint_of(work: Path, model: str) -> Path:
    """The folder of a model's weights; random ones are written once."""
    if model == "sample":
        return CHECKPOINT
    folder = work / "checkpoints" / model
    if not folder.is_dir():
        from benchmarks.checkpoints import shape_config, write_random_checkpoint

        write_random_checkpoint(shape_config(model, vision=model), folder)
    return folder


def export(checkpoint: Path, output: Path, target: str, weights: str) -> Path:
    """A bundle; integers are rounded to nearest, which is all the same for speed."""
    from deepstitch.export import ExportConfig, export_checkpoint
    from deepstitch.export.exporter import QuantizationConfig

    integers = {} if weights in ("fp32", "fp16") else {"quantization": QuantizationConfig(method="rtn")}
    config = ExportConfig(
        checkpoint=checkpoint, output=output, target=target, weights=weights, progress=False, **integers
    )
    return export_checkpoint(config)


def stages_of(bundle: Path, engine: str | None, cases: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every stage of every case that fits the engine, as ``case/stage``; reasons for the others as texts."""
    from deepstitch.errors import InputError
    from deepstitch.export.compare.candidate import Candidate
    from deepstitch.export.compare.cases import select_cases
    from deepstitch.export.compare.inputs import InputMaker
    from deepstitch.runtime.bundle import Bundle
    from deepstitch.runtime.engine import open_engine

    opened = Bundle.open(bundle)
    candidate, make = Candidate(open_engine(engine, opened)), InputMaker(bundle, opened.manifest)
    for case in select_cases(cases):
        inputs = make(case)
        if inputs is None:
            continue
        try:
            found = candidate.run(inputs)
        except InputError as error:
            yield case.name, str(error)
            continue
        for stage, values in found.items():
            yield f"{case.name}/{stage}", values


# --- in a process of its own


def compare(bundle: Path, expected: Path, *cases: str) -> dict[str, Any]:
    """Errors of a bundle's engine against what was kept, the worst of all cases for each stage."""
    from deepstitch.export.compare.metrics import compare_stage
    from deepstitch.export.compare.tolerance import Tolerance
    from deepstitch.manifest import Manifest

    wanted, tolerance = np.load(expected), Tolerance.for_bundles(Manifest.read(bundle))
    worst: dict[str, float] = {}
    failed, skipped, compared = [], {}, 0
    for name, values in stages_of(bundle, None, cases):
        if isinstance(values, str):
            skipped[name] = values
            continue
        case, stage = name.split("/", 1)
        result = compare_stage(case, stage, values, wanted[name], tolerance)
        worst[stage] = max(worst.get(stage, 0.0), float(result.max_rel))
        compared += 1
        if not result.passed:
            failed.append(name)
    return {"stages": compared, "failed": failed, "skipped": skipped, "worst_relative_error": worst}


def speed(bundle: Path, prompt: str, tokens: str, rounds: str, side: str) -> dict[str, Any]:
    """The whole path, ``rounds`` times after one that does not count."""
    from PIL import Image

    from deepstitch.runtime.pipeline import Pipeline

    start = time.perf_counter()
    pipeline = Pipeline.open(bundle, encoder_cache_bytes=0)
    loaded = time.perf_counter() - start
    text = " ".join(f"word {number}" for number in range(int(prompt) // 4))
    size = (int(side), int(side), 3)
    found: dict[str, list[float]] = {}
    facts: dict[str, int] = {}
    for number in range(1 + int(rounds)):
        pixels = np.random.default_rng(number).integers(0, 256, size, np.uint8)
        picture = {"images": [Image.fromarray(pixels)]} if pipeline.manifest.vision is not None else {}
        began = time.perf_counter()
        pipeline.generate(QUESTION, max_tokens=1, ignore_eos=True, **picture)
        first = time.perf_counter() - began
        long = pipeline.generate(text, max_tokens=int(tokens), ignore_eos=True)
        facts = {"prompt_tokens": long.prompt_tokens, "generated_tokens": long.generated_tokens}
        measured = {
            "first_token_seconds": first,
            "prefill_tokens_per_second": long.prompt_tokens / long.timings["prefill"],
            "decode_tokens_per_second": (long.generated_tokens - 1) / long.timings["decode"],
        }
        for name, value in measured.items() if number else ():
            found.setdefault(name, []).append(value)
    return {"load_seconds": loaded, **facts, **{name: spread(values) for name, values in found.items()}}


def transformers(checkpoint: Path, dtype: str, prompt: str, tokens: str, rounds: str) -> dict[str, Any]:
    """Hugging Face transformers on the same card, language side only."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to("cuda").eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(10, 200, (1, int(prompt)), device="cuda")

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    prefill, decode = [], []
    for number in range(1 + int(rounds)):
        short, long = seconds(1), seconds(1 + int(tokens))
        if number:
            prefill.append(int(prompt) / short)
            decode.append(int(tokens) / (long - short))
    rates = {"prefill_tokens_per_second": spread(prefill), "decode_tokens_per_second": spread(decode)}
    return {"dtype": dtype, "peak_bytes": torch.cuda.max_memory_allocated(), **rates}


def card() -> dict[str, Any]:
    """What it is, and the driver."""
    from deepstitch.runtime.engine.cuda import Cuda

    cuda = Cuda()
    found = cuda.card
    return {
        "name": found.name,
        "sm": found.sm,
        "bytes": found.total_bytes,
        "free_bytes": cuda.free_bytes(),
        "driver_cuda_version": int(cuda.call("cuDriverGetVersion")),
    }


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "compare": lambda bundle, expected, *cases: compare(Path(bundle), Path(expected), *cases),
    "speed": lambda bundle, *numbers: speed(Path(bundle), *numbers),
    "transformers": lambda checkpoint, *settings: transformers(Path(checkpoint), *settings),
    "card": card,
}


# --- what starts them


def child(*words: str | Path | int) -> dict[str, Any]:
    """Run one of :data:`CHILDREN`; its result, or why there is none."""
    return _run([sys.executable, "-m", "benchmarks.engines_gpu", "--child", *map(str, words)])


def _run(command: list[str]) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"no end after {CHILD_SECONDS} s"}
    seconds = round(time.perf_counter() - began, 3)
    if done.returncode:
        said = _problems(done.stdout) or done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": f"exit code {done.returncode}: {'; '.join(said)}", "seconds": seconds}
    try:
        return {**json.loads(done.stdout), "seconds": seconds}
    except ValueError:  # a library wrote there too
        return {"failed": f"no JSON, but: {done.stdout[-200:]!r}", "seconds": seconds}


def _problems(stdout: str) -> list[str]:
    """What the check of 'deepstitch build' found, which is in its JSON alone."""
    try:
        found = json.loads(stdout)
    except ValueError:
        return []
    said = list(found.get("library_problems") or ())
    for name, graph in found.get("graphs", {}).items():
        said += [f"{name}: {each['operator']}: {each['message']}" for each in graph["problems"]]
    return said


def build(bundle: Path, plan: Plan, plugins: Path | None) -> dict[str, Any]:
    """Engines by the command line; what the report keeps of it."""
    limits = {
        "max-context": plan.context,
        "prefill-chunk": plan.chunk,
        "logits": plan.chunk,
        "batch": 2,
        "images": 3,
        "image-patches": max((plan.side // 16) ** 2, 256),
    }
    words = [word for name, value in limits.items() for word in (f"--{name}", str(value))]
    words += ["--plugins", str(plugins)] if plugins is not None else []
    command = [sys.executable, "-m", "deepstitch.cli", "build", str(bundle), "--target", bundle.name]
    found = _run([*command, "--quiet", "--json", *words])
    return {name: found[name] for name in ("failed", "seconds", "memory", "engines") if name in found} | limits


def targets_here() -> tuple[str, ...]:
    """What the packages that are installed can run."""
    found = []
    if importlib.util.find_spec("tensorrt") is not None:
        import tensorrt

        found.append("trt8" if int(tensorrt.__version__.split(".")[0]) < 10 else "trt10")
    return (*found, "ort-cuda")


Keep = Callable[[dict[str, Any]], None]


def measure(work: Path, plan: Plan, plugins: Path | None, targets: tuple[str, ...], keep: Keep) -> dict[str, Any]:
    """All bundles that were prepared, and their peer."""
    models: dict[str, Any] = {}
    numbers = (plan.prompt, plan.tokens, plan.rounds)
    for model, kinds in plan.models.items():
        for weights in kinds:
            folder, found = work / f"{model}-{weights}", models.setdefault(f"{model}-{weights}", {})
            for target in targets:
                if not (folder / target).is_dir():
                    found[target] = {"failed": f"{folder / target} was not prepared"}
                    continue
                each = found.setdefault(target, {})
                if target != "ort-cuda":
                    each["build"] = build(folder / target, plan, plugins)
                    keep(models)
                if "failed" not in each.get("build", {}):
                    each["compare"] = child("compare", folder / target, folder / EXPECTED, *plan.cases)
                    keep(models)
                    each["speed"] = child("speed", folder / target, *numbers, plan.side)
                keep(models)
            if weights in ("fp32", "fp16") and _torch_has_cuda():
                dtype = {"fp32": "float32", "fp16": "float16"}[weights]
                found["transformers"] = child("transformers", checkpoint_of(work, model), dtype, *numbers)
                keep(models)
    return models


def _torch_has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("tensorrt", "onnxruntime-gpu", "cuda-bindings"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def main() -> int:
    """See the module's description."""
    if sys.argv[1:2] == ["--child"]:
        sys.stdout.write(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("engines_gpu"), help="folder of bundles and engines")
    parser.add_argument("--prepare", action="store_true", help="only export")
    parser.add_argument("--prepared", action="store_true", help="export nothing")
    parser.add_argument("--plugins", type=Path, help="the plugin library for TensorRT")
    parser.add_argument("--targets", help="of trt8, trt10, ort-cuda, with commas  [default: what is installed]")
    parser.add_argument("--tiny", action="store_true", help="the sample model alone, once")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    plan = TINY if arguments.tiny else FULL
    targets = tuple(arguments.targets.split(",")) if arguments.targets else ()
    if not arguments.prepared:
        prepare(arguments.work, plan, targets or (TARGETS if arguments.prepare else targets_here()))
    if arguments.prepare:
        return 0
    found = child("card")
    if "failed" in found:
        sys.stderr.write(f"there is no card to measure: {found['failed']}\n")
        return 2
    output = arguments.output or RESULTS / f"engines_gpu_{found['name'].replace(' ', '_')}.json"

    def keep(models: dict[str, Any], *, show: bool = False) -> None:
        report = {"card": found, "packages": _versions(), "tiny": arguments.tiny, "models": models}
        write_report("engines_gpu", report, output, show=show)

    keep(measure(arguments.work, plan, arguments.plugins, targets or targets_here(), keep), show=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
