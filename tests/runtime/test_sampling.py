"""Options and the choice of tokens, against distributions computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from deepstitch.errors import DeepstitchError, InputError
from deepstitch.runtime.sampling import GenerationOptions, Sampler, log_probabilities

PROBABILITIES = np.array([0.4, 0.05, 0.3, 0.2, 0.05])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
NO_PROMPT = np.zeros(0, np.int64)


def sampler(size: int = 5, prompt: np.ndarray = NO_PROMPT, **options) -> Sampler:
    return Sampler(GenerationOptions(**options), prompt, size)


def shares(logits: np.ndarray = LOGITS, draws: int = 4000, **options) -> np.ndarray:
    draw = sampler(len(logits), seed=1, **options)
    return np.bincount([draw(logits) for _ in range(draws)], minlength=len(logits)) / draws


def test_greedy_takes_the_first_best():
    assert sampler()(np.array([1, 3, 3, 0, 0], np.float32)) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_temperature(temperature):
    wanted = PROBABILITIES ** (1 / temperature)
    np.testing.assert_allclose(shares(temperature=temperature), wanted / wanted.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 50}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [0]),
        ({"top_p": 0.65}, [0, 2]),
        ({"top_p": 0.71}, [0, 2, 3]),
        ({"min_p": 0.45}, [0, 2, 3]),
        ({"min_p": 0.6}, [0, 2]),
        ({"top_k": 3, "top_p": 0.6}, [0, 2]),  # 0.4 of 0.9 is not enough, 0.7 of 0.9 is
        ({"top_k": 3, "min_p": 0.7}, [0, 2]),
    ],
)
def test_filters_keep_and_renormalise(options, kept):
    wanted = np.zeros(5)
    wanted[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    np.testing.assert_allclose(shares(temperature=1.0, **options), wanted, atol=0.03)


def test_top_p_over_a_flat_large_vocabulary():
    """The nucleus is larger than the short list that is tried first."""
    logits = np.zeros(5000, np.float32)
    logits[4000:] = -30
    draw = sampler(5000, temperature=1.0, top_p=0.999, seed=0)
    chosen = {draw(logits) for _ in range(3000)}
    assert max(chosen) < 4000 and len(chosen) > 1800


def test_repetition_penalty_counts_the_prompt_and_the_answer():
    logits = np.array([2.0, 1.5, -1.0, -1.2, -9.0], np.float32)
    choose = sampler(prompt=np.array([0]), repetition_penalty=2.0)
    assert [choose(logits) for _ in range(3)] == [1, 0, 0]  # 2.0 -> 1.0; then 1.5 -> 0.75
    negative = np.array([-1.0, -1.5, -9, -9, -9], np.float32)
    assert sampler(prompt=np.array([0]), repetition_penalty=2.0)(negative) == 1  # -1.0 -> -2.0
    np.testing.assert_array_equal(logits, np.array([2.0, 1.5, -1.0, -1.2, -9.0], np.float32))


def test_a_seed_repeats_itself():
    runs = [[draw(LOGITS) for _ in range(30)] for draw in (sampler(temperature=1.0, seed=5) for _ in range(2))]
    assert runs[0] == runs[1]
    assert [sampler(temperature=1.0, seed=s)(LOGITS) for s in range(20)] != [runs[0][0]] * 20


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad, temperature):
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(DeepstitchError, match="token 3"):
        sampler(temperature=temperature)(logits)


def test_log_probabilities():
    np.testing.assert_allclose(log_probabilities(LOGITS + 100), np.log(PROBABILITIES), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: use a whole number, 1 or more"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"temperature": -0.1}, "temperature=-0.1: use a number, 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0}, "top_p=0: use a number above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": 1}, "min_p=1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"seed": -3}, "seed=-3"),
        ({"stop": ["a", ""]}, "stop="),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"prefill_chunk": -1}, "prefill_chunk=-1"),
        ({"temprature": 1}, "unknown option 'temprature' .did you mean 'temperature'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        GenerationOptions.from_keywords(options)


def test_numpy_numbers_and_a_bare_stop_string_are_fine():
    options = GenerationOptions.from_keywords({"max_tokens": np.int64(3), "temperature": np.float32(1), "stop": "x"})
    assert options.stop == ("x",)
    assert GenerationOptions.from_keywords({"logprobs": True}).num_top_logprobs == 0
    assert GenerationOptions.from_keywords({"logprobs": 3}).num_top_logprobs == 3
    assert GenerationOptions().num_top_logprobs is None
