"""The comparison as one HTML page that needs nothing else: a plot per stage, and the table."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepstitch.errors import OutputError
from deepstitch.export.compare.metrics import StageResult
from deepstitch.export.compare.report import Comparison, failure_lines, format_limit, summary_line, verdict

__all__ = ["render_html", "write_html"]

_WIDTH, _HEIGHT = 420, 250
_LEFT, _TOP, _BOTTOM = 52, 14, 84  # margins of the plot area; labels stand below, turned
_FLOOR = 1e-9  # errors of zero are drawn here

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2329; background: #fff }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 } figcaption { font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .8rem .15rem 0; text-align: left }
thead th { border-bottom: 1px solid #9aa4ae } tr.first td { border-top: 1px solid #e3e7eb }
.failed { color: #b3261e; font-weight: 600 }
.grid { stroke: #e3e7eb } .limit { stroke: #b3261e; stroke-dasharray: 5 4 }
text { font: 11px system-ui, sans-serif; fill: #4a545e } .dot { fill: #1a63a8 } .dot.over { fill: #b3261e }
"""


def write_html(comparison: Comparison, path: Path) -> None:
    """Write the page.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.write_text(render_html(comparison), "utf-8")
    except OSError as error:
        raise OutputError(f"--html {path}: cannot be written ({error.strerror})") from None


def render_html(comparison: Comparison) -> str:
    """The page as text."""
    return "\n".join(_page(comparison))


def _page(comparison: Comparison) -> Iterator[str]:
    title = f"{Path(comparison.bundle).name} against {comparison.against}"
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{html.escape(title)}</h1>"
    yield f"<p>Target {html.escape(comparison.target)}, weights {html.escape(comparison.weights)}. "
    style = "" if comparison.passed else ' class="failed"'
    yield f"<span{style}>{html.escape(summary_line(comparison))}</span></p>"
    for line in failure_lines(comparison):
        yield f'<p class="failed">{html.escape(line)}</p>'
    yield "<h2>Largest error per case</h2><p>Logarithmic; the dashed line is the tolerance.</p>"
    yield '<div class="plots">'
    for stage in dict.fromkeys(result.stage for result in comparison.results):
        yield _figure([result for result in comparison.results if result.stage == stage])
    yield "</div><h2>All numbers</h2>"
    yield from _table(comparison)
    for name, reason in comparison.skipped.items():
        yield f"<p>{html.escape(name)}: {html.escape(reason)}</p>"
    yield "</body></html>"


def _figure(results: Sequence[StageResult]) -> str:
    """One stage: a dot per case over a logarithmic axis."""
    limit = results[0].limit
    finite = [max(result.error, _FLOOR) for result in results if math.isfinite(result.error)]
    low = math.floor(math.log10(min([*finite, limit.value or _FLOOR])))
    high = max(math.ceil(math.log10(max([*finite, limit.value or _FLOOR]))) + 1, low + 2)
    plot_height = _HEIGHT - _TOP - _BOTTOM

    def y(error: float) -> float:
        if not math.isfinite(error):
            return _TOP
        return _TOP + plot_height * (high - math.log10(max(error, 10.0**low))) / (high - low)

    parts = []
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    if limit.value:
        at = y(limit.value)
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for number, result in enumerate(results):
        x = _LEFT + (number + 0.5) * (_WIDTH - _LEFT) / len(results)
        over = "" if result.passed else " over"
        tip = html.escape(f"{result.case}: {result.error:.2e}")
        parts.append(
            f'<circle class="dot{over}" cx="{x:.1f}" cy="{y(result.error):.1f}" r="4"><title>{tip}</title></circle>'
        )
        base = _HEIGHT - _BOTTOM + 12
        turn = f'transform="rotate(-40 {x:.1f} {base})"'
        parts.append(f'<text x="{x:.1f}" y="{base}" text-anchor="end" {turn}>{html.escape(result.case)}</text>')
    kind = "error relative to the largest magnitude" if limit.relative else "absolute error"
    caption = f"{html.escape(results[0].stage)}: {kind}"
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img"'
    svg = f'<svg {box} aria-label="{caption}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _table(comparison: Comparison) -> Iterator[str]:
    names = (
        "case",
        "stage",
        "rows",
        "max abs",
        "max rel",
        "cosine",
        "argmax agreement",
        "near ties",
        "limit",
        "verdict",
    )
    yield f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead><tbody>"
    previous = ""
    for result in comparison.results:
        logits = result.argmax_agreement is not None
        cells = (
            result.case if result.case != previous else "",
            result.stage,
            str(result.rows),
            f"{result.max_abs:.2e}",
            f"{result.max_rel:.2e}",
            f"{result.cosine:.7f}",
            f"{result.argmax_agreement:.2%}" if logits else "",
            str(result.near_tie_disagreements) if logits else "",
            format_limit(result.limit),
        )
        judged = f"<td{'' if result.passed else ' class=failed'}>{html.escape(verdict(result))}</td>"
        first = "" if result.case == previous else ' class="first"'
        yield f"<tr{first}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}{judged}</tr>"
        previous = result.case
    yield "</tbody></table>"
