"""Which profile takes a call, and what is said when none does."""

from __future__ import annotations

import pytest

from deepstitch.engine_manifest import EngineProfile
from deepstitch.errors import InputError
from deepstitch.manifest import TensorSpec
from deepstitch.runtime.engine.tensorrt.profiles import Profiles

INPUTS = (
    TensorSpec(name="inputs_embeds", dtype="float32", shape=("B", "S", 8)),
    TensorSpec(name="deepstack_embeds", dtype="float32", shape=("R", 24)),
    TensorSpec(name="logit_index", dtype="int64", shape=("B", "L")),
)


def shapes(batch: int, tokens: int, rows: int = 1, logits: int = 1) -> dict[str, tuple[int, ...]]:
    return {"inputs_embeds": (batch, tokens, 8), "deepstack_embeds": (rows, 24), "logit_index": (batch, logits)}


def profile(name: str, *largest: int, least: int = 1) -> EngineProfile:
    small, large = shapes(1, least), shapes(*largest)
    return EngineProfile(name=name, shapes={each: (small[each], large[each], large[each]) for each in small})


PREFILL, DECODE = profile("prefill", 2, 64, 129, 4), profile("decode", 2, 1)


def test_the_smaller_profile_where_it_suffices() -> None:
    profiles = Profiles("decoder", INPUTS, [PREFILL, DECODE])
    assert profiles.choose(shapes(1, 1)) == profiles.choose(shapes(2, 1)) == 1
    for call in (shapes(1, 2), shapes(1, 1, rows=2), shapes(2, 64, 129, 4), shapes(1, 1, logits=2)):
        assert profiles.choose(call) == 0
    assert (profiles.largest("S"), profiles.largest("L"), len(profiles)) == (64, 4, 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (shapes(3, 1), "decoder: 3 rows are more than the 2 .* larger --batch"),
        (shapes(2, 65), "65 new tokens of a row are more than the 64 .* larger --prefill-chunk"),
        (shapes(1, 3, logits=5), "5 tokens of a row whose logits are wanted are more than the 4 .* larger --logits"),
        (shapes(1, 1, rows=200), "200 rows of DeepStack, with that of zeros, are more than the 129"),
    ],
)
def test_what_to_change(call: dict[str, tuple[int, ...]], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Profiles("decoder", INPUTS, [PREFILL, DECODE]).choose(call)


def test_too_few() -> None:
    with pytest.raises(InputError, match="1 new tokens of a row are fewer than the 4 the engine was built for"):
        Profiles("decoder", INPUTS, [profile("prefill", 2, 64, 129, 4, least=4)]).choose(shapes(1, 1))
