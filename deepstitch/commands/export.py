"""``deepstitch export``: from a checkpoint to a bundle that was compared with its model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deepstitch.export.compare import Comparison
    from deepstitch.runtime.bundle import Bundle

__all__ = ["command"]

_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("export")
@click.argument("checkpoint", type=_FOLDER)
@click.option("-o", "--output", type=_FOLDER, required=True, help="Bundle folder to create.")
@click.option(
    "--target",
    default="ort-cpu",
    metavar="TARGET",
    help="What runs them: portable, ort-cpu, ort-cuda, trt8 or trt10.",
)
@click.option(
    "--weights",
    default="fp32",
    metavar="KIND",
    help="What the decoder's matrices are stored as: fp32, fp16, int8, int4 or mixed.",
)
@click.option(
    "--vision-weights",
    metavar="KIND",
    help="Likewise for the vision encoder: fp32, fp16, int8 or int4; fp16 next to integers, else as --weights.",
)
@click.option(
    "--kv-cache",
    default="fp32",
    metavar="KIND",
    help="What keys and values are stored as: fp32, fp16, int8 or int4; the last two need --calibration.",
)
@click.option("--block", type=int, default=32, show_default=True, help="Integers that share a scale: 32, 64 or 128.")
@click.option("--asymmetric", is_flag=True, help="Give every block a zero point of its own.")
@click.option(
    "--method",
    metavar="METHOD",
    help="How integers are chosen: rtn, search or gptq; gptq with --calibration, else search.",
)
@click.option(
    "--calibration", type=_FILE, metavar="FILE", help="Conversations, one JSON object per line; see the README."
)
@click.option("--budget", metavar="SIZE", help="For mixed: what the integers may take, as 9GB, 700MB or 5.5bits.")
@click.option("--by-reference", is_flag=True, help="Link the checkpoint's weight files instead of writing a copy.")
@click.option(
    "--expert-layout",
    metavar="LAYOUT",
    help="hub or transformers, where the shapes of the experts cannot tell.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--compare/--no-compare",
    "compare",
    default=True,
    help="Compare the bundle with the PyTorch model afterwards.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the summary.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def command(
    checkpoint: Path,
    output: Path,
    target: str,
    weights: str,
    vision_weights: str | None,
    kv_cache: str,
    block: int,
    asymmetric: bool,
    method: str | None,
    calibration: Path | None,
    budget: str | None,
    by_reference: bool,
    expert_layout: str | None,
    overwrite: bool,
    compare: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn a checkpoint folder into a bundle of ONNX graphs and weights.

    The bundle is opened, its contract checked, and every stage compared with the PyTorch model; the exit code
    is 1 if the comparison fails, and the bundle stays. A refused checkpoint leaves nothing behind. An interrupted
    quantization goes on where it was when the same command is run again.

    \b
    deepstitch export Qwen3-VL-2B-Instruct --target ort-cpu --weights fp16 -o qwen3-vl-2b
    deepstitch export Qwen3-VL-30B-A3B-Instruct --weights int4 --calibration prompts.jsonl -o qwen3-vl-30b
    """
    from deepstitch.errors import ComparisonFailed, MissingDependency

    try:
        from deepstitch.export import ExportConfig, QuantizationConfig, export_checkpoint
    except ModuleNotFoundError as error:
        if str(error.name).startswith("deepstitch"):
            raise
        raise MissingDependency(str(error.name), "export", "deepstitch export") from None

    began = time.perf_counter()
    config = ExportConfig(
        checkpoint=checkpoint,
        output=output,
        target=target,
        weights=weights,
        vision_weights=vision_weights,
        kv_cache=kv_cache,
        quantization=QuantizationConfig(
            block=block, symmetric=not asymmetric, method=method, calibration=calibration, budget=budget
        ),
        by_reference=by_reference,
        expert_layout=expert_layout,
        overwrite=overwrite,
        progress=not quiet,
    )
    if compare:
        from deepstitch.export.compare import check_memory

        check_memory(checkpoint, expert_layout)
    export_checkpoint(config)
    seconds = time.perf_counter() - began
    bundle = _open(output)
    comparison = _compare(bundle, config) if compare else None
    click.echo(
        json.dumps(_as_dict(bundle, comparison, seconds), indent=1)
        if as_json
        else "\n".join(_summary(bundle, comparison, seconds))
    )
    if comparison is not None and not comparison.passed:
        from deepstitch.export.compare.report import failure_lines

        raise ComparisonFailed(
            f"{output} was written and stays there, but is not what the PyTorch model computes: "
            f"{'; '.join(failure_lines(comparison))}"
        )


def _open(folder: Path) -> Bundle:
    """Open the bundle and compare the graph files with the contract, without loading weights."""
    from deepstitch.export.compare.contract_check import check_contract
    from deepstitch.runtime.bundle import Bundle

    bundle = Bundle.open(folder, verify="size")  # the hashes were taken a moment ago
    check_contract(bundle)
    return bundle


def _compare(bundle: Bundle, config: Any) -> Comparison:
    from deepstitch.export.compare import compare_bundle

    return compare_bundle(
        bundle, checkpoint=config.checkpoint, expert_layout=config.expert_layout, progress=config.progress
    )


def _as_dict(bundle: Bundle, comparison: Comparison | None, seconds: float) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.folder),
        "target": manifest.target,
        "weights": manifest.weights,
        "parameters": manifest.model.num_parameters,
        "bytes": sum(record.size for record in manifest.files.values()),
        "graphs": {name: graph.nodes for name, graph in manifest.graphs.items()},
        "export_seconds": round(seconds, 2),
        "comparison": comparison.to_dict() if comparison else None,
    }


def _summary(bundle: Bundle, comparison: Comparison | None, seconds: float) -> Iterator[str]:
    from deepstitch.export.compare.report import summary_line

    manifest = bundle.manifest
    size = sum(record.size for record in manifest.files.values())
    graphs = ", ".join(f"{name} {graph.nodes:,} nodes" for name, graph in manifest.graphs.items())
    yield (
        f"{bundle.folder}: {manifest.model.model_type}, {manifest.model.num_parameters:,} parameters, "
        f"target {manifest.target}, weights {manifest.weights}"
    )
    if manifest.quantization is not None:
        found = manifest.quantization
        yield (
            f"  {found.bits_per_weight:.2f} bits per quantized weight, method {found.method}"
            + (f" on {found.calibration_tokens:,} calibration tokens" if found.calibration_tokens else "")
        )
    yield f"  {graphs}; {size / 1e6:,.1f} MB; exported in {seconds:.1f} s"
    yield f"  {summary_line(comparison) if comparison else 'not compared with the model (--no-compare)'}"
