"""``deepstitch build``: would a bundle become TensorRT engines, and would they fit the card?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deepstitch.export.tensorrt import BuildCheck, Subject
    from deepstitch.export.tensorrt.check import GraphCheck
    from deepstitch.export.tensorrt.memory_plan import MemoryPlan

__all__ = ["command"]

_COUNT = click.IntRange(min=1)


@click.command("build")
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUNDLE|CHECKPOINT")
@click.option("--target", required=True, metavar="TARGET", help="Which TensorRT: trt8, which is 8.6.")
@click.option("--check", is_flag=True, help="Check the graphs and plan the memory; needs no TensorRT and no GPU.")
@click.option("--sm", type=int, default=61, help="Compute capability of the card, without the dot.")
@click.option("--memory", metavar="SIZE", help="What the card has, as 2GB.  [default: what is free on the card here]")
@click.option("--plugins", type=click.Path(path_type=Path), help="Plugin library to ask too; see 'deepstitch plugins'.")
@click.option("--images", type=_COUNT, default=1, help="Pictures in one call of the vision encoder.")
@click.option("--image-patches", type=_COUNT, default=4096, help="Patches of a picture; 4096 are 1024x1024 pixels.")
@click.option("--max-context", type=_COUNT, help="Tokens per row, prompt and answer.  [default: 4096, or the model's]")
@click.option("--batch", type=_COUNT, default=1, help="Rows that run together.")
@click.option("--prefill-chunk", type=_COUNT, default=512, help="Prompt tokens per decoder call.")
@click.option("--weights", metavar="KIND", help="Of a CHECKPOINT: as 'deepstitch export' would store them.")
@click.option("--vision-weights", metavar="KIND", help="Likewise for the vision encoder.")
@click.option("--kv-cache", metavar="KIND", help="Likewise for keys and values: fp32 or fp16.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the report.")
@click.pass_context
def command(
    ctx: click.Context,
    folder: Path,
    target: str,
    check: bool,
    sm: int,
    memory: str | None,
    plugins: Path | None,
    images: int,
    image_patches: int,
    max_context: int | None,
    batch: int,
    prefill_chunk: int,
    weights: str | None,
    vision_weights: str | None,
    kv_cache: str | None,
    as_json: bool,
) -> None:
    """Check that a bundle becomes TensorRT engines, and plan their memory.

    Every node must be an operator of TensorRT's ONNX parser, in a form it gets right, or a plugin with the attributes
    its creator takes; the sizes of all tensors are followed at the smallest, usual and largest inputs. A CHECKPOINT is
    checked as it would be exported, without reading its weights. The exit code is 1 if a graph or the plugin
    library has a problem, 2 if the memory does not suffice. Engines are not built yet: --check is all there is.

    \b
    deepstitch build qwen3-vl-2b --target trt8 --check --memory 2GB --max-context 2048
    deepstitch build Qwen3-VL-30B-A3B-Instruct --target trt8 --check --weights int4 --memory 24GB
    """
    from deepstitch.errors import InputError, MissingDependency

    if not check:
        _refuse_to_build()
    try:
        from deepstitch.export.tensorrt import Limits, check_build, memory_of_card, parse_memory, parser_of
    except ModuleNotFoundError as error:
        if str(error.name).startswith("deepstitch"):
            raise
        raise MissingDependency(str(error.name), "export", "deepstitch build") from None

    parser_of(target)
    available = (parse_memory(memory), f"--memory {memory}") if memory else memory_of_card()
    stored = {"weights": weights, "vision_weights": vision_weights, "kv_cache": kv_cache}
    subject = _subject(folder, target, stored)
    context = max_context or min(4096, subject.context)
    limits = Limits(
        images=images,
        image_patches=image_patches,
        max_context=context,
        batch=batch,
        prefill_chunk=min(prefill_chunk, context),
    )
    found = check_build(subject, limits, sm, available, plugins)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(_report(found)))
    if not found.passed:
        ctx.exit(1)
    if found.plan is not None and found.plan.fits is False:
        raise InputError(_refusal(found.plan))


def _refuse_to_build() -> None:
    import importlib.util

    from deepstitch.errors import UnsupportedError

    missing = [] if importlib.util.find_spec("tensorrt") else ["the Python package tensorrt (8.6)"]
    missing.append("a builder in this version of deepstitch")
    raise UnsupportedError(
        f"engines cannot be built here: {' and '.join(missing)} missing; check and plan with --check"
    )


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


def _report(found: BuildCheck) -> Iterator[str]:
    subject, limits = found.subject, found.limits
    vision = f", vision {subject.vision_weights}" if subject.vision_weights else ""
    yield f"{subject.name}: target {subject.target}, weights {subject.weights}{vision}, sm_{found.sm}"
    pictures = f"{limits.images} x {limits.image_patches:,} patches, " if subject.merge_size else ""
    yield (
        f"  up to {pictures}{limits.max_context:,} tokens, {limits.batch} rows, chunks of {limits.prefill_chunk:,}; "
        f"parser {found.parser}"
    )
    for graph in found.graphs:
        yield ""
        yield from _graph_lines(graph)
    yield ""
    if found.library is not None:
        yield from (f"PROBLEM plugin library: {each}" for each in found.library)
        yield from () if found.library else ("plugin library: as the graphs need it",)
    if found.plan is None:
        yield "no memory plan: the sizes of some tensors could not be followed"
    else:
        yield from _plan_lines(found.plan)


def _graph_lines(graph: GraphCheck) -> Iterator[str]:
    plugins = ", ".join(f"{name} {count}" for name, count in graph.plugins.items()) or "none"
    yield f"{graph.name}: {graph.nodes:,} nodes, {len(graph.operators)} operators, plugins: {plugins}"
    yield f"  sizes followed at {', '.join(graph.corners) or 'no corner'}"
    for each in graph.problems:
        times = f" ({each.count} times)" if each.count > 1 else ""
        yield f"  PROBLEM {each.operator}: {each.message}{times}; first: {each.node or 'a node without a name'}"
    if not graph.problems:
        yield "  every node is the parser's or a plugin's"


def _plan_lines(plan: MemoryPlan) -> Iterator[str]:
    from deepstitch.export.tensorrt.advice import readable

    yield "memory on the card"
    for item in plan.items:
        yield f"  {item.name:<19}{readable(item.nbytes):>10}  {item.basis}"
    yield f"  {'total':<19}{readable(plan.total_bytes):>10}"
    if plan.available is None:
        yield "  there is no card here; say what yours has with --memory"
        return
    yield f"  {'there are':<19}{readable(plan.available):>10}  {plan.source}"
    spare = plan.available - plan.total_bytes
    yield f"  fits, {readable(spare)} to spare" if plan.fits else f"  {readable(-spare)} too much"
    yield from (f"  what helps: {each}" for each in plan.advice)


def _refusal(plan: MemoryPlan) -> str:
    from deepstitch.export.tensorrt.advice import readable

    needed, available = readable(plan.total_bytes), readable(plan.available or 0)
    return f"the plan takes {needed}, there are {available} ({plan.source}); what helps: {'; or '.join(plan.advice)}"
