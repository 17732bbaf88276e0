"""Bundles of every family pass the whole matrix, against our PyTorch model and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deepstitch.export.compare.cases import CASES
from deepstitch.export.compare.comparison import compare_bundle, make_inputs
from deepstitch.export.compare.metrics import StageResult
from deepstitch.export.compare.report import table_lines
from deepstitch.runtime.bundle import Bundle

from ..tiny import FAMILIES
from .comparing import expected, failures, results

EVERY_CASE = {case.name for case in CASES}
TEXT_CASES = {case.name for case in CASES if not case.needs_vision}
VISION_STAGES = {"vision", "deepstack.0", "deepstack.1", "deepstack.2"}


Export = Callable[..., Any]


def assert_exact(measured: list[StageResult], *, vision: bool) -> None:
    """What issue and README promise for fp32 weights, whatever the tolerances in the code say."""
    assert failures(measured) == {}
    assert {result.case for result in measured} == (EVERY_CASE if vision else TEXT_CASES)
    for result in measured:
        if result.stage in ("logits", "decode"):
            assert result.max_abs <= 1e-4 and result.argmax_agreement == 1.0, result
        else:
            assert result.max_rel <= 1e-4, result
        assert result.cosine > 0.999999 and result.absmax > 0.1, result
    stages = {case: [result.stage for result in measured if result.case == case] for case in EVERY_CASE}
    assert stages["text"] == ["embeddings", "logits"]
    assert len([result for result in measured if result.stage == "decode"]) == 3
    if vision:
        assert all(set(stages[case]) > VISION_STAGES for case in EVERY_CASE - {"text"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_pytorch(export: Export, checkpoints: Export, family: str) -> None:
    made = None
    for target in ("portable", "ort-cpu"):
        exported = export(checkpoints(family), target=target)
        made = made or expected(exported.bundle, exported.checkpoint.folder)
        assert_exact(results(exported.bundle, made), vision="vl" in family)


@pytest.mark.parametrize(
    ("family", "layout", "target"),
    [
        ("qwen3_vl_moe", "hub", "portable"),
        ("qwen3_vl_moe", "transformers", "ort-cpu"),
        ("qwen3_vl", "hub", "ort-cpu"),
        ("qwen3_moe", "hub", "ort-cpu"),
        ("qwen3", "hub", "portable"),
    ],
)
def test_against_transformers(export: Export, checkpoints: Export, family: str, layout: str, target: str) -> None:
    exported = export(checkpoints(family, layout), target=target)
    made = expected(exported.bundle, exported.checkpoint.folder, "transformers")
    assert_exact(results(exported.bundle, made), vision="vl" in family)


def test_fp16_within_its_bound_and_outside_the_exact_one(export: Export, checkpoints: Export) -> None:
    exported = export(checkpoints(), target="ort-cpu", weights="fp16")
    measured = results(
        exported.bundle, expected(export(checkpoints(), target="ort-cpu").bundle, exported.checkpoint.folder)
    )
    assert failures(measured) == {}
    logits = [result for result in measured if result.argmax_agreement is not None]
    assert max(result.max_rel for result in logits) > 1e-4, "these weights are not exact in fp16"
    assert sum(result.rows_over for result in logits) <= 0.02 * sum(result.rows for result in logits)
    assert all(result.argmax_agreement == 1.0 for result in logits)
    assert all(result.max_rel < 1e-3 for result in measured if result not in logits)


def test_bundle_against_bundle_through_polygraphy(export: Export, checkpoints: Export) -> None:
    found = compare_bundle(
        Bundle.open(export(checkpoints(), target="ort-cpu").bundle),
        against="portable",
        reference=export(checkpoints(), target="portable").bundle,
        progress=False,
    )
    assert_exact(list(found.results), vision=True)
    assert found.passed and found.polygraphy == dict.fromkeys([case.name for case in CASES], True)


def test_text_only_model_says_which_cases_do_not_apply(export: Export, checkpoints: Export) -> None:
    exported = export(checkpoints("qwen3"), target="ort-cpu")
    found = compare_bundle(Bundle.open(exported.bundle), checkpoint=exported.checkpoint.folder, progress=False)
    assert found.passed and set(found.skipped) == EVERY_CASE - TEXT_CASES
    assert any(line.startswith("video: does not apply") for line in table_lines(found))


@pytest.fixture
def bundle(export: Export, checkpoints: Export) -> Bundle:
    return Bundle.open(export(checkpoints(), target="ort-cpu").bundle)


def test_inputs_are_the_same_on_every_run(bundle: Bundle) -> None:
    first, second = (make_inputs(bundle, CASES)[0] for _ in range(2))
    model = bundle.manifest.model
    special = {*model.eos_token_ids, model.vision_start_token_id, model.vision_end_token_id}
    visual = [model.image_token_id, model.video_token_id]
    for one, other in zip(first, second, strict=True):
        for row, again in zip(one.rows, other.rows, strict=True):
            np.testing.assert_array_equal(row.prompt, again.prompt)
            assert not {*special, *visual} & set(row.decode_ids.tolist())
            placeholders = int(np.isin(row.prompt, visual).sum())
            assert placeholders == sum(one.vision.tokens_per_item[item] for item in row.all_items)
        if one.vision is not None:
            np.testing.assert_array_equal(one.vision.pixel_values, other.vision.pixel_values)
            assert len(set(one.vision.content_keys)) == len(one.vision.content_keys)


def test_matrix_is_what_its_names_say(bundle: Bundle) -> None:
    made = {each.case.name: each for each in make_inputs(bundle, CASES)[0]}
    grids = {name: each.vision.grid_thw.tolist() for name, each in made.items() if each.vision is not None}
    assert "text" not in grids and len(grids["one-image"]) == 1 and len(grids["three-images"]) == 3
    assert len({tuple(grid) for grid in grids["two-sizes"]}) == 2
    assert grids["video"][0][0] == 3
    assert all(height != width for grid in grids.values() for _, height, width in grid)
    rows = made["batch-2"].rows
    assert len(rows[0].prompt) != len(rows[1].prompt) and rows[0].all_items and rows[1].all_items
    assert [len(row.turns) for row in made["multi-turn"].rows] == [2] and all(made["multi-turn"].rows[0].items)
    assert len(made["decode-32"].rows[0].decode_ids) == 32
    assert made["chunked-prefill"].case.chunk < min(made["chunked-prefill"].vision.tokens_per_item)
