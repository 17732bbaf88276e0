"""``deepstitch compare``: does a bundle compute what the model computes?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deepstitch.runtime.bundle import Bundle

__all__ = ["command"]

_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("compare")
@click.argument("bundle", type=_FOLDER, metavar="DIR")
@click.option(
    "--against",
    type=click.Choice(["pytorch", "transformers", "portable", "definitions"]),
    help="The reference: our PyTorch model, Hugging Face's, another bundle, or the bundle's own graphs with plugins by "
    "the functions that define them.  [default: pytorch; definitions where --engine runs plugins]",
)
@click.option(
    "--checkpoint",
    type=_FOLDER,
    help="The checkpoint the bundle was exported from, if it is not where it was then.",
)
@click.option(
    "--engine",
    metavar="NAME",
    help="What runs the bundle, such as tensorrt.  [default: ONNX Runtime on the CPU, plugins by their definitions]",
)
@click.option("--reference", type=_FOLDER, help="The bundle to compare with; --against portable needs it.")
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Run only this case; may be given several times.")
@click.option(
    "--tolerance",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a limit: logits, stages, outliers or agreement; may be given several times.",
)
@click.option(
    "--expert-layout",
    type=click.Choice(["hub", "transformers"]),
    help="Where the shapes of the experts cannot tell.",
)
@click.option(
    "--quality",
    type=_FILE,
    metavar="FILE",
    help="Measure instead what rounding cost: KL divergence from the checkpoint on the conversations of this file.",
)
@click.option("--html", "html_file", type=_FILE, help="Write a page with error plots.")
@click.option(
    "--polygraphy-script",
    "script",
    type=_FILE,
    help="Write a script that repeats this with Polygraphy alone.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def command(
    bundle: Path,
    against: str | None,
    engine: str | None,
    checkpoint: Path | None,
    reference: Path | None,
    cases: tuple[str, ...],
    settings: tuple[str, ...],
    expert_layout: str | None,
    quality: Path | None,
    html_file: Path | None,
    script: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare a bundle with a reference, case by case and stage by stage.

    The cases cover text, one to three pictures, batches, video, further turns, chunked prefill and decoding,
    with inputs made up to fit the model. The exit code is 1 if a stage is over its limit.

    \b
    deepstitch compare BUNDLE --html report.html
    deepstitch compare BUNDLE --against portable --reference PORTABLE_BUNDLE
    deepstitch compare BUNDLE --engine tensorrt
    deepstitch compare BUNDLE --quality conversations.jsonl
    """
    from deepstitch.errors import ComparisonFailed, MissingDependency
    from deepstitch.export.compare.cases import select_cases

    try:
        from deepstitch.export.compare.comparison import compare_bundle, default_reference
    except ModuleNotFoundError as error:
        if str(error.name).startswith("deepstitch"):
            raise
        raise MissingDependency(str(error.name), "compare", "deepstitch compare") from None
    from deepstitch.export.compare.html import write_html
    from deepstitch.export.compare.report import failure_lines, table_lines
    from deepstitch.runtime.bundle import Bundle

    opened = Bundle.open(bundle, progress=not quiet)
    if quality is not None:
        _report_quality(opened, checkpoint, quality, expert_layout, as_json=as_json, progress=not quiet)
        return
    found = compare_bundle(
        opened,
        against=against or default_reference(opened, engine),
        checkpoint=checkpoint,
        reference=reference,
        cases=select_cases(cases),
        settings=settings,
        expert_layout=expert_layout,
        engine=engine,
        script=script,
        progress=not quiet,
    )
    if html_file is not None:
        write_html(found, html_file)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(table_lines(found)))
    if not found.passed:
        raise ComparisonFailed(f"{bundle} is not what its reference computes: {'; '.join(failure_lines(found))}")


def _report_quality(
    bundle: Bundle,
    checkpoint: Path | None,
    conversations: Path,
    expert_layout: str | None,
    *,
    as_json: bool,
    progress: bool,
) -> None:
    from deepstitch.export.compare.comparison import checkpoint_of
    from deepstitch.export.compare.quality import measure_quality

    folder = checkpoint_of(bundle, checkpoint, "--quality")
    found = measure_quality(bundle, folder, conversations, expert_layout=expert_layout, progress=progress)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle.folder), "weights": bundle.manifest.weights, **found.to_dict()}))
        return
    click.echo(
        f"{bundle.folder}: {found.conversations} conversations, {found.positions} next tokens; KL divergence from the "
        f"checkpoint {found.mean_kl:.3g} nats (largest {found.max_kl:.3g}); same most probable token "
        f"{found.top1_agreement:.2%}"
    )
