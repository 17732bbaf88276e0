"""What happened to one request, when and in which process; and a picture of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

__all__ = ["CLIENT", "ENCODE", "LANGUAGE", "Span", "Trace", "draw"]

CLIENT, ENCODE, LANGUAGE = "client", "encode process", "language process"

# Of the picture, in pixels
_WIDTH, _LEFT, _RIGHT = 1100, 145, 20
_TOP, _ROW, _BAR, _LANE_GAP = 46, 24, 18, 14
_LETTER = 7.0  # a little more than the mean width of a letter at the size of the labels, in a wide font
_COLOURS = (
    "#3b6a9e",
    "#b5561b",
    "#3f7d3a",
    "#8a4f7d",
    "#b83a3d",
    "#2f7a76",
    "#7a563f",
    "#6b6460",
)  # white is legible on all


class Span(NamedTuple):
    """Something that took time.

    Attributes:
        process: who did it.
        name: what it was.
        begin: ``time.monotonic`` seconds, which all processes of a machine share.
        end: likewise.
        detail: sizes and the like, for the reader.
    """

    process: str
    name: str
    begin: float
    end: float
    detail: Mapping[str, Any] = {}

    @property
    def milliseconds(self) -> float:
        """How long it took."""
        return (self.end - self.begin) * 1000

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**self._asdict(), "detail": dict(self.detail)}


class Trace:
    """Spans of one request in one process. Several threads may add to it.

    Attributes:
        process: whose spans these are.
        spans: so far, in the order they ended; those of other processes may be added.
    """

    def __init__(self, process: str) -> None:
        self.process = process
        self.spans: list[Span] = []

    @contextmanager
    def span(self, name: str, **detail: Any) -> Iterator[dict[str, Any]]:
        """Time the body, also where it fails; it may add to the detail it is given."""
        begin = time.monotonic()
        try:
            yield detail
        finally:
            self.add(name, begin, time.monotonic(), **detail)

    def add(self, name: str, begin: float, end: float, **detail: Any) -> None:
        """Add a span that was timed elsewhere."""
        self.spans.append(Span(self.process, name, begin, end, detail))


def draw(spans: Iterable[Span]) -> str:
    """One SVG file: a lane per process, time from left to right, what overlaps below each other.

    Hovering over a bar shows its name, times and detail.
    """
    ordered = sorted(spans, key=lambda span: (span.begin, -span.end))
    zero = ordered[0].begin if ordered else 0.0
    total = max((span.end for span in ordered), default=zero) - zero
    scale = _Scale(zero, max(total, 1e-6))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(s.name for s in ordered))}
    body, y = [], float(_TOP)
    for process in _lanes(ordered):
        rows = _pack([span for span in ordered if span.process == process], scale)
        height = len(rows) * _ROW + _LANE_GAP
        body.append(_lane(process, y, height))
        for index, row in enumerate(rows):
            body += [_bar(span, scale, y + _LANE_GAP / 2 + index * _ROW, colours[span.name]) for span in row]
        y += height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 10:g}" width="{_WIDTH}" '
        f'height="{y + 10:g}" font-family="Helvetica, Arial, sans-serif" font-size="12">'
    )
    return "\n".join([head, *_frame(y + 10), *_axis(scale, y), *body, "</svg>", ""])


class _Scale:
    """Seconds to pixels."""

    def __init__(self, zero: float, seconds: float) -> None:
        self.zero, self.seconds = zero, seconds
        self._pixels = (_WIDTH - _LEFT - _RIGHT) / seconds

    def x(self, moment: float) -> float:
        return _LEFT + (moment - self.zero) * self._pixels

    def label(self, span: Span) -> tuple[float, str, str]:
        """Where the name goes: inside the bar, else to its right, else to its left; x, anchor and colour."""
        width = _text_width(span)
        left, right = self.x(span.begin), self.x(span.end)
        if right - left >= width + 8:
            return left + 4, "start", "#ffffff"
        if right + width + 4 <= _WIDTH:
            return right + 4, "start", "#333333"
        return left - 4, "end", "#333333"

    def extent(self, span: Span) -> tuple[float, float]:
        """Pixels that bar and name take up."""
        x, anchor, _ = self.label(span)
        width = _text_width(span)
        left, right = (x, x + width) if anchor == "start" else (x - width, x)
        return min(left, self.x(span.begin)), max(right, self.x(span.end) + 1)


def _text(span: Span) -> str:
    return f"{span.name} {span.milliseconds:.1f}"


def _text_width(span: Span) -> float:
    return len(_text(span)) * _LETTER


def _lanes(spans: Sequence[Span]) -> list[str]:
    """Processes from the client inwards, then any others as they come."""
    found = dict.fromkeys(span.process for span in spans)
    known = [process for process in (CLIENT, LANGUAGE, ENCODE) if process in found]
    return known + [process for process in found if process not in known]


def _pack(spans: Sequence[Span], scale: _Scale) -> list[list[Span]]:
    """Rows in which neither bars nor names overlap."""
    rows: list[list[Span]] = []
    taken: list[list[tuple[float, float]]] = []
    for span in spans:
        left, right = scale.extent(span)
        for row, extents in zip(rows, taken, strict=True):
            if all(right + 4 <= begin or end + 4 <= left for begin, end in extents):
                row.append(span)
                extents.append((left, right))
                break
        else:
            rows.append([span])
            taken.append([(left, right)])
    return rows


def _frame(height: float) -> list[str]:
    return [
        "<title>One request through its processes</title>",
        f'<rect width="{_WIDTH}" height="{height:g}" fill="#ffffff"/>',
    ]


def _lane(process: str, y: float, height: float) -> str:
    return (
        f'<line x1="0" x2="{_WIDTH}" y1="{y:g}" y2="{y:g}" stroke="#cccccc"/>'
        f'<text x="10" y="{y + height / 2 + 4:g}" font-weight="bold" fill="#333333">{escape(process)}</text>'
    )


def _bar(span: Span, scale: _Scale, y: float, colour: str) -> str:
    left, right = scale.x(span.begin), scale.x(span.end)
    x, anchor, ink = scale.label(span)
    since = (span.begin - scale.zero) * 1000
    told = [f"{span.name}: {span.milliseconds:.3f} ms, from {since:.3f} to {since + span.milliseconds:.3f} ms"]
    told += [f"{name}: {value}" for name, value in span.detail.items()]
    return (
        f'<g class="span"><title>{escape(chr(10).join(told))}</title>'
        f'<rect x="{left:.2f}" y="{y:g}" width="{max(right - left, 1):.2f}" height="{_BAR}" rx="2" fill="{colour}"/>'
        f'<text x="{x:.2f}" y="{y + 13:g}" text-anchor="{anchor}" fill="{ink}">{escape(_text(span))}</text></g>'
    )


def _axis(scale: _Scale, bottom: float) -> list[str]:
    """Lines at round milliseconds."""
    total = scale.seconds * 1000
    step = _round_step(total)
    lines = ['<text x="10" y="20" fill="#333333">ms</text>']
    for index in range(int(total / step + 1e-9) + 1):
        at = index * step
        x = scale.x(scale.zero + at / 1000)
        lines.append(
            f'<line x1="{x:.2f}" x2="{x:.2f}" y1="28" y2="{bottom:g}" stroke="#eeeeee"/>'
            f'<text x="{x:.2f}" y="20" text-anchor="middle" fill="#666666">{at:g}</text>'
        )
    return lines


def _round_step(total: float) -> float:
    """The largest of 1, 2, 5, 10, … (or 0.5, 0.2, …) that divides ``total`` into at least five parts."""
    power = 10.0 ** math.floor(math.log10(total / 5))
    return max(power * factor for factor in (1, 2, 5) if power * factor * 5 <= total * (1 + 1e-9))
