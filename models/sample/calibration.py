"""Writes a calibration set for the sample model: conversations from training seeds, with their pictures.

    python -m deepstitch.models.sample.calibration FOLDER [--per-kind N] [--held-out]

``FOLDER/calibration.jsonl`` is what ``deepstitch export --calibration`` reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from PIL import Image

from deepstitch.models.sample.generator import HELD_OUT, TRAIN, Episode, Question, make_episode

__all__ = ["write_calibration"]

_KINDS = ("one", "several", "album", "text", "recall")
_FIRST = 1 << 32  # far beyond the episodes that training drew


def write_calibration(folder: Path, per_kind: int = 12, *, split: str = TRAIN) -> Path:
    """Write ``per_kind`` conversations of each kind; returns the JSON Lines file.

    Args:
        folder: created if missing.
        per_kind: conversations of each kind.
        split: ``TRAIN`` to calibrate with, ``HELD_OUT`` to measure with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for kind in _KINDS:
        for index in range(per_kind):
            episode = make_episode(split, kind, _FIRST + index)
            names = [f"{kind}-{index}-{number}.png" for number in range(len(episode.pictures))]
            for name, pixels in zip(names, episode.pixels(), strict=True):
                Image.fromarray(pixels).save(folder / name)
            lines.append(_line(episode, episode.questions[index % len(episode.questions)], names))
    path = folder / "calibration.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def _line(episode: Episode, question: Question, names: list[str]) -> dict[str, Any]:
    prefix = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in episode.prefix]
    return {
        "messages": [
            {"role": "user", "content": [*prefix, {"type": "text", "text": question.text}]},
            {"role": "assistant", "content": question.answer},
        ],
        "images": names,
    }


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--per-kind", default=12, show_default=True, help="Conversations of each kind.")
@click.option("--held-out", is_flag=True, help="Held-out seeds, for deepstitch compare --quality.")
def main(folder: Path, per_kind: int, held_out: bool) -> None:
    """Command line."""
    click.echo(write_calibration(folder, per_kind, split=HELD_OUT if held_out else TRAIN))


if __name__ == "__main__":
    main()
