"""The hook pattern: one forward, one hook, and three ways to use it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepstitch.models import load_model, ops, text
from deepstitch.models.build import build_model
from deepstitch.models.vl import Qwen3VLMoeForConditionalGeneration

from .reference import image, make_inputs, packed_vision_inputs, video

DECODERS = ("Qwen2MoeModel", "Qwen3MoeModel", "Qwen3MoeLLMModel", "Qwen3MoeModelWithDeepStack")
HIDDEN, TAPS, LAYERS = 64, 3, 4


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ..tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), family=request.param)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Qwen3VLMoeForConditionalGeneration:
    return load_model(folder)


@pytest.fixture(scope="module")
def language(folder: Path) -> text.Qwen3MoeForCausalLMWithDeepStack:
    return load_model(folder, language_only=True)


@pytest.fixture
def prompt(whole: Qwen3VLMoeForConditionalGeneration) -> dict[str, Tensor]:
    """Decoder inputs of two rows with pictures and a clip, as the encode side makes them."""
    inputs = make_inputs(whole.config, ((image(4, 6), video(2, 4, 4)), (image(8, 2),)))
    positions = torch.arange(inputs.input_ids.shape[1]).repeat(3, 2, 1)
    positions[1:] //= 2  # any three different rows will do
    vision = packed_vision_inputs(whole.config, inputs)
    with torch.no_grad():
        embeds, deepstack = whole.merge(inputs.input_ids, *whole.get_image_feature(vision))
        logits = whole(inputs.input_ids, positions, vision)
    return {
        "ids": inputs.input_ids,
        "embeds": embeds,
        "deepstack": deepstack,
        "positions": positions,
        "logits": logits,
    }


def run(model: Any, prompt: dict[str, Tensor], deepstack: Tensor | ops.CompactDeepStack | None) -> Tensor:
    with torch.no_grad():
        hidden = model.language_model(prompt["embeds"], prompt["positions"], input_deepstack_embeds=deepstack)
        return model.lm_head(hidden)


def test_classes_and_their_order() -> None:
    classes = [getattr(text, name) for name in DECODERS]
    assert [c.__bases__[0] is nn.Module for c in classes] == [True, False, False, False]
    assert issubclass(text.Qwen3MoeModel, text.Qwen2MoeModel)
    for deepstack in classes[2:]:
        assert issubclass(deepstack, text.Qwen3MoeModel)
    assert issubclass(text.Qwen3MoeForCausalLMWithDeepStack, text.Qwen3MoeForCausalLM)


def test_one_forward_and_one_hook() -> None:
    decoders = [c for _, c in inspect.getmembers(text, inspect.isclass) if issubclass(c, text.Qwen2MoeModel)]
    assert {c.__name__ for c in decoders if "forward" in vars(c)} == {"Qwen2MoeModel"}
    overriding = [c for c in decoders if "_process_layer_output" in vars(c) and c is not text.Qwen2MoeModel]
    assert len(overriding) == 1, "both DeepStack classes share one hook"
    (hook_class,) = overriding
    own = {name for name in vars(hook_class) if not name.startswith("__")}
    assert own == {"_process_layer_output"}
    for name in DECODERS[2:]:
        assert issubclass(getattr(text, name), hook_class)
    heads = (text.Qwen3MoeForCausalLM, text.Qwen3MoeForCausalLMWithDeepStack)
    assert ["forward" in vars(c) for c in heads] == [True, False]


def test_image_features_live_where_the_vision_encoder_lives(whole: nn.Module, language: nn.Module) -> None:
    assert hasattr(whole, "visual") and hasattr(whole, "get_image_feature")
    assert not hasattr(language, "visual") and not hasattr(language, "get_image_feature")
    assert isinstance(whole.language_model, text.Qwen3MoeLLMModel)
    assert isinstance(language.model, text.Qwen3MoeModelWithDeepStack)


def test_language_side_is_the_whole_model_bit_for_bit(language: Any, prompt: dict[str, Tensor]) -> None:
    logits = run(language, prompt, prompt["deepstack"])
    assert torch.equal(logits, prompt["logits"])
    without = run(language, prompt, None)
    assert (without - logits).abs().max() > 1e-2 * logits.abs().max(), "DeepStack changes the result"


def test_compact_deepstack_is_the_dense_one_bit_for_bit(language: Any, prompt: dict[str, Tensor]) -> None:
    """Row 0 is zeros, and every other row stands where the index says."""
    flat = prompt["deepstack"].flatten(0, 1)
    visual = flat.abs().sum(-1) > 0
    rows = torch.cat([flat.new_zeros(1, flat.shape[1]), flat[visual]])
    index = torch.zeros(len(flat), dtype=torch.int32)
    index[visual] = torch.arange(1, len(rows), dtype=torch.int32)
    compact = ops.CompactDeepStack(rows, index.view(prompt["ids"].shape))
    assert torch.equal(run(language, prompt, compact), prompt["logits"])


def test_none_is_the_text_only_model_bit_for_bit(language: Any, prompt: dict[str, Tensor]) -> None:
    model_type = "qwen3_moe" if language.config.text.num_experts else "qwen3"
    config = dataclasses.replace(language.config, model_type=model_type, vision=None)
    plain = build_model(config).eval()
    assert type(plain) is text.Qwen3MoeForCausalLM and type(plain.model) is text.Qwen3MoeModel
    plain.load_state_dict(language.state_dict())
    with torch.no_grad():
        expected = plain(prompt["ids"], prompt["positions"])
        assert torch.equal(language(prompt["ids"], prompt["positions"]), expected)
        zeros = torch.zeros_like(prompt["deepstack"])
        assert torch.equal(language(prompt["ids"], prompt["positions"], input_deepstack_embeds=zeros), expected)


def test_text_only_model_refuses_deepstack(tiny_checkpoint: Callable[..., Path]) -> None:
    model = load_model(tiny_checkpoint("qwen3"))
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(TypeError, match="Qwen3MoeModel is text only"):
        model(ids, ids.expand(3, 1, 2), input_deepstack_embeds=torch.zeros(1, 2, TAPS * HIDDEN))


def test_layers_after_the_taps_never_see_deepstack(language: Any, prompt: dict[str, Tensor]) -> None:
    """Each slice reaches its layer alone; what lies behind the third slice reaches none."""
    decoder = language.language_model
    hidden = torch.randn(*prompt["ids"].shape, HIDDEN)
    deepstack = prompt["deepstack"]
    for layer in range(LAYERS):
        processed = decoder._process_layer_output(layer, hidden, deepstack)
        if layer < TAPS:
            assert torch.equal(processed, hidden + deepstack[..., layer * HIDDEN : (layer + 1) * HIDDEN])
        else:
            assert processed is hidden
        assert decoder._process_layer_output(layer, hidden, None) is hidden
    poisoned = torch.cat([deepstack, torch.full_like(deepstack[..., :HIDDEN], torch.nan)], dim=-1)
    assert torch.equal(run(language, prompt, poisoned), prompt["logits"])


def test_hook_runs_after_each_layer_in_order(language: Any, prompt: dict[str, Tensor]) -> None:
    seen: list[int] = []
    decoder = language.language_model
    original = type(decoder)._process_layer_output

    class Spy(type(decoder)):
        def _process_layer_output(self, layer_index: int, *rest: Any) -> Tensor:
            seen.append(layer_index)
            return original(self, layer_index, *rest)

    decoder.__class__ = Spy
    try:
        run(language, prompt, prompt["deepstack"])
    finally:
        decoder.__class__ = Spy.__bases__[0]
    assert seen == list(range(LAYERS))


def test_merge_counts_placeholders(whole: Any, prompt: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="18 placeholders for 17 visual rows"):
        whole.merge(prompt["ids"], torch.zeros(17, HIDDEN), torch.zeros(17, TAPS * HIDDEN))


@pytest.mark.parametrize("split", [1, 7, 20])
def test_cache_in_chunks_is_the_whole_sequence(language: Any, prompt: dict[str, Tensor], split: int) -> None:
    """Prefill in two chunks over a static cache with room to spare."""
    length = prompt["ids"].shape[1]
    config = language.config.text
    shape = (2, config.num_key_value_heads, length + 3, config.head_dim)
    keys, values = ([torch.full(shape, 7.0) for _ in range(LAYERS)] for _ in range(2))  # stale slots stay unread
    hidden = []
    for start, stop in ((0, split), (split, length)):
        lengths = [torch.full((2,), n, dtype=torch.int32) for n in (start, stop - start)]
        cache = text.KVCache(keys, values, *lengths)
        with torch.no_grad():
            hidden.append(
                language.language_model(
                    prompt["embeds"][:, start:stop],
                    prompt["positions"][..., start:stop],
                    input_deepstack_embeds=prompt["deepstack"][:, start:stop],
                    cache=cache,
                )
            )
        keys, values = cache.keys, cache.values
    logits = language.lm_head(torch.cat(hidden, dim=1))
    torch.testing.assert_close(logits, prompt["logits"], rtol=0, atol=1e-5 * float(prompt["logits"].abs().max()))


def test_attention_mask_of_separate_prompts(language: Any, prompt: dict[str, Tensor]) -> None:
    """The mask form: two prompts in one row do not see each other."""
    embeds, positions, half = prompt["embeds"][:1], prompt["positions"][:, :1], 12
    length = embeds.shape[1]
    part = torch.arange(length) >= half
    mask = (part[:, None] == part[None]) & torch.ones(length, length).tril().bool()
    with torch.no_grad():
        packed = language.language_model(embeds, positions, attention_mask=mask[None, None])
        alone = language.language_model(embeds[:, half:], positions[..., half:])
    torch.testing.assert_close(packed[:, half:], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


def test_gradients_reach_every_parameter(whole: Any) -> None:
    """The reference is trainable: the sample model was trained with it."""
    inputs = make_inputs(whole.config, ((image(4, 6),),))
    positions = torch.arange(inputs.input_ids.shape[1]).expand(3, *inputs.input_ids.shape)
    vision = packed_vision_inputs(whole.config, inputs)
    whole(inputs.input_ids, positions, vision).square().sum().backward()
    without = [name for name, p in whole.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    whole.zero_grad()
    assert without == []
