"""The operators' READMEs name what there is: attributes, inputs, links, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepstitch.commands.plugins import command
from deepstitch.plugins.registry import OPS, folder_of, load

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
SECTIONS = ("Mathematics", "Inputs, attributes, formats", "Limits", "When it wins", "Memory plan", "Roofline")


def readme(folder: str) -> str:
    return (folder_of(OPS[folder]) / "README.md").read_text("utf-8")


@pytest.mark.parametrize("folder", OPS)
def test_an_operator_is_described(folder: str) -> None:
    text, op = readme(folder), load(folder)
    assert text.startswith(f"# {op.schema.name}\n")
    assert [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    assert [each.name for each in op.schema.attributes if f"`{each.name}`" not in text] == []
    inputs = {spec.name for case in op.cases for spec in op.schema.inputs(op.schema.resolve(case.attributes))}
    assert [name for name in sorted(inputs) if not re.search(rf"\b{name}\b", text)] == []
    assert "nothing was run" in text.replace("\n", " ").lower(), "estimates are called estimates"


def test_links_lead_to_files(repository: Path) -> None:
    for path in (repository / "plugins").rglob("README.md"):
        targets = [target for target in LINK.findall(path.read_text("utf-8")) if "://" not in target]
        assert [target for target in targets if not (path.parent / target).exists()] == [], path


def test_the_overview_has_every_operator_and_command(repository: Path) -> None:
    text = (repository / "plugins" / "README.md").read_text("utf-8")
    for folder, name in OPS.items():
        assert f"[{folder}]({folder}/README.md) | {name} |" in text
        assert re.search(rf"^\| {name} \|(?: [^|]+ \|){{8}}$", text, re.MULTILINE), f"{name} has no line of checks"
    for verb in command.commands:
        assert f"deepstitch plugins {verb}" in text
