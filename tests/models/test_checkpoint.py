"""The checkpoint reader: layouts, dtypes, shards, and the refusal of everything that does not add up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from deepstitch.errors import CheckpointError, DeepstitchError
from deepstitch.models import ModelConfig, build_model, load_model
from deepstitch.models.checkpoint import Checkpoint

from ..damage import CONFIG_DAMAGES, DAMAGES, SINGLE, damaged, edit_tensors, set_config

Make = Callable[..., Path]
SQUARE = {"H == I": 64, "2I == H": 32}  # moe_intermediate_size beside hidden_size 64
EXPERTS = re.compile(r"layers\.(\d+)\.mlp\.experts\.")


def parameters(folder: Path, **options: object) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, **options).named_parameters())


def assert_equal_models(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


@pytest.mark.parametrize("name", {**DAMAGES, **CONFIG_DAMAGES})
def test_damage_is_refused(tiny_checkpoint: Make, name: str) -> None:
    damage = {**DAMAGES, **CONFIG_DAMAGES}[name]
    folder = damaged(tiny_checkpoint, damage)
    with pytest.raises(DeepstitchError, match=damage.message):
        Checkpoint.open(folder).sources()


def test_every_parameter_holds_its_stored_tensor(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("qwen3_vl_moe")
    loaded, stored = parameters(folder), load_file(folder / SINGLE)
    assert loaded.keys() == stored.keys()
    for name, values in stored.items():
        np.testing.assert_array_equal(loaded[name].detach().numpy(), values, err_msg=name)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_moe"])
def test_half_precision_widens_exactly(tiny_checkpoint: Make, family: str, dtype: str) -> None:
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    full, half = parameters(tiny_checkpoint(family)), parameters(tiny_checkpoint(family, dtype=dtype))
    for name, parameter in half.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, full[name].to(kind).float()), name


def test_dtype_in_memory_is_the_callers(tiny_checkpoint: Make) -> None:
    model = load_model(tiny_checkpoint("qwen3"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_moe"])
def test_shards_and_a_single_file_hold_the_same_model(tiny_checkpoint: Make, family: str) -> None:
    assert_equal_models(parameters(tiny_checkpoint(family)), parameters(tiny_checkpoint(family, shards=3)))


def swap_layout(folder: Path) -> None:
    """Rewrite stacked experts from either layout to the other."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        for name in filter(EXPERTS.search, list(tensors)):
            tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))

    edit_tensors(edit)(folder)


