"""``deepstitch build``: TensorRT engines from a bundle, checked and planned first."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepstitch.commands.build_report import built_lines, check_lines, plan_refusal

if TYPE_CHECKING:
    from types import ModuleType

    from deepstitch.export.compare import Comparison
    from deepstitch.export.tensorrt import BuildCheck, Limits, Subject
    from deepstitch.export.tensorrt.build_machine import BuildMachine
    from deepstitch.export.tensorrt.builder import BuiltEngines

__all__ = ["command"]

_COUNT = click.IntRange(min=1)


@click.command("build")
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUNDLE|CHECKPOINT")
@click.option("--target", required=True, metavar="TARGET", help="Which TensorRT: trt8 (8.6) or trt10 (10 and 11).")
@click.option("--check", is_flag=True, help="Check the graphs and plan the memory; needs no TensorRT and no GPU.")
@click.option(
    "--sm",
    type=int,
    help="Compute capability of the card, without the dot.  [default: the card's, or the oldest]",
)
@click.option("--memory", metavar="SIZE", help="What the card has, as 2GB.  [default: what is free on the card here]")
@click.option(
    "--plugins",
    type=click.Path(path_type=Path),
    help="The plugin library.  [default: that in this folder, if it is needed]",
)
@click.option("--images", type=_COUNT, default=1, help="Pictures in one call of the vision encoder.")
@click.option("--image-patches", type=_COUNT, default=4096, help="Patches of a picture; 4096 are 1024x1024 pixels.")
@click.option("--max-context", type=_COUNT, help="Tokens per row, prompt and answer.  [default: 4096, or the model's]")
@click.option("--batch", type=_COUNT, default=1, help="Rows that run together.")
@click.option("--prefill-chunk", type=_COUNT, default=512, help="Prompt tokens per decoder call.")
@click.option("--logits", type=_COUNT, default=1, help="Of how many tokens of a chunk one call gives logits.")
@click.option("--weights", metavar="KIND", help="Of a CHECKPOINT: as 'deepstitch export' would store them.")
@click.option("--vision-weights", metavar="KIND", help="Likewise for the vision encoder.")
@click.option("--kv-cache", metavar="KIND", help="Likewise for keys and values: fp32 or fp16.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="To begin with.  [default: of the last build]")
@click.option(
    "--compare/--no-compare",
    "compare",
    default=True,
    help="Run the engines on the cases of 'deepstitch compare' afterwards.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the report.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.pass_context
def command(
    ctx: click.Context,
    folder: Path,
    target: str,
    check: bool,
    sm: int | None,
    memory: str | None,
    plugins: Path | None,
    images: int,
    image_patches: int,
    max_context: int | None,
    batch: int,
    prefill_chunk: int,
    logits: int,
    weights: str | None,
    vision_weights: str | None,
    kv_cache: str | None,
    timing_cache: Path | None,
    compare: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build TensorRT engines from a bundle, for the card and the TensorRT that are here.

    They lie in the bundle, in engines/sm61-tensorrt8.6.1 for example, with the plugin library and a record of all they
    depend on; engines of the same card and TensorRT that were there are replaced.

    First the bundle is checked, and with --check that is all. Every node must be an operator of TensorRT's ONNX
    parser, in a form it gets right, or a plugin with the attributes its creator takes; the sizes of all tensors are
    followed at the smallest, usual and largest inputs, and the memory is planned. For the check a CHECKPOINT will do:
    it is checked as it would be exported, without reading its weights. The exit code is 1 if a graph or the plugin
    library has a problem, 2 if the memory does not suffice.

    Afterwards the engines are compared with the bundle in ONNX Runtime, each plugin computed by the function that
    defines it; the exit code is 1 if they differ, and the engines stay.

    \b
    deepstitch build qwen3-vl-2b --target trt8 --plugins libdeepstitch_plugins_trt8.so --max-context 2048
    deepstitch build qwen3-vl-2b --target trt8 --check --memory 2GB --max-context 2048
    deepstitch build Qwen3-VL-30B-A3B-Instruct --target trt8 --check --weights int4 --memory 24GB
    """
    tools = _tools()
    oldest = tools.default_sm(target)
    available = (tools.parse_memory(memory), f"--memory {memory}") if memory else None
    if ctx.find_root().params.get("debug"):
        ctx.with_resource(_shown_log())
    machine = None if check else _machine(folder, target, sm)
    subject = _subject(folder, target, {"weights": weights, "vision_weights": vision_weights, "kv_cache": kv_cache})
    context = max_context or min(4096, subject.context)
    limits = tools.Limits(
        images=images,
        image_patches=image_patches,
        max_context=context,
        batch=batch,
        prefill_chunk=min(prefill_chunk, context),
        logits=logits,
    )
    if machine is None:
        found = tools.check_build(subject, limits, sm or oldest, available or tools.memory_of_card(), plugins)
        _settle(ctx, found, as_json=as_json, shown=True)
        return
    library = machine.library(plugins, subject.graphs.values())
    available = available or (machine.free_bytes, machine.card)
    found = tools.check_build(subject, limits, machine.sm, available, library[0] if library else None)
    _settle(ctx, found, as_json=as_json, shown=not as_json)

    from deepstitch.export.tensorrt.builder import BuildOrder, build_engines

    words = _words(folder, target, limits)
    order = BuildOrder(
        bundle=folder, check=found, library=library, timing_cache=timing_cache, command=words, progress=not quiet
    )
    built = build_engines(order, machine)
    comparison = _compared(folder, progress=not quiet) if compare else "not compared (--no-compare)"
    _conclude(found, built, comparison, as_json=as_json)


