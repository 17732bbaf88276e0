"""The least time each plugin operator could take on cards of compute capability 6.1: arithmetic, no measurement.

python benchmarks/plugins_roofline.py [--write] [--json]

Prints the tables of the operators' READMEs; --write puts them there, between the two marks.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import click

from deepstitch.plugins.common.roofline import CARDS, TABLES, cards_table

BEGIN, END = "<!-- roofline -->\n", "\n<!-- /roofline -->"
PLUGINS = Path(__file__).resolve().parent.parent / "plugins"


def text_of(folder: str) -> str:
    """What stands between the marks of an operator's README."""
    return f"{TABLES[folder]()}\n\nThe cards, as published:\n\n{cards_table()}"


def shown_in(folder: str) -> str | None:
    """What its README has there; None where it has no marks."""
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", (PLUGINS / folder / "README.md").read_text(), re.S)
    return found and found[1]


def write(folder: str) -> None:
    """Replace what its README has there.

    Raises:
        click.ClickException: it has no marks.
    """
    path, old = PLUGINS / folder / "README.md", shown_in(folder)
    if old is None:
        raise click.ClickException(f"{path} has no {BEGIN.strip()} … {END.strip()}")
    text = path.read_text("utf-8")
    path.write_text(text.replace(f"{BEGIN}{old}{END}", f"{BEGIN}{text_of(folder)}{END}"), "utf-8")


@click.command(help=__doc__)
@click.option("--write", "into_readmes", is_flag=True, help="Put the tables into the READMEs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def main(into_readmes: bool, as_json: bool) -> None:
    """Print, or write, every table."""
    texts = {folder: text_of(folder) for folder in TABLES}
    if as_json:
        click.echo(json.dumps({"cards": [dataclasses.asdict(card) for card in CARDS], "tables": texts}))
    else:
        click.echo("\n\n".join(f"## {folder}\n\n{text}" for folder, text in texts.items()))
    if into_readmes:
        for folder in TABLES:
            write(folder)


if __name__ == "__main__":
    main()
