"""``deepstitch export`` with its comparison, and what ``deepstitch compare`` refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepstitch.cli import main
from deepstitch.errors import UnsupportedError
from deepstitch.export.compare import comparison
from deepstitch.export.passes import scatter_deepstack

Fixture = Callable[..., Any]


@pytest.fixture
def bundle(export: Fixture, checkpoints: Fixture) -> Path:
    return Path(export(checkpoints(), target="ort-cpu").bundle)


@pytest.fixture
def checkpoint(checkpoints: Fixture) -> Path:
    return Path(checkpoints().folder)


def test_export_compares_and_says_so(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bundle"
    assert main(["export", str(checkpoint), "--target", "portable", "-o", str(output), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"] == str(output) and found["target"] == "portable" and found["weights"] == "fp32"
    assert found["bytes"] == sum(p.stat().st_size for p in output.rglob("*") if p.name != "manifest.json")
    assert set(found["graphs"]) == {"decoder", "vision_encoder"}
    assert found["comparison"]["passed"] and len({result["case"] for result in found["comparison"]["results"]}) == 9


def test_export_without_comparison(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bundle"
    assert main(["export", str(checkpoint), "-o", str(output), "--no-compare"]) == 0
    summary = capsys.readouterr().out
    assert f"{output}: qwen3_vl_moe" in summary and "not compared with the model (--no-compare)" in summary


def test_export_with_a_wrong_pass_fails_and_keeps_the_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every layer adds what another should: nothing changes for text, much for pictures."""
    visual_rows = scatter_deepstack._visual_rows

    def in_reverse(*arguments: Any) -> Any:
        places, parts = visual_rows(*arguments)
        return places, parts[::-1]

    monkeypatch.setattr(scatter_deepstack, "_visual_rows", in_reverse)
    output = tmp_path / "bundle"
    assert main(["export", str(checkpoint), "-o", str(output), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert (output / "manifest.json").is_file()
    assert f"{output} was written and stays there" in captured.err and captured.err.count("\n") == 1
    assert "case one-image, stage logits: error" in captured.err and "case text" not in captured.err
    assert "8 of 9 cases FAILED against pytorch" in captured.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "one-imgae"], "no such case (did you mean 'one-image'?)"),
        (["--against", "portable"], "--against portable needs --reference BUNDLE"),
        (["--against", "portable", "--reference", "{missing}"], "not a bundle"),
        (["--checkpoint", "{missing}"], "{missing}"),
        (["--checkpoint", "{other}"], "give the checkpoint that was exported"),
        (["--checkpoint", "{checkpoint}", "--tolerance", "logit=1"], "did you mean 'logits'"),
        (["--checkpoint", "{checkpoint}", "--tolerance", "agreement=2"], "a number from 0 to 1"),
    ],
)
def test_refused_comparisons(
    bundle: Path,
    checkpoint: Path,
    checkpoints: Fixture,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    places = {"missing": tmp_path / "missing", "checkpoint": checkpoint, "other": checkpoints("qwen3").folder}
    assert main(["compare", str(bundle), *(word.format(**places) for word in words)]) == 2
    captured = capsys.readouterr()
    assert message.format(**places) in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_the_checkpoint_is_remembered(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(bundle), "--case", "text", "--quiet"]
    assert main(words) == 0
    monkeypatch.setattr(comparison, "_remembered", lambda bundle: None)  # the folder has gone
    assert main(words) == 2
    assert "--against pytorch needs --checkpoint DIR" in capsys.readouterr().err


@pytest.mark.parametrize("half", [1, 2], ids=["H == I", "H == 2I"])
def test_transformers_is_no_reference_for_square_experts(tiny_checkpoint: Fixture, half: int) -> None:
    """It takes the published layout for its own and computes something else, without a word."""
    square = {"hidden_size": 64, "moe_intermediate_size": 64 // half}
    published, saved = (tiny_checkpoint("qwen3_vl_moe", layout, **square) for layout in ("hub", "transformers"))
    with pytest.raises(UnsupportedError, match="loads transposed"):
        comparison._refuse_what_transformers_misreads(published)
    comparison._refuse_what_transformers_misreads(saved)
    comparison._refuse_what_transformers_misreads(tiny_checkpoint("qwen3_vl_moe"))


def test_page_and_looser_limit_from_the_command_line(
    bundle: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    words = ["compare", str(bundle), "--checkpoint", str(checkpoint), "--case", "text", "--html", str(page)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tolerance"]["logits"] == 1e-4
    assert "<svg" in page.read_text("utf-8")
    assert main([*words, "--tolerance", "logits=1e-12"]) == 1
    assert "allowed 1e-12 abs" in capsys.readouterr().err
    words[-1] = str(tmp_path / "no" / "folder.html")
    assert main(words) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_json_of_bundle_against_bundle_is_json_alone(
    bundle: Path, export: Fixture, checkpoints: Fixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Polygraphy and ONNX Runtime write to stdout when they are let."""
    reference = export(checkpoints(), target="portable").bundle
    words = ["compare", str(bundle), "--against", "portable", "--reference", str(reference), "--case", "text"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["polygraphy"] == {"text": True}
