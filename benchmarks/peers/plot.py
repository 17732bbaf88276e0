"""The results as bars: one row of panels per shape, one panel per figure, one bar per runtime and form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["bars", "draw"]

_COLOURS = {
    "deepstitch": "#1f6feb",
    "llama.cpp": "#d1652c",
    "transformers": "#8a8f98",
    "transformers-compiled": "#b9bdc4",
    "openvino": "#6f42c1",
    "onnxruntime-genai": "#2da44e",
}


def bars(report: dict[str, Any], shape: str, figure: str) -> list[tuple[str, float, float, float]]:
    """``(runtime, median, below, above)`` of each case of a shape that ran; the last two are for error bars.

    A case without the figure has zeros, so that bars of one row of panels stand side by side.
    """
    found = []
    for case in report["cases"]:
        if case["shape"] == shape and case["figures"]:
            each = case["figures"].get(figure, {"median": 0.0, "min": 0.0, "max": 0.0})
            middle = each["median"]
            found.append((case["peer"], middle, middle - each["min"], each["max"] - middle))
    return found


def labels(report: dict[str, Any], shape: str) -> list[str]:
    """Names of the bars that :func:`bars` returns."""
    cases = [case for case in report["cases"] if case["shape"] == shape and case["figures"]]
    return [f"{case['peer']} {case['variant']}" for case in cases]


def draw(report: dict[str, Any], output: Path) -> None:
    """Write the plot in the format that the file's name ends in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(case["shape"] for case in report["cases"]))
    figures = list(report["figures"])
    most = max((len(bars(report, shape, name)) for shape in shapes for name in figures), default=1)
    size = (2.6 * len(figures) + 1, (0.28 * most + 1.0) * len(shapes))
    canvas, panels = pyplot.subplots(len(shapes), len(figures), figsize=size, squeeze=False, layout="constrained")
    for row, shape in zip(panels, shapes, strict=True):
        for panel, name in zip(row, figures, strict=True):
            data = bars(report, shape, name)
            colours = [_COLOURS[peer] for peer, *_ in data]
            errors = [[below for *_, below, _ in data], [above for *_, above in data]]
            panel.barh(range(len(data)), [each[1] for each in data], xerr=errors, color=colours)
            panel.set_yticks(range(len(data)), labels(report, shape), fontsize=6)
            panel.invert_yaxis()
            panel.tick_params(labelsize=6)
            if panel is not row[0]:
                panel.set_yticklabels([])
            panel.set_title(f"{shape}: {name}, {report['figures'][name]}", fontsize=7)
            if name == "quality":
                panel.set_xscale("log")
    canvas.savefig(output, dpi=150)
    pyplot.close(canvas)
