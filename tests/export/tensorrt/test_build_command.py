"""``deepstitch build --check`` on lowered models of every family, and on what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import shape_config, write_sparse_checkpoint
from deepstitch.cli import main
from deepstitch.export.tensorrt import Limits, Stored, Subject, check_build
from deepstitch.export.tensorrt.plugin_library import _problems, library_problems
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.plugins.build.contents import Code, Contents
from deepstitch.plugins.library import PluginLibrary

from ..trt8_models import NARROW, WIDE, fitting, options
from .conftest import ADDRESS, model

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]

FLAGS = ["--target", "trt8", "--check", "--image-patches", "64", "--max-context", "128", "--prefill-chunk", "16"]
LIMITS = Limits(images=2, image_patches=64, max_context=128, batch=3, prefill_chunk=16)
WIDTHS = {"qwen3_vl_moe": WIDE, "qwen3_vl": NARROW, "qwen3_moe": WIDE, "qwen3": WIDE}
SOME = {
    ("qwen3_vl_moe", "fp32"),
    ("qwen3_vl_moe", "int4"),
    ("qwen3_vl", "int8"),
    ("qwen3_moe", "fp16"),
    ("qwen3", "int4"),
}
FAMILIES = [
    pytest.param(family, width, weights, marks=() if (family, weights) in SOME else pytest.mark.slow)
    for family, width in WIDTHS.items()
    for weights in ("fp32", "fp16", "int8", "int4")
]


@pytest.mark.parametrize(("family", "head_dim", "weights"), FAMILIES)
def test_every_family_passes(family: str, head_dim: int, weights: str, checkpoints: Checkpoints) -> None:
    checkpoint = fitting(checkpoints, family, head_dim)
    subject = Subject.from_checkpoint(checkpoint.folder, "trt8", Stored(weights=weights))
    found = check_build(subject, LIMITS, 61, None)
    assert [each for graph in found.graphs for each in graph.problems] == []
    assert found.plan is not None and found.plan.fits is None
    assert {each.name for each in found.profiles} >= {"prefill", "decode"}


def test_a_checkpoint_is_planned_like_its_bundle(checkpoints: Checkpoints, export: Export) -> None:
    checkpoint = fitting(checkpoints, "qwen3_vl_moe", WIDE)
    flags = options(checkpoint, "int4")
    bundle = export(checkpoint, target="trt8", **flags).bundle
    stored = Stored(weights="int4", vision_weights=flags.get("vision_weights"))
    one, other = (
        check_build(subject, LIMITS, 61, None)
        for subject in (Subject.from_bundle(bundle, "trt8"), Subject.from_checkpoint(checkpoint.folder, "trt8", stored))
    )
    assert one.plan == other.plan
    assert [each.operators for each in one.graphs] == [each.operators for each in other.graphs]


@pytest.mark.parametrize(
    ("family", "memory", "mib"),
    [
        ("qwen3_vl_moe", None, 256),
        ("qwen3_vl_moe", 2 << 30, 64),
        ("qwen3_vl_moe", 80 << 30, 256),
        ("qwen3", None, None),
    ],
)
def test_pictures_that_are_kept_are_planned(
    family: str, memory: int | None, mib: int | None, checkpoints: Checkpoints
) -> None:
    """As much as a pipeline keeps of them on that card."""
    subject = Subject.from_checkpoint(fitting(checkpoints, family, WIDE).folder, "trt8", Stored(weights="fp32"))
    found = check_build(subject, LIMITS, 61, None if memory is None else (memory, "a card"))
    assert found.plan is not None
    items = {item.name: item.nbytes for item in found.plan.items}
    assert items.get("pictures kept") == (None if mib is None else mib << 20)
    assert found.plan.total_bytes == sum(items.values())


@pytest.fixture
def bundle(checkpoints: Checkpoints, export: Export) -> Path:
    checkpoint = fitting(checkpoints, "qwen3", WIDE)
    return export(checkpoint, target="trt8", **options(checkpoint, "fp32")).bundle


def test_a_bundle_that_fits(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(bundle), *FLAGS, "--memory", "2GB", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] and said["memory"]["fits"] and said["memory"]["source"] == "--memory 2GB"
    assert said["memory"]["total_bytes"] == sum(item["nbytes"] for item in said["memory"]["items"])
    assert said["graphs"]["decoder"]["plugins"]["RMSNormRope"] > 1
    assert main(["build", str(bundle), *FLAGS, "--memory", "2GB"]) == 0
    text = capsys.readouterr().out
    assert "every node is the parser's or a plugin's" in text and "to spare" in text


def test_a_plan_that_does_not_fit_says_what_to_change(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", str(bundle), "--target", "trt8", "--check", "--max-context", "4096", "--memory", "380MB"]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert "too much" in captured.out
    assert captured.err.startswith("deepstitch: error: the plan takes ") and captured.err.count("\n") == 1
    assert "what helps: " in captured.err and "--max-context" in captured.err


def test_a_problem_is_a_failed_check(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    broken = tmp_path / "bundle"
    shutil.copytree(bundle, broken)
    path = broken / "decoder.onnx"
    size = path.stat().st_size
    graph = onnx.load(path, load_external_data=False)
    node = next(node for node in graph.graph.node if node.op_type == "RMSNormRope")
    for attribute in node.attribute:
        attribute.name = "epsilom" if attribute.name == "epsilon" else attribute.name
    path.write_bytes(graph.SerializeToString())
    assert path.stat().st_size == size, "else the manifest notices first"
    assert main(["build", str(broken), *FLAGS]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM RMSNormRope: RMSNormRope has no attribute epsilom (did you mean 'epsilon'?)" in said
    assert "no memory plan" in said


def test_the_plugin_library_is_asked(
    bundle: Path, host_library: PluginLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one for the CPU declares the same operators, but TensorRT has no use for it."""
    assert main(["build", str(bundle), *FLAGS, "--plugins", str(host_library.path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)["library_problems"]
    assert [each.split(";")[0] for each in said] == [
        "it has no TensorRT adapters",
        "it has no code for sm_61, but for the CPU",
    ]


def test_the_library_makes_every_plugin(host_library: PluginLibrary) -> None:
    """The schema leaves the width of a head open; the kernels do not."""
    heads = f'num_heads = 2, kv_num_heads = 1, head_dim = 32, scale = 0.1, mode = "segment", {ADDRESS}'
    made = model(
        f"""decoder (float[P, 64] q, float[P, 32] kv, int32[N] cu) => (float[P, 64] y, float[P, 64] z)
        {{ y = deepstitch.plugins.SparseAttention <{heads}> (q, kv, kv, cu)
           z = deepstitch.plugins.SparseAttention <{heads}> (y, kv, kv, cu) }}"""
    )
    said = library_problems(host_library.path, 61, [made])
    assert sum("SparseAttention: head_dim is 32; it must be 64" in each for each in said) == 1


@pytest.mark.parametrize(
    ("targets", "sm", "runs"),
    [
        (("sm_61",), 61, True),
        (("sm_61",), 70, False),
        (("sm_86", "compute_61"), 75, True),
        (("sm_80",), 86, True),
        (("sm_86",), 80, False),
        (("compute_75",), 61, False),
    ],
)
def test_which_code_runs_where(targets: tuple[str, ...], sm: int, runs: bool) -> None:
    code = (Code(op="rms_norm_rope", targets=targets, images=()),)
    contents = Contents(path=Path("lib.so"), creators=("getPluginCreators",), described=None, not_opened="", code=code)
    assert any("no code for" in each for each in _problems(contents, sm)) is not runs


def test_what_is_refused(
    bundle: Path, checkpoints: Checkpoints, export: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = fitting(checkpoints, "qwen3", WIDE)
    portable = export(checkpoint, target="portable").bundle
    refusals = {
        "was exported for portable": [str(portable), *FLAGS],
        "--target trt7: must be one of trt8": [str(bundle), "--check", "--target", "trt7"],
        "--weights: in a bundle that is decided": [str(bundle), *FLAGS, "--weights", "int4"],
        "--memory 2: write a size": [str(bundle), *FLAGS, "--memory", "2"],
        "--sm 60": [str(bundle), *FLAGS, "--sm", "60"],
        "more than the 4096 tokens the model allows": [
            str(bundle),
            "--check",
            "--target",
            "trt8",
            "--max-context",
            "9999",
        ],
        "--kv-cache int8": [str(checkpoint.folder), *FLAGS, "--kv-cache", "int8"],
        "not a bundle": [str(bundle.parent), *FLAGS],
    }
    for text, words in refusals.items():
        assert main(["build", *words]) == 2, text
        captured = capsys.readouterr()
        assert text in captured.err and captured.err.count("\n") == 1 and captured.out == "", captured.err


def two_billion() -> dict[str, Any]:
    """config.json of the published 2B model."""
    config = shape_config("dense")
    config["text_config"] |= {"num_hidden_layers": 28, "vocab_size": 151936}
    config["vision_config"] |= {"depth": 24, "deepstack_visual_indexes": [5, 11, 17]}
    return config


PUBLISHED = [
    pytest.param(two_billion, "2GB", ["--max-context", "2048", "--image-patches", "1024"], 2, id="2b-on-2GB"),
    pytest.param(
        two_billion,
        "2GB",
        ["--max-context", "2048", "--image-patches", "1024", "--kv-cache", "fp16", "--vision-weights", "int4"],
        0,
        id="2b-on-2GB-in-fewer-bits",
    ),
    pytest.param(lambda: shape_config("30b-a3b"), "24GB", ["--max-context", "8192"], 0, id="30b-a3b-on-24GB"),
    pytest.param(lambda: shape_config("30b-a3b"), "16GB", [], 2, id="30b-a3b-on-16GB"),
    pytest.param(lambda: shape_config("235b-a22b"), "192GB", [], 0, id="235b-a22b"),
]


@pytest.mark.published
@pytest.mark.parametrize(("config", "memory", "words", "code"), PUBLISHED)
def test_published_sizes_without_the_weights(
    config: Callable[[], dict[str, Any]],
    memory: str,
    words: list[str],
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """int4 throughout; what does not fit gets advice."""
    write_sparse_checkpoint(config(), tmp_path / "checkpoint")
    flags = ["--target", "trt8", "--check", "--weights", "int4", "--memory", memory, "--json"]
    assert main(["build", str(tmp_path / "checkpoint"), *flags, *words]) == code
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["passed"] and said["memory"]["fits"] is (code == 0)
    assert bool(said["memory"]["advice"]) is (code == 2)
