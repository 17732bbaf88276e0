"""``deepstitch inspect``: what a checkpoint or bundle holds and how much memory it will want."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deepstitch.inspection import Inspection

__all__ = ["command"]


@click.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path), metavar="CHECKPOINT|BUNDLE")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Tokens per row, prompt and answer.  [default: 4096, or the model's limit]",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Rows that run together.")
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=0),
    default=512,
    help="Prompt tokens per decoder call; 0 takes all at once.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.pass_context
def command(
    ctx: click.Context,
    folder: Path,
    context: int | None,
    batch: int,
    prefill_chunk: int,
    as_json: bool,
) -> None:
    """Show architecture, parameters, sizes, contract and estimated memory.

    Of the weights only the headers are read. The files of a bundle are compared with the sha256 in its
    manifest; the exit code is 1 if one of them differs.

    \b
    deepstitch inspect Qwen3-VL-30B-A3B-Instruct --context 32768 --batch 4
    """
    from deepstitch.inspection import inspect

    found = inspect(folder, context=context, batch=batch, prefill_chunk=prefill_chunk or None)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(_report(found)))
    if not found.intact:
        ctx.exit(1)


def _report(found: Inspection) -> Iterable[str]:
    yield f"{found.kind} {found.path}"
    yield ""
    yield from _table(None, [[label, _plain(value)] for label, value in found.architecture.items()])
    yield ""
    yield f"{found.parameters:,} parameters, {found.active_parameters:,} active per token"
    yield ""
    yield from _modules(found)
    for name, graph in found.graphs.items():
        yield ""
        yield f"{name}: {graph['file']}, opset {graph['opset']}, {graph['nodes']:,} nodes"
        yield from _contract(graph)
    yield ""
    yield from _table(["file", "size", "status"], [[f.name, _size(f.size), f.status] for f in found.files])
    yield ""
    if found.engines:
        yield from _engines(found)
        yield ""
    yield from _memory(found)


def _modules(found: Inspection) -> Iterable[str]:
    rows = [
        [m.name, f"{m.tensors:,}", f"{m.parameters:,}", _size(m.num_bytes), ", ".join(m.bytes_by_dtype)]
        for m in found.modules
    ]
    yield from _table(["module", "tensors", "parameters", "on disk", "stored as"], rows)


def _engines(found: Inspection) -> Iterable[str]:
    rows = [
        [e.name, _size(e.size), e.card, f"{e.limits.max_context:,} tokens, {e.limits.batch} rows" if e.limits else "",
         e.status] for e in found.engines
    ]  # fmt: skip
    yield from _table(["engines", "size", "card", "up to", "status"], rows)


def _contract(graph: dict[str, list[dict[str, object]]]) -> Iterable[str]:
    """Inputs and outputs; of the cache tensors only the first layer, the others are alike."""
    rows = []
    for kind in ("inputs", "outputs"):
        for spec in graph[kind]:
            name = str(spec["name"])
            layer = name.split(".")[1] if name.startswith(("past_key_values.", "present.")) else "0"
            if layer == "0":
                rows.append([kind[:-1], name, str(spec["dtype"]), _plain(spec["shape"])])
    yield from _table([], rows)


def _memory(found: Inspection) -> Iterable[str]:
    load = found.workload
    yield f"KV cache: {_size(found.kv_bytes_per_token)} per token ({found.kv_cache_dtype})"
    chunks = f"in chunks of {load.prefill_chunk:,}" if load.prefill_chunk else "at once"
    yield (
        f"Estimated memory at context {load.context:,}, batch {load.batch}, prompt {chunks} "
        "(language side; pictures come on top)"
    )
    rows = [
        [m.weights, *map(_size, (m.weight_bytes, m.kv_cache_bytes, m.activation_bytes, m.total_bytes))]
        for m in found.memory
    ]
    yield from _table(["weights as", "weights", "KV cache", "activations", "total"], rows)


def _table(header: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Align columns; numbers and sizes to the right."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))] if lines else []
    for line in lines:
        cells = (
            cell.rjust(width) if column and rows and rows[0][column][:1].isdigit() else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield ("  " + "  ".join(cells)).rstrip()


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


def _size(num_bytes: int) -> str:
    """Bytes in binary units with three significant digits."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
