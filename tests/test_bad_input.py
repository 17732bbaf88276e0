"""Bad checkpoints and exports through the command line: one clear line, exit code 2, nothing half-written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepstitch.cli import main

from .damage import CONFIG_DAMAGES, DAMAGES, Damage, damaged, edit_json, edit_tensors, overwrite, put, remove

Make = Callable[..., Path]

# Refused by the export, though the reader of weights has nothing against them.
EXPORT_DAMAGES = {
    "generation config is not json": Damage(
        spoil=overwrite("generation_config.json", b"{"), message=r"generation_config\.json: not valid JSON"
    ),
    "generation config is a list": Damage(
        spoil=overwrite("generation_config.json", b"[]"),
        message=r"generation_config\.json: expected a JSON object",
    ),
    "end token is text": Damage(
        spoil=edit_json("generation_config.json", lambda config: config.update(eos_token_id="<|im_end|>")),
        message=r"eos_token_id is '<\|im_end\|>', expected a token id",
    ),
    "no end token": Damage(
        spoil=remove("generation_config.json"),
        message="no eos_token_id in generation_config.json or config.json",
    ),
}
EVERY_DAMAGE = {**DAMAGES, **CONFIG_DAMAGES, **EXPORT_DAMAGES}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """``refused("export", …)``: runs the command, checks how it refuses, returns the line."""
    before = set(tmp_path.iterdir())

    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("deepstitch: error: ")
        return captured.err

    yield run
    assert set(tmp_path.iterdir()) == before, "a refusal leaves nothing behind"


@pytest.mark.parametrize("name", EVERY_DAMAGE)
def test_damaged_checkpoint(name: str, refused: Callable[..., str], tiny_checkpoint: Make, tmp_path: Path) -> None:
    damage = EVERY_DAMAGE[name]
    folder = damaged(tiny_checkpoint, damage)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    line = refused("export", folder, "-o", tmp_path / "out", "--no-compare", "--quiet")
    assert re.search(damage.message, line), line
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--target", "ort-gpu"),
            r"--target ort-gpu: not a target \(did you mean 'ort-cpu'\?\); targets are",
        ),
        (("--weights", "int3"), "--weights int3: must be one of fp32, fp16"),
        (("--expert-layout", "square"), "--expert-layout square: must be one of hub, transformers"),
        (("--expert-layout", "transformers"), "--expert-layout transformers contradicts the shape of"),
        (("--weights", "fp16", "--by-reference"), "--by-reference keeps the checkpoint's own dtype"),
    ],
)
def test_flags(
    flags: tuple[str, ...], message: str, refused: Callable[..., str], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    line = refused("export", tiny_checkpoint(), "-o", tmp_path / "out", "--no-compare", "--quiet", *flags)
    assert re.search(message, line), line


@pytest.mark.parametrize("options", [{"layout": "transformers"}, {"family": "qwen3_moe"}], ids=str)
def test_by_reference_needs_the_graphs_own_layout(
    options: dict[str, str], refused: Callable[..., str], tiny_checkpoint: Make, tmp_path: Path
) -> None:
    line = refused("export", tiny_checkpoint(**options), "-o", tmp_path / "out", "--by-reference", "--quiet")
    assert re.search(r"--by-reference: '\S+experts\S+' is stored in another layout .*; leave the flag out", line), line


def test_no_checkpoint(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no such folder; deepstitch reads local folders" in refused(
        "export", tmp_path / "nothing", "-o", tmp_path / "out"
    )


def test_existing_output(
    refused: Callable[..., str], tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    output = tmp_path_factory.mktemp("existing")
    (output / "notes.txt").write_text("mine")
    words = ("export", tiny_checkpoint(), "-o", output, "--quiet", "--no-compare")
    assert "exists already; choose another folder or pass --overwrite" in refused(*words)
    assert "is not a bundle, so --overwrite does not replace it" in refused(*words, "--overwrite")
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_fp16_overflow(refused: Callable[..., str], tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Found only while weights are written: what was written by then is gone."""
    folder = tiny_checkpoint("qwen3")
    edit_tensors(put("lm_head.weight", lambda head: head * 1e7))(folder)
    line = refused("export", folder, "-o", tmp_path / "out", "--weights", "fp16", "--no-compare", "--quiet")
    assert re.search(r"tensor 'lm_head\.weight' reaches \S+, more than fp16 .* use --weights fp32", line)