def _compared(folder: Path, *, progress: bool) -> Comparison | str:
    """The engines against the definitions of their graphs; or why not, where that says nothing against them."""
    from deepstitch.errors import InputError
    from deepstitch.export.compare import compare_bundle
    from deepstitch.manifest import Manifest
    from deepstitch.runtime.bundle import Bundle

    manifest = Manifest.read(folder)
    if manifest.vision is not None and len(manifest.graphs) < 2:
        return "not compared: this is one side of a split bundle"
    try:
        return compare_bundle(Bundle.open(folder), against="definitions", engine="tensorrt", progress=progress)
    except InputError as error:  # every case is larger than what the engines were built for
        return f"not compared: {error}"


def _conclude(found: BuildCheck, built: BuiltEngines, comparison: Comparison | str, *, as_json: bool) -> None:
    """Show what was built and how it compares.

    Raises:
        ComparisonFailed: the engines are not what their graphs compute.
    """
    from deepstitch.errors import ComparisonFailed
    from deepstitch.export.compare.report import failure_lines, summary_line

    compared = None if isinstance(comparison, str) else comparison
    if as_json:
        said = compared.to_dict() if compared else comparison
        click.echo(json.dumps(found.to_dict() | {"engines": built.to_dict(), "comparison": said}, indent=1))
    else:
        click.echo("\n".join(["", *built_lines(built), "", summary_line(compared) if compared else str(comparison)]))
    if compared is not None and not compared.passed:
        raise ComparisonFailed(
            f"{built.folder}: built, and they stay, but they do not compute what their graphs do: "
            f"{'; '.join(failure_lines(compared))}"
        )


def _tools() -> ModuleType:
    from deepstitch.errors import MissingDependency

    try:
        from deepstitch.export import tensorrt
    except ModuleNotFoundError as error:
        if str(error.name).startswith("deepstitch"):
            raise
        raise MissingDependency(str(error.name), "export", "deepstitch build") from None
    return tensorrt


def _settle(ctx: click.Context, found: BuildCheck, *, as_json: bool, shown: bool) -> None:
    """Show what a check found, always if something is wrong, and end there if so.

    Raises:
        InputError: the memory does not suffice.
    """
    from deepstitch.errors import InputError

    too_large = found.plan is not None and found.plan.fits is False
    if shown or not found.passed or too_large:
        click.echo(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(check_lines(found)))
    if not found.passed:
        ctx.exit(1)
    if found.plan is not None and too_large:
        raise InputError(plan_refusal(found.plan))


@contextmanager
def _shown_log() -> Iterator[None]:
    """What TensorRT says, on stderr."""
    log, handler = logging.getLogger("deepstitch.tensorrt"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("TensorRT: %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _machine(folder: Path, target: str, sm: int | None) -> BuildMachine:
    """The card and the TensorRT that are here.

    Raises:
        DeepstitchError: one of them is missing, or does not fit.
    """
    from deepstitch.errors import DeepstitchError, InputError
    from deepstitch.export.tensorrt.build_machine import BuildMachine
    from deepstitch.manifest import MANIFEST_NAME

    if (folder / "config.json").is_file() and not (folder / MANIFEST_NAME).is_file():
        raise InputError(
            f"{folder} is a checkpoint; engines are built from a bundle: 'deepstitch export {folder} --target {target} "
            "-o BUNDLE' first, or check it with --check"
        )
    try:
        return BuildMachine.find(target, sm)
    except DeepstitchError as error:
        raise type(error)(f"{error} (--check needs neither a card nor TensorRT)") from None


def _words(folder: Path, target: str, limits: Limits) -> str:
    """The equivalent command line; the folder by its name only, because a bundle travels."""
    words = ["deepstitch", "build", folder.resolve().name, "--target", target]
    for name, value in dataclasses.asdict(limits).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _subject(folder: Path, target: str, stored: dict[str, str | None]) -> Subject:
    from deepstitch.errors import InputError
    from deepstitch.export.tensorrt import Stored, Subject
    from deepstitch.manifest import MANIFEST_NAME

    given = {name: value for name, value in stored.items() if value is not None}
    is_checkpoint = (folder / "config.json").is_file() and not (folder / MANIFEST_NAME).is_file()
    if is_checkpoint:
        return Subject.from_checkpoint(folder, target, Stored(**given))
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{flags}: in a bundle that is decided; leave it out, or give the checkpoint")
    return Subject.from_bundle(folder, target)
