"""What ``--weights mixed`` chose, as a page: a table of the groups and a plot of damage against bytes."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator
from pathlib import Path

from deepstitch.export.quantize.bit_search import BitSearch

__all__ = ["REPORT_FILES", "write_reports"]

REPORT_FILES = ("quantization.json", "quantization.html")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 320, 70, 40
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:60em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child{text-align:left}"
    "svg{background:#fafafa}.four{color:#b35}"
)


def write_reports(search: BitSearch, folder: Path) -> list[Path]:
    """Write both files into a bundle folder; returns them."""
    paths = [folder / name for name in REPORT_FILES]
    paths[0].write_text(json.dumps(search.to_dict(), indent=1) + "\n", "utf-8")
    paths[1].write_text("\n".join(_page(search)) + "\n", "utf-8")
    return paths


def _page(search: BitSearch) -> Iterator[str]:
    chosen = search.chosen
    counts = {bits: list(chosen.bits.values()).count(bits) for bits in sorted(set(chosen.bits.values()))}
    yield f"<!doctype html><meta charset=utf-8><title>Bits per group</title><style>{_STYLE}</style>"
    yield "<h1>Bits per group</h1>"
    yield (
        f"<p>{chosen.nbytes / 1e6:,.1f} MB of a budget of {search.budget / 1e6:,.1f} MB; "
        + ", ".join(f"{count} groups at {bits} bits" for bits, count in counts.items())
        + f"; damage {chosen.damage:.3g}. Damage of a group: mean of |h' - h|&sup2; / |h|&sup2; behind its layer "
        "with this group alone rounded.</p>"
    )
    yield from _plot(search)
    yield "<table><tr><th>group<th>bits<th>MB<th>damage at 4 bits<th>damage at 8 bits</tr>"
    for group, damages in search.damages.items():
        bits = chosen.bits[group]
        style = " class=four" if bits == 4 else ""
        yield (
            f"<tr{style}><td>{html.escape(group)}<td>{bits}<td>{search.sizes[group][bits] / 1e6:,.2f}"
            f"<td>{damages[4]:.3g}<td>{damages[8]:.3g}</tr>"
        )
    yield "</table>"


def _plot(search: BitSearch) -> Iterator[str]:
    """Damage (logarithmic) against bytes: the frontier, and the choice."""
    points = [(each.nbytes, each.damage) for each in (*search.frontier, search.chosen)]
    low, high = min(size for size, _ in points), max(size for size, _ in points)
    logs = [math.log10(max(damage, 1e-12)) for _, damage in points]
    bottom, top = math.floor(min(logs)), math.ceil(max(logs))

    def place(size: int, damage: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 20) * (size - low) / max(1, high - low)
        share = (math.log10(max(damage, 1e-12)) - bottom) / max(1, top - bottom)
        return x, (_HEIGHT - _BOTTOM) - (_HEIGHT - _BOTTOM - 20) * share

    yield f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="damage against bytes">'
    for power in range(bottom, top + 1):
        _, y = place(low, 10.0**power)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'
    for size in (low, (low + high) // 2, high):
        x, _ = place(size, 10.0**bottom)
        yield f'<text x="{x:.1f}" y="{_HEIGHT - 15}" text-anchor="middle">{size / 1e6:,.1f} MB</text>'
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(each.nbytes, each.damage) for each in search.frontier))
    yield f'<polyline points="{line}" fill="none" stroke="#357" stroke-width="2"/>'
    x, y = place(search.chosen.nbytes, search.chosen.damage)
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#b35"/></svg>'
