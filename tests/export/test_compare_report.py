"""The verdict on arrays, the limits, the three forms of the report, and the Polygraphy script."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.cli import main
from deepstitch.errors import InputError
from deepstitch.export.compare import memory
from deepstitch.export.compare.cases import CASES, select_cases
from deepstitch.export.compare.html import render_html
from deepstitch.export.compare.metrics import StageResult, compare_stage
from deepstitch.export.compare.report import Comparison, failure_lines, summary_line, table_lines
from deepstitch.export.compare.tolerance import Tolerance

EXACT, HALF = Tolerance.for_kinds("fp32"), Tolerance.for_kinds("fp16")


def logits(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def judge(actual: Any, expected: np.ndarray, tolerance: Tolerance = EXACT, stage: str = "logits") -> StageResult:
    return compare_stage("case", stage, actual, expected, tolerance)


def test_equal_arrays_pass() -> None:
    array = np.random.default_rng(0).standard_normal((200, 30)).astype(np.float32)
    result = judge(array.copy(), array)
    assert result.passed and result.max_abs == result.max_rel == 0 and result.argmax_agreement == 1.0
    assert result.cosine == pytest.approx(1.0) and result.absmax == pytest.approx(np.abs(array).max())


@pytest.mark.parametrize("row", [0, 63, 64, 199])
def test_one_wrong_row_fails_wherever_it_is(row: int) -> None:
    array = np.random.default_rng(0).standard_normal((200, 30)).astype(np.float32)
    other = array.copy()
    other[row, 3] += 2e-4
    result = judge(other, array)
    assert not result.passed and result.rows_over == 1 and result.max_abs == pytest.approx(2e-4, rel=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_fail(value: float) -> None:
    array = np.ones((70, 4), np.float32)
    other = array.copy()
    other[66, 1] = value
    for tolerance in (EXACT, HALF):
        result = judge(other, array, tolerance)
        assert not result.passed and "not finite" in result.note


def test_other_shapes_and_missing_stages_fail() -> None:
    array = np.ones((3, 4), np.float32)
    assert "shape [3, 5] instead of [3, 4]" in judge(np.ones((3, 5), np.float32), array).note
    assert "shape nothing" in judge(None, array).note
    assert not judge(None, array).passed


def test_disagreement_with_a_clear_winner_fails_even_within_a_loose_limit() -> None:
    loose = EXACT.replace(["logits=0.3"])
    clear = judge(logits([1.0, 1.5]), logits([1.4, 1.25]), loose.replace(["logits=0.4"]))
    assert clear.near_tie_disagreements == 1 and clear.passed, "a gap of 0.15 is below the limit of 0.4"
    clear = judge(logits([1.0, 1.5, 0.0]), logits([1.29, 1.25, 5.0])[:, [0, 1, 2]], loose)
    assert clear.disagreements == 1 and not clear.passed


def test_near_ties_are_counted_apart_and_reported() -> None:
    result = judge(logits([1.0, 1.00002], [0.0, 1.0]), logits([1.00002, 1.0], [0.0, 1.0]))
    assert result.passed and result.disagreements == 0 and result.near_tie_disagreements == 1
    assert result.argmax_agreement == 0.5
    lines = "\n".join(table_lines(comparison(result)))
    assert "1/2 (1 near tie)" in lines and "1 others are near ties" in lines


def test_outliers_are_let_pass_for_rounded_weights_only_and_never_silently() -> None:
    expected = np.random.default_rng(0).standard_normal((100, 30)).astype(np.float32)
    actual = expected.copy()
    actual[:4] += np.linspace(0, 0.2, 30, dtype=np.float32) * (expected.argmax(-1)[:4, None] == np.arange(30))
    actual[:4, 0] -= 0.5
    result = judge(actual, expected, HALF)
    assert result.passed and result.rows_over == 4
    assert "ok (4 rows over)" in "\n".join(table_lines(comparison(result)))
    assert "4 positions over" in summary_line(comparison(result))
    actual[:8, 0] -= 0.5
    assert not judge(actual, expected, HALF).passed
    assert not judge(actual, expected, HALF, stage="vision").passed


def test_limits_by_weights_and_by_option() -> None:
    assert Tolerance.for_kinds("checkpoint") == EXACT
    assert (EXACT.limit("logits").value, EXACT.limit("logits").relative, EXACT.agreement, EXACT.outliers) == (
        1e-4,
        False,
        1.0,
        0.0,
    )
    assert EXACT.limit("vision").relative and EXACT.limit("vision").value == 1e-4
    assert Tolerance.for_kinds("fp32", "fp16") == HALF
    assert EXACT.replace(["logits=1e-3", "agreement=0.5"]).limit("decode").value == 1e-3
    assert Tolerance.for_kinds("fp16", "integer arithmetic").limit("logits").value == 5e-2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("logit=1", "did you mean 'logits'"),
        ("logits", "0 or more"),
        ("logits=-1", "0 or more"),
        ("stages=nan", "0 or more"),
        ("agreement=2", "from 0 to 1"),
        ("outliers=1.5", "from 0 to 1"),
    ],
)
def test_refused_limits(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EXACT.replace([setting])


def test_selection_of_cases() -> None:
    assert select_cases([]) == CASES
    assert [case.name for case in select_cases(["video", "text"])] == ["text", "video"]
    with pytest.raises(InputError, match="did you mean 'one-image'"):
        select_cases(["one-imgae"])


def comparison(*results: StageResult, **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "bundle": "some/bundle",
        "target": "ort-cpu",
        "weights": "fp32",
        "against": "pytorch",
        "tolerance": EXACT,
        "results": results,
        "skipped": {"video": "does not apply"},
        "polygraphy": {},
        "seconds": 1.0,
    }
    return Comparison(**values | changes)


@pytest.fixture
def failed() -> Comparison:
    array = np.random.default_rng(0).standard_normal((9, 30)).astype(np.float32)
    parts = [
        compare_stage("text", "logits", array, array, EXACT),
        compare_stage("<one>", "vision", array * 1.01, array, EXACT),
        compare_stage("<one>", "logits", array * np.float32(math.nan), array, EXACT),
    ]
    return comparison(*parts)


def test_report_names_the_first_stage_of_a_failed_case(failed: Comparison) -> None:
    assert not failed.passed
    assert failure_lines(failed) == [
        "case <one>, stage vision: error 1.0e-02, allowed 1e-04 of max, over at 9 of 9 rows"
    ]
    assert summary_line(failed).startswith("1 of 2 cases FAILED against pytorch")
    table = list(table_lines(failed))
    assert len([line for line in table if "FAILED" in line]) == 3 and "video: does not apply" in table


def test_json_has_no_infinity(failed: Comparison) -> None:
    text = json.dumps(failed.to_dict(), allow_nan=False)
    found = json.loads(text)
    assert found["passed"] is False and found["results"][2]["max_abs"] is None
    assert found["results"][1]["limit"] == {"value": 1e-4, "relative": True}


def test_polygraphy_verdict_counts(failed: Comparison) -> None:
    good = comparison(failed.results[0], polygraphy={"text": False})
    assert not good.passed and failure_lines(good) == ["case text: Polygraphy's comparator"]
    assert "Polygraphy" in summary_line(good)


def test_page_is_self_contained_and_draws_every_error(failed: Comparison) -> None:
    page = render_html(failed)
    assert "&lt;one&gt;" in page and "<one>" not in page
    assert not any(outside in page for outside in ("http:", "https:", "src=", "href=", "@import", "url("))
    figures = [part.split("</svg>")[0] for part in page.split("<svg ")[1:]]
    pictures = [ElementTree.fromstring(f"<svg {figure}</svg>") for figure in figures]
    assert len(pictures) == 2
    dots = [[each.get("class") for each in picture.iter("circle")] for picture in pictures]
    assert dots == [["dot", "dot over"], ["dot over"]]
    vision = pictures[1]
    (limit,) = (float(each.get("y1", 0)) for each in vision.iter("line") if each.get("class") == "limit")
    (dot,) = (float(each.get("cy", 0)) for each in vision.iter("circle"))
    assert dot < limit, "an error over the limit stands above the line"


def test_memory_is_asked_for_before_anything_is_loaded(
    checkpoints: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = checkpoints()
    needed = memory.reference_bytes(checkpoint)
    assert needed > 1 << 30
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: needed)
    memory.check_memory(checkpoint.folder)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: needed - 1)
    output = tmp_path / "bundle"
    assert main(["export", str(checkpoint.folder), "-o", str(output)]) == 2
    message = capsys.readouterr().err
    assert "1.0 GiB; 1.0 GiB are free" in message and "--no-compare" in message and message.count("\n") == 1
    assert not output.exists()


def test_free_memory_is_plausible() -> None:
    assert 1 << 20 < memory.free_memory_bytes() < 1 << 50


def test_control_group_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    assert memory.free_memory_bytes() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory_bytes() > 1 << 20


def test_polygraphy_script_repeats_the_comparison(
    export: Callable[..., Any],
    checkpoints: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Alone in another process, without deepstitch; and it fails where the bundle is not the reference."""
    exported = export(checkpoints(), target="ort-cpu")
    script = tmp_path / "again.py"
    cases = ("batch-2", "video", "multi-turn", "chunked-prefill")
    words = ["compare", str(exported.bundle), "--checkpoint", str(exported.checkpoint.folder)]
    words += [word for case in cases for word in ("--case", case)]
    assert main([*words, "--json", "--quiet", "--polygraphy-script", str(script)]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert "import deepstitch" not in script.read_text() and "from deepstitch" not in script.read_text()
    finished = run_script(script)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    lines = finished.stdout.splitlines()
    passed_calls = [line for line in lines if line.startswith("decoder call")]
    assert [line for line in lines if line.startswith("vision_encoder call 1 of case video")]
    passed = [line for line in lines if line.endswith("of case multi-turn: passed")]
    assert len(passed) == 1 + 2 + 4, "one call of the encoder, one per turn, one per decoded token"
    change_a_logit(tmp_path / "again.decoder.reference.json")
    finished = run_script(script)
    failed = [line for line in finished.stdout.splitlines() if line.endswith(": FAILED")]
    assert finished.returncode == 1
    assert failed == [f"decoder call {len(passed_calls) - 1} of case chunked-prefill: FAILED"]


def run_script(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)


def change_a_logit(path: Path) -> None:
    """Of the last call."""
    from polygraphy.comparator import RunResults

    results = RunResults.load(str(path))
    last = results["reference"][-1]
    array = last["logits"].copy()
    array[0, 0, 5] += 1e-3
    last["logits"] = array
    results.save(str(path))