def stack_experts(folder: Path) -> None:
    """Rewrite one-tensor-per-expert to the stacked layout of transformers."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        for stem in {name[: match.end()] for name in tensors if (match := EXPERTS.search(name))}:
            gate, up, down = (
                np.stack([tensors.pop(f"{stem}{expert}.{part}_proj.weight") for expert in range(6)])
                for part in ("gate", "up", "down")
            )
            tensors[f"{stem}gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[f"{stem}down_proj"] = down

    edit_tensors(edit)(folder)


@pytest.mark.parametrize("width", [48, *SQUARE.values()], ids=["plain", *SQUARE])
def test_layouts_of_stacked_experts(tiny_checkpoint: Make, width: int) -> None:
    """One square matrix of the two does not mislead, whichever it is: the pair decides."""
    hub = tiny_checkpoint("qwen3_vl_moe", moe_intermediate_size=width)
    expected = parameters(hub)
    transposed = tiny_checkpoint("qwen3_vl_moe", moe_intermediate_size=width)
    swap_layout(transposed)
    assert_equal_models(parameters(transposed), expected)
    for folder, right, wrong in ((hub, "hub", "transformers"), (transposed, "transformers", "hub")):
        assert_equal_models(parameters(folder, expert_layout=right), expected)
        with pytest.raises(CheckpointError, match=rf"--expert-layout {wrong} contradicts the shape of 'model"):
            load_model(folder, expert_layout=wrong)


def test_layouts_of_text_experts(tiny_checkpoint: Make) -> None:
    separate, stacked, swapped = (tiny_checkpoint("qwen3_moe") for _ in range(3))
    stack_experts(stacked)
    stack_experts(swapped)
    swap_layout(swapped)
    assert_equal_models(parameters(stacked), parameters(separate))
    assert_equal_models(parameters(swapped), parameters(separate))


def test_pieces_of_a_source_are_the_rows_of_the_whole(tiny_checkpoint: Make) -> None:
    """The exporter reads experts and rows a few at a time."""
    for family, layout in (("qwen3_vl_moe", "hub"), ("qwen3_vl_moe", "transformers"), ("qwen3_moe", "hub")):
        sources = Checkpoint.open(tiny_checkpoint(family, layout, dtype="BF16")).sources()
        for name, source in sources.items():
            whole = source.read_float32()
            assert whole.shape == source.shape and whole.dtype == np.float32 and source.dtype == "BF16"
            np.testing.assert_array_equal(source.read_float32(1, 3), whole[1:3], err_msg=name)
            if whole.ndim == 2:
                np.testing.assert_array_equal(source.read_columns_float32(1, 4), whole[:, 1:4], err_msg=name)
        in_place = {name for name, source in sources.items() if source.in_place is not None}
        stored = layout == "hub" and family == "qwen3_vl_moe"
        assert any(EXPERTS.search(name) for name in in_place) == stored


class TestTiedHead:
    def test_shares_the_embedding(self, tiny_checkpoint: Make) -> None:
        for family in ("qwen3_vl_moe", "qwen3"):
            model = load_model(tiny_checkpoint(family, tied=True))
            assert model.lm_head.weight is model.embed_tokens.weight
            untied = load_model(tiny_checkpoint(family))
            assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)

    def test_may_be_stored_twice(self, tiny_checkpoint: Make) -> None:
        folder = tiny_checkpoint("qwen3", tied=True)
        expected = parameters(folder)
        edit_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))(folder)
        assert_equal_models(parameters(folder), expected)

    def test_stored_head_of_its_own_is_not_dropped(self, tiny_checkpoint: Make) -> None:
        """config.json says tied, the file says otherwise: one of them is wrong."""
        folder = tiny_checkpoint("qwen3")
        set_config(tie_word_embeddings=True)(folder)
        with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*lm_head\.weight"):
            load_model(folder)

    def test_must_be_stored_when_untied(self, tiny_checkpoint: Make) -> None:
        folder = tiny_checkpoint("qwen3", tied=True)
        set_config(tie_word_embeddings=False)(folder)
        with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
            load_model(folder)


def test_constant_frequencies_are_ignored_by_name(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("qwen3")
    expected = parameters(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(lambda tensors: tensors.update({name: np.ones(16, np.float32)}))(folder)
    assert_equal_models(parameters(folder), expected)


def test_language_side_ignores_vision_tensors_and_nothing_else(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint("qwen3_vl_moe")
    whole, language = parameters(folder), parameters(folder, language_only=True)
    renamed = {name.replace("model.language_model.", "model."): parameter for name, parameter in whole.items()}
    assert_equal_models(
        language,
        {name: parameter for name, parameter in renamed.items() if not name.startswith("model.visual.")},
    )
    edit_tensors(lambda tensors: tensors.update({"model.audio.weight": np.ones(3, np.float32)}))(folder)
    with pytest.raises(CheckpointError, match=r"not part of .*: model\.audio\.weight"):
        load_model(folder, language_only=True)


def test_opening_reads_no_weights(tiny_checkpoint: Make) -> None:
    """NaN is data, not damage: the reader hands on what the file holds."""
    folder = tiny_checkpoint("qwen3")
    edit_tensors(lambda tensors: tensors["model.norm.weight"].fill(np.nan))(folder)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.files == (folder / SINGLE,)
    assert np.isnan(checkpoint.sources()["model.norm.weight"].read_float32()).all()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder; .* download the checkpoint first"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "qwen3_vl", "qwen3_moe", "qwen3"])
def test_build_model_is_random_and_finite(tiny_checkpoint: Make, family: str) -> None:
    config = ModelConfig.from_file(tiny_checkpoint(family))
    for name, parameter in build_model(config).named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.ndim == 1 or parameter.std() > 1e-3, name


def test_published_config_spelling(tiny_checkpoint: Make) -> None:
    """Keys that transformers 4 wrote, beside those it writes now."""
    folder = tiny_checkpoint("qwen3_vl_moe", rope="scaling")
    expected = ModelConfig.from_file(folder)
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    raw |= {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0",
    }
    text = raw["text_config"]
    text |= {"attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
    text |= {
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "num_local_experts": text.pop("num_experts"),
    }
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [6, 5, 5]}
    assert ModelConfig.from_dict(raw) == expected


def test_saved_file_is_untouched(tiny_checkpoint: Make, tmp_path: Path) -> None:
    """Parameters are copies: training a loaded model does not write into the memory-mapped file."""
    folder = tiny_checkpoint("qwen3")
    before = (folder / SINGLE).read_bytes()
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / SINGLE).read_bytes() == before
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "other.safetensors")
