"""What ``deepstitch build`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepstitch.export.tensorrt import BuildCheck
    from deepstitch.export.tensorrt.builder import BuiltEngines
    from deepstitch.export.tensorrt.check import GraphCheck
    from deepstitch.export.tensorrt.memory_plan import MemoryPlan

__all__ = ["built_lines", "check_lines", "plan_refusal"]


def check_lines(found: BuildCheck) -> Iterator[str]:
    """What a check found."""
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


def plan_refusal(plan: MemoryPlan) -> str:
    """Why nothing is built, and what helps."""
    from deepstitch.export.tensorrt.advice import readable

    needed, available = readable(plan.total_bytes), readable(plan.available or 0)
    return f"the plan takes {needed}, there are {available} ({plan.source}); what helps: {'; or '.join(plan.advice)}"


def built_lines(built: BuiltEngines) -> Iterator[str]:
    """What was built, and the same for ``trtexec``."""
    manifest = built.manifest
    yield f"{built.folder}: TensorRT {manifest.tensorrt}, sm_{manifest.sm} ({manifest.card})"
    for name, graph in manifest.graphs.items():
        profiles = ", ".join(each.name for each in graph.profiles)
        size, seconds = f"{graph.size / 2**20:,.1f} MiB", built.seconds[name]
        yield f"  {graph.file:<22}{size:>14} in {seconds:,.1f} s; profiles: {profiles}"
    for name, command in built.trtexec.items():
        yield ""
        fewer = built.manifest.target == "trt8" and len(built.manifest.graphs[name].profiles) > 1
        yield f"'{name}' by trtexec{', with its first profile alone, to measure' if fewer else ''}:"
        yield f"  {command}"
