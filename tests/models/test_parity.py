"""Our models equal Hugging Face transformers in fp32 on the same weights, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from deepstitch.models import load_model

from .reference import (
    Item,
    image,
    load_transformers,
    make_inputs,
    relative_errors,
    run_ours,
    run_transformers,
    video,
)

TOLERANCE = 1e-5  # of each tensor's largest magnitude

PROMPTS: dict[str, tuple[tuple[Item, ...], ...]] = {
    "text": ((),),
    "several": ((image(4, 6), video(3, 4, 4), image(8, 2)),),
    "batch": ((image(2, 4), image(6, 6)), (video(2, 4, 6),)),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint to compare on; ``text`` overrides entries of the text config."""

    family: str
    layout: str = "hub"
    dtype: str = "F32"
    tied: bool = False
    shards: int = 1
    rope: str = "parameters"
    text: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [
            self.family,
            self.layout,
            self.dtype,
            "tied" if self.tied else "untied",
            f"{self.shards}-shard",
        ]
        return "-".join([*parts, self.rope, *(f"{key}={value}" for key, value in self.text.items())])


CASES = (
    Case(family="qwen3_vl_moe"),
    Case(family="qwen3_vl_moe", layout="transformers", dtype="BF16", tied=True, shards=3, rope="scaling"),
    Case(family="qwen3_vl_moe", dtype="F16", shards=2, text={"mlp_only_layers": [1]}),
    Case(family="qwen3_vl_moe", layout="transformers", dtype="F16", text={"decoder_sparse_step": 2}),
    Case(family="qwen3_vl", tied=True),
    Case(family="qwen3_vl", dtype="BF16", shards=2, rope="scaling"),
    Case(family="qwen3_moe", shards=2),
    Case(family="qwen3_moe", dtype="BF16", tied=True, rope="scaling", text={"norm_topk_prob": False}),
    Case(family="qwen3_moe", layout="transformers", text={"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    Case(family="qwen3_moe", layout="transformers", dtype="F16", text={"norm_topk_prob": False}),
    Case(family="qwen3", tied=True),
    Case(family="qwen3", dtype="BF16", shards=2, rope="scaling", text={"rope_theta": 1e6}),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_equals_transformers(case: Case, tiny_checkpoint: Callable[..., Path]) -> None:
    options = {"dtype": case.dtype, "tied": case.tied, "shards": case.shards, "rope": case.rope}
    folder = tiny_checkpoint(case.family, case.layout, **options, **case.text)
    ours, theirs = load_model(folder), load_transformers(folder, case.family)
    for name, rows in PROMPTS.items() if "vl" in case.family else [("text", PROMPTS["text"])]:
        inputs = make_inputs(ours.config, rows)
        expected = run_transformers(theirs, inputs)
        errors = relative_errors(run_ours(ours, inputs, expected.position_ids), expected)
        assert len(errors) == 1 + 4 + (4 if rows != ((),) else 0), "logits, every layer, vision, every tap"
        assert {stage: error for stage, error in errors.items() if not error <= TOLERANCE} == {}, name


def test_experts_saved_by_transformers_load(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """What ``save_pretrained`` of the installed transformers writes, whatever layout that is."""
    for family in ("qwen3_vl_moe", "qwen3_moe"):
        folder = tiny_checkpoint(family)
        load_transformers(folder, family).save_pretrained(tmp_path / family)
        again, original = load_model(tmp_path / family), load_model(folder)
        for name, parameter in original.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3"])
def test_both_rope_spellings_are_one_model(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    configs = [load_model(tiny_checkpoint(family, rope=rope)).config for rope in ("parameters", "scaling")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["taps", "experts", "mrope"])
def test_the_comparison_sees_a_wrong_model(kind: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Damage one thing at a time: the parity above would have failed."""
    folder = tiny_checkpoint("qwen3_vl_moe")
    ours, theirs = load_model(folder), load_transformers(folder, "qwen3_vl_moe")
    inputs = make_inputs(ours.config, PROMPTS["several"])
    expected = run_transformers(theirs, inputs)
    positions = expected.position_ids
    if kind == "taps":
        ours.visual.config = _reordered_taps(ours.visual.config)
    elif kind == "experts":
        mlp = ours.language_model.layers[2].mlp
        mlp.experts.gate_up_proj.data = mlp.experts.gate_up_proj.data.roll(48, dims=-1)  # up before gate
    else:
        positions = positions[[0, 2, 1]]  # height and width swapped
    errors = relative_errors(run_ours(ours, inputs, positions), expected)
    first_wrong = {"taps": "deepstack 1", "experts": "layer 2", "mrope": "layer 0"}[kind]
    assert errors[first_wrong] > 100 * TOLERANCE and errors["logits"] > 100 * TOLERANCE


def _reordered_taps(config: Any) -> Any:
    import dataclasses

    return dataclasses.replace(config, deepstack_visual_indexes=(0, 1, 3))


def test_config_of_the_tiny_checkpoint_is_what_transformers_reads(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    """Guards the guard: no key of the tiny configs is ignored by the reference."""
    from transformers import AutoConfig

    folder = tiny_checkpoint("qwen3_vl_moe", decoder_sparse_step=2)
    config = AutoConfig.from_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    assert config.text_config.decoder_sparse_step == 2
    assert config.text_config.rope_parameters["mrope_section"] == raw["text_config"]["rope_parameters"]["mrope_section"]
    assert config.vision_config.deepstack_visual_indexes == raw["vision_config"]["deepstack_visual_indexes"]
