"""What reports say about where they come from, and about memory."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.common import commit, write_report
from benchmarks.long_prompt import decoder_bytes, per_weights_and_kv


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) is None, "not a working tree"
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) is None, "no commit yet"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "a")
    git(tmp_path, "tag", "-a", "v1", "-m", "a")  # a tag is not what is asked for
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == short
    (tmp_path / "b").write_text("a result, which git does not track")
    assert commit(tmp_path) == short
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{short}+"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None, "no git"


def test_every_report_has_it(tmp_path: Path) -> None:
    write_report("some", {"value": 1}, tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert (report["benchmark"], report["commit"], report["value"]) == ("some", commit(), 1)


def test_weights_that_the_decoder_does_not_load_do_not_count(tmp_path: Path) -> None:
    tensors = {
        "model.language_model.embed_tokens.weight": np.zeros(10, np.float32),
        "model.language_model.layers.0.mlp.experts.down_proj": np.zeros(100, np.uint8),
        "model.visual.blocks.0.attn.qkv.weight": np.zeros(1000, np.float16),
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    assert decoder_bytes(tmp_path) == 40 + 100
    (tmp_path / "checkpoint").mkdir()  # a bundle by reference
    save_file({"lm_head.weight": np.zeros(5, np.float16)}, tmp_path / "checkpoint" / "model.safetensors")
    assert decoder_bytes(tmp_path) == 40 + 100 + 10


def test_memory_over_what_has_to_be_held() -> None:
    assert per_weights_and_kv({"peak_rss": 300, "kv_cache_bytes": 50}, 100) == {"per_weights_and_kv": 2.0}
    assert per_weights_and_kv({"failed": "no memory"}, 100) == {}
