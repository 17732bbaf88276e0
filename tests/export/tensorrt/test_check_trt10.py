"""``deepstitch build --check --target trt10``: the graphs of every family against the parser of TensorRT 10.0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.checkpoints import shape_config, write_sparse_checkpoint
from deepstitch.cli import main
from deepstitch.export.tensorrt import Limits, Stored, Subject, check_build
from deepstitch.export.tensorrt.build_check import SMS, default_sm
from deepstitch.export.tensorrt.memory_plan import Planner
from deepstitch.models.checkpoint import Checkpoint

from ..trt8_models import NARROW, WIDE, fitting

Checkpoints = Callable[..., Checkpoint]

LIMITS = Limits(images=2, image_patches=64, max_context=128, batch=3, prefill_chunk=16)
FLAGS = ["--target", "trt10", "--check", "--image-patches", "64", "--max-context", "128", "--prefill-chunk", "16"]
FAST = {("qwen3_vl_moe", "fp16"), ("qwen3", "int4")}
FAMILIES = [
    pytest.param(family, width, weights, marks=() if (family, weights) in FAST else pytest.mark.slow)
    for family, width in {"qwen3_vl_moe": WIDE, "qwen3_vl": NARROW, "qwen3_moe": WIDE, "qwen3": WIDE}.items()
    for weights in ("fp32", "fp16", "int8", "int4")
]


@pytest.mark.parametrize(("family", "head_dim", "weights"), FAMILIES)
def test_every_family_passes(family: str, head_dim: int, weights: str, checkpoints: Checkpoints) -> None:
    checkpoint = fitting(checkpoints, family, head_dim)
    subject = Subject.from_checkpoint(checkpoint.folder, "trt10", Stored(weights=weights))
    found = check_build(subject, LIMITS, 75, None)
    assert [each for graph in found.graphs for each in graph.problems] == []
    assert found.parser == "onnx-tensorrt 10.0-GA" and found.plan is not None


def test_halves_stay_halves(checkpoints: Checkpoints) -> None:
    """fp16 weights are no Cast's: what is read is what is held."""
    checkpoint = fitting(checkpoints, "qwen3_vl")
    weights = {}
    for kind in ("fp32", "fp16"):
        subject = Subject.from_checkpoint(checkpoint.folder, "trt10", Stored(weights=kind))
        found = check_build(subject, LIMITS, 75, None)
        footprints = Planner(subject, {each.name: each.propagation for each in found.graphs}).footprints(LIMITS)
        weights[kind] = footprints["decode"].matrices
    assert weights["fp32"].values == weights["fp16"].values
    assert weights["fp32"].nbytes == 2 * weights["fp16"].nbytes


def test_cards_of_each_target(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert (default_sm("trt8"), default_sm("trt10")) == (61, 75)
    assert 61 not in SMS["trt10"] and 120 in SMS["trt10"]
    folder = str(fitting(checkpoints, "qwen3").folder)
    assert main(["build", folder, *FLAGS, "--sm", "61"]) == 2
    assert "--sm 61: --target trt10 is for 75, 80" in capsys.readouterr().err
    assert main(["build", folder, *FLAGS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sm"] == 75


@pytest.mark.published
@pytest.mark.parametrize(("config", "weights"), [("30b-a3b", "int4"), ("235b-a22b", "fp16")])
def test_published_sizes_without_the_weights(
    config: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sparse_checkpoint(shape_config(config), tmp_path / "checkpoint")
    flags = ["--target", "trt10", "--check", "--weights", weights, "--memory", "640GB", "--json"]
    assert main(["build", str(tmp_path / "checkpoint"), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]
