"""Spans of one request, and their picture."""

from __future__ import annotations

import time
from itertools import combinations
from xml.etree import ElementTree

import pytest

from deepstitch.runtime.disaggregated.trace import CLIENT, ENCODE, LANGUAGE, Span, Trace, draw

SVG = "{http://www.w3.org/2000/svg}"

REQUEST = [
    Span(CLIENT, "request", 10.0, 10.5),
    Span(LANGUAGE, "wait for <encoder> & friends", 10.01, 10.12, {"address": "unix:/run/e.sock"}),
    Span(ENCODE, "preprocess", 10.02, 10.03),
    Span(ENCODE, "encode", 10.03, 10.1, {"tokens": 2040}),
    Span(LANGUAGE, "read", 10.11, 10.115, {"bytes": 1 << 20}),
    Span(LANGUAGE, "prefill", 10.12, 10.3),
    Span(LANGUAGE, "decode", 10.3, 10.49),
]


def picture(spans) -> ElementTree.Element:
    return ElementTree.fromstring(draw(spans))


def bars(root: ElementTree.Element) -> dict[str, dict[str, float]]:
    """Geometry of each bar by its tooltip's first line."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        name = group.find(f"{SVG}title").text.split(":")[0]
        found[name] = {key: float(rect.get(key)) for key in ("x", "y", "width", "height")}
    return found


def test_a_span_is_timed_also_where_its_body_fails():
    trace = Trace(LANGUAGE)
    before = time.monotonic()
    with pytest.raises(ZeroDivisionError), trace.span("read", blocks=3) as detail:
        detail["bytes"] = 17
        raise ZeroDivisionError
    (span,) = trace.spans
    assert span.process == LANGUAGE and span.name == "read" and span.detail == {"blocks": 3, "bytes": 17}
    assert before <= span.begin <= span.end <= time.monotonic()


def test_a_span_survives_json():
    trace = Trace(ENCODE)
    trace.add("encode", 1.0, 2.5, tokens=4)
    values = trace.spans[0].to_dict()
    assert values == {"process": ENCODE, "name": "encode", "begin": 1.0, "end": 2.5, "detail": {"tokens": 4}}
    assert Span(**values) == trace.spans[0]
    assert Span(**values).milliseconds == 1500


def test_lengths_are_true_to_scale():
    found = bars(picture(REQUEST))
    assert found["prefill"]["width"] / found["encode"]["width"] == pytest.approx(180 / 70, rel=1e-3)
    assert found["prefill"]["x"] == pytest.approx(found["request"]["x"] + 0.24 * found["request"]["width"], abs=0.02)


def test_a_lane_per_process_and_nothing_overlaps():
    root = picture(REQUEST)
    names = [text.text for text in root.iter(f"{SVG}text") if text.get("font-weight") == "bold"]
    assert names == [CLIENT, LANGUAGE, ENCODE]
    found = bars(root)
    lanes = {span.name: names.index(span.process) for span in REQUEST}
    for one, other in combinations(REQUEST, 2):
        a, b = found[one.name], found[other.name]
        if lanes[one.name] != lanes[other.name]:
            assert (a["y"] < b["y"]) == (lanes[one.name] < lanes[other.name])
        elif a["y"] == b["y"]:
            assert a["x"] + a["width"] <= b["x"] + 0.02 or b["x"] + b["width"] <= a["x"] + 0.02


def test_overlapping_spans_get_rows_of_their_own():
    found = bars(picture([Span(ENCODE, "one", 0, 1), Span(ENCODE, "two", 0.5, 1.5)]))
    assert found["one"]["y"] != found["two"]["y"]


def test_everything_lies_inside_the_picture():
    late = [*REQUEST, Span("another process with a long name", "a name much longer than its bar", 10.499, 10.4991)]
    root = picture(late)
    width, height = float(root.get("width")), float(root.get("height"))
    for bar in bars(root).values():
        assert bar["x"] >= 0 and bar["x"] + bar["width"] <= width and bar["y"] + bar["height"] <= height
    for text in root.iter(f"{SVG}text"):
        reach = len(text.text) * 6 * {"end": -1, "start": 1}.get(text.get("text-anchor", "start"), 0)
        assert 0 <= float(text.get("x")) + reach <= width or text.get("font-weight") == "bold"


def test_hovering_tells_the_rest():
    titles = [title.text for title in picture(REQUEST).iter(f"{SVG}title")]
    assert any(title.startswith("encode: 70.000 ms, from 30.000 to 100.000 ms\ntokens: 2040") for title in titles)
    assert any("wait for <encoder> & friends" in title for title in titles)  # escaped, and read back


@pytest.mark.parametrize("milliseconds", [0.0, 0.004, 3.0, 47.0, 1000.0, 250_000.0])
def test_the_axis_has_a_readable_number_of_lines(milliseconds):
    root = picture([Span(CLIENT, "request", 5.0, 5.0 + milliseconds / 1000)])
    marks = [float(text.text) for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "middle"]
    assert marks[0] == 0 and 5 <= len(marks) <= 14
    assert marks[-1] <= max(milliseconds, 0.001) * 1.001


def test_no_spans_is_a_picture_too():
    assert picture([]).tag == f"{SVG}svg"
