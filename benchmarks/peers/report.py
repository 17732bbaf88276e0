"""The results as Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.figures import FIGURES

__all__ = ["markdown"]


def markdown(report: dict[str, Any]) -> str:
    """Machine, one table of medians per shape, ratios, settings, and what could not be run."""
    shapes = list(dict.fromkeys(case["shape"] for case in report["cases"]))
    parts = [_machine(report)]
    for shape in shapes:
        cases = [case for case in report["cases"] if case["shape"] == shape]
        parts.append(f"### {shape}\n\n" + _medians(report, cases))
        rows = [row for row in report["ratios"] if row["shape"] == shape]
        if rows:
            parts.append(_ratios(report, rows))
        parts.append(_decoding(cases))
        parts.append(_settings(cases))
        parts.append(_failures(cases))
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(report: dict[str, Any]) -> str:
    about = report["machine"]
    vnni = "with" if about["avx512_vnni"] else "without"
    bandwidth = report["memory_bandwidth_bytes_per_second"]
    reads = f", memory read at {bandwidth / 1e9:.1f} GB/s" if bandwidth else ""
    versions = {**{name: version for name, version in about["versions"].items() if version}, **_versions(report)}
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"{about['cpu']}, {report['threads']} threads, {about['memory_gib']} GiB, {vnni} AVX-512 VNNI{reads}; Python "
        f"{about['python']}, {listed}. Medians of {report['rounds']} rounds (smallest–largest); `*`: no round in which "
        f"other processes used less than {report['noise_limit']:.0%} of the cores."
    )


def _versions(report: dict[str, Any]) -> dict[str, str]:
    others = (case for case in report["cases"] if case["version"] and case["peer"] != "deepstitch")
    return {case["peer"].removesuffix("-compiled"): case["version"] for case in others}


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _medians(report: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    names = list(report["figures"])
    header = ["runtime", "weights", *(f"{name}, {report['figures'][name]}" for name in names), "file, MiB"]
    rows = []
    for case in cases:
        size = f"{case['file_bytes'] / 2**20:.0f}" if "file_bytes" in case else "–"
        rows.append([case["peer"], case["variant"], *(_cell(case, name) for name in names), size])
    return _table(header, rows)


def _cell(case: dict[str, Any], name: str) -> str:
    figure = case["figures"].get(name)
    if figure is None:
        return "failed" if case["error"] or name in case["errors"] else "–"
    mark = "*" if figure["noisy"] else ""
    if FIGURES[name].kind == "quality":
        return f"{figure['median']:.1e}, top-1 {figure['top1']:.2f}"
    spread = f" ({_number(figure['min'])}–{_number(figure['max'])})" if figure["rounds"] > 1 else ""
    return f"{_number(figure['median'])}{spread}{mark}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratios(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    names = list(report["figures"])
    lines = []
    for row in rows:
        found = row["figures"]
        cells = [f"{found[name]['ratio']:.2f} ({found[name]['against']})" if name in found else "–" for name in names]
        lines.append([f"{row['variant']} : {row['peer']}", *cells])
    title = "deepstitch against each runtime's best form at those bits; above 1 is in favour of deepstitch:"
    return f"{title}\n\n" + _table(["ratio", *names], lines)


def _decoding(cases: list[dict[str, Any]]) -> str:
    """Bandwidth, time outside the engine, memory."""
    rows = []
    for case in cases:
        cells = []
        for name, figure in case["figures"].items():
            if "bandwidth_share" in figure:
                outside = figure.get("outside_engine_share")
                more = f", outside the engine {outside:.1%}" if outside is not None else ""
                touched = f"{figure['bytes_per_step'] / 2**20:.0f} MiB per step"
                cells.append(f"{name}: {touched}, {figure['bandwidth_share']:.0%} of the bandwidth{more}")
            elif "over_weights_and_cache" in figure:
                less = f"{figure['over_without_interpreter']:.2f} without what the imports take"
                cells.append(f"peak RSS {figure['over_weights_and_cache']:.2f} × (weights + KV), {less}")
        if cells:
            rows.append([case["peer"], case["variant"], "; ".join(cells)])
    return _table(["runtime", "weights", "decoding and memory"], rows) if rows else ""


def _settings(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        chosen: dict[str, list[str]] = {}
        for name, settings in case["settings"].items():
            if settings:
                text = " ".join(f"{key}={value}" for key, value in settings.items())
                chosen.setdefault(text, []).append(name)
        if chosen:
            text = "; ".join(f"{', '.join(names)}: {text}" for text, names in chosen.items())
            rows.append([case["peer"], case["variant"], text])
    return _table(["runtime", "weights", "settings that won the pre-run"], rows) if rows else ""


def _failures(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        if case["error"]:
            rows.append([case["peer"], case["variant"], "all", _escape(case["error"])])
        grouped: dict[str, list[str]] = {}
        for name, error in case["errors"].items():
            grouped.setdefault(error, []).append(name)
        rows += [[case["peer"], case["variant"], ", ".join(names), _escape(error)] for error, names in grouped.items()]
    return _table(["could not be run", "weights", "figures", "error"], rows) if rows else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
