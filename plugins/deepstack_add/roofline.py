"""What DeepStackAdd could reach: rows for the table of its README."""

from __future__ import annotations

from collections.abc import Iterator

from deepstitch.plugins.common.roofline import Row, Work, table

__all__ = ["add_work", "roofline"]

HIDDEN = 2048
BYTES = {"float32": 4, "float16": 2}
# (tokens, visual ones): decode, a prompt of text, prompts that are half and all picture
PROMPTS = ((1, 0), (512, 0), (512, 256), (512, 512), (2048, 1024))


def add_work(tokens: int, visual: int, embeds: str) -> Work:
    """Hidden states read and written, one index a token, one row of the table per visual token."""
    moved = tokens * (8 * HIDDEN + 4) + visual * HIDDEN * BYTES[embeds]
    return Work(nbytes=float(moved), float_ops=float(visual * HIDDEN))


def _rows() -> Iterator[Row]:
    for embeds in BYTES:
        for tokens, visual in PROMPTS:
            if visual or embeds == "float32":
                yield Row(cells=(embeds, str(tokens), str(visual)), work=add_work(tokens, visual, embeds))


def roofline() -> str:
    """The table in Markdown."""
    return table(("embeds", "tokens", "visual"), _rows())
