"""``deepstitch split``: a bundle's halves, for processes on machines that need no more than one of them."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["command"]

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("split")
@click.argument("bundle", type=_FOLDER, metavar="BUNDLE")
@click.option("--encode-side", type=_FOLDER, metavar="DIR", help="Folder for the half with the vision encoder.")
@click.option("--language-side", type=_FOLDER, metavar="DIR", help="Folder for the half with the decoder.")
@click.option("--overwrite", is_flag=True, help="Replace existing bundles.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the summary.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def command(
    bundle: Path, encode_side: Path | None, language_side: Path | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Write the halves of a bundle that encode-server and language-server need.

    Each has one graph with its weights, byte for byte as in BUNDLE, and what both need: the token embedding, tokenizer,
    chat template and pixel settings. Other commands want the whole bundle.

    \b
    deepstitch split qwen3-vl-30b --encode-side qwen3-vl-30b-encode --language-side qwen3-vl-30b-language
    """
    from deepstitch.errors import InputError, MissingDependency, OutputError

    wanted = {side: path for side, path in (("encode", encode_side), ("language", language_side)) if path is not None}
    if not wanted:
        raise InputError("nothing to write; pass --encode-side DIR, --language-side DIR, or both")
    if len({path.resolve() for path in wanted.values()}) < len(wanted):
        raise OutputError(f"{encode_side}: both halves cannot lie in one folder; pass two")
    try:
        from deepstitch.export.split import split_bundle
        from deepstitch.export.writer import refuse_existing
    except ModuleNotFoundError as error:
        if str(error.name).startswith("deepstitch"):
            raise
        raise MissingDependency(str(error.name), "export", "deepstitch split") from None
    from deepstitch.manifest import Manifest
    from deepstitch.runtime.bundle import Bundle

    for path in wanted.values():
        refuse_existing(path, overwrite=overwrite)
    whole = Bundle.open(bundle, progress=not quiet)
    sizes = {}
    for side, path in wanted.items():
        split_bundle(whole, side, path, overwrite=overwrite, progress=not quiet)
        sizes[side] = sum(record.size for record in Manifest.read(path).files.values())
    if as_json:
        found = {side: {"bundle": str(path), "bytes": sizes[side]} for side, path in wanted.items()}
        click.echo(json.dumps(found, indent=1))
        return
    for side, path in wanted.items():
        click.echo(f"{path}: {side} side, {sizes[side] / 1e6:,.1f} MB; serve it with 'deepstitch {side}-server'")
