"""Speculation: guesses come from earlier text, cost is weighed, and the answer is the one without it."""

from __future__ import annotations

import dataclasses

import pytest

import deepstitch
from deepstitch.errors import InputError
from deepstitch.runtime.pipeline import Pipeline
from deepstitch.runtime.speculative import Drafter, StepCosts


def sample_questions():
    """Messages and pictures of held-out questions of several kinds."""
    from deepstitch.models.sample.generator import HELD_OUT, make_episode

    for kind, index in (("one", 0), ("several", 1), ("text", 0), ("recall", 0), ("recall", 1), ("album", 0)):
        episode = make_episode(HELD_OUT, kind, index)
        start = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in episode.prefix
        ]
        for question in episode.questions[:3]:
            yield [{"role": "user", "content": [*start, {"type": "text", "text": question.text}]}], episode.pixels()


def known_costs(**seconds: float) -> StepCosts:
    """Costs measured beforehand: ``known_costs(one=1.0, nine=1.2)``."""
    costs = StepCosts()
    for width, key in ((1, "one"), (2, "two"), (9, "nine")):
        if key in seconds:
            costs.observe(width, seconds[key])
            costs.observe(width, seconds[key])
    return costs


def drafter(text: str, *, longest: int = 8, ngram: int = 3, costs: StepCosts | None = None) -> Drafter:
    costs = costs or known_costs(one=1.0, nine=1.0)  # a guess costs nothing
    return Drafter([ord(each) for each in text], longest=longest, ngram=ngram, costs=costs)


def guess(text: str, limit: int = 99, **options) -> str:
    return "".join(map(chr, drafter(text, **options).draft(limit)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("abcdefghij..abc", "defghij."),  # the continuation of the earlier place
        ("abcX..abcY..abc", "Y..abcY."),  # of the most recent one, going on into itself
        ("xbcX.abcY..zbc.xbc", "X.abcY.."),  # of the longest match rather than the most recent
        ("qqaqqbXXXXXXXXXX1b", "XXXXXXXX"),  # one token is enough
        ("abcdef", ""),
        ("", ""),
        ("aaa", "aaaaaaaa"),
        ("xyxy", "xyxyxyxy"),
    ],
)
def test_guesses(text, wanted):
    assert guess(text) == wanted


def test_limits():
    assert guess("abcdefghij..abc", limit=2) == "de"
    assert guess("abcdefghij..abc", limit=0) == ""
    assert guess("abcdefghij..abc", longest=3) == "def"
    assert guess("abX..acZ.bY..ab", ngram=1, limit=1) == "Y"
    assert guess("abX..acZ.bY..ab", ngram=2, limit=1) == "X"


def test_a_followed_source_stays():
    """While guesses come true the earlier place is read on, whatever shorter match there is."""
    text = drafter("the red cat sat.  a cat ran.  the red ca", longest=4)
    text.push(ord("t"))
    assert "".join(map(chr, text.draft(9))) == " sat"


def test_guesses_have_to_pay():
    dear = known_costs(one=1.0, two=1.95, nine=9.0)
    assert guess("abcdefghij..abc", costs=dear) == ""
    fair = known_costs(one=1.0, two=1.1, nine=1.8)
    assert guess("abcdefghij..abc", costs=fair)


def test_no_guess_before_a_single_step_was_measured():
    assert guess("abcdefghij..abc", costs=StepCosts()) == ""


def test_wrong_guesses_end_the_guessing_and_right_ones_bring_it_back():
    costs = known_costs(one=1.0, two=1.2, nine=2.6)
    text = drafter("", costs=costs)
    seen = []
    for number in range(200):  # after each "ab" something new
        for token in (1, 2, 1000 + number):
            text.push(token)
        text.push(1)
        text.push(2)
        seen.append(len(text.draft(8)))
        text.push(5000 + number)
    assert seen[1] > 0 and not any(seen[100:])
    for _ in range(30):
        for token in range(3, 9):
            text.push(token)
    assert text.draft(8)


def test_costs_are_learned_and_refreshed():
    costs = StepCosts()
    costs.observe(1, 5.0)  # sets up memory
    assert costs.single_is_due
    costs.observe(1, 1.0)
    assert not costs.single_is_due and costs.estimate(1) == 1.0
    assert 1.0 < costs.estimate(4) < 2.0
    for _ in range(50):
        costs.observe(4, 3.0)
    assert costs.estimate(4) == pytest.approx(3.0)
    assert costs.estimate(7) == pytest.approx(5.0)
    costs.observe(4, 3000.0)
    assert costs.estimate(4) < 5.0
    assert not costs.single_is_due
    for _ in range(20):
        costs.observe(4, 3.0)
    assert costs.single_is_due  # the context has grown


VARIANTS = [
    {},
    {"speculate_ngram": 1},
    {"max_tokens": 1},
    {"max_tokens": 7},
    {"repetition_penalty": 1.2},
    {"temperature": 0.4, "seed": 5},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.1},
    {"logprobs": 2},
    {"prefill_chunk": 5},
]


@pytest.fixture
def eager(pipeline, monkeypatch) -> Pipeline:
    """A pipeline that takes every guess, so that wrong ones are tried too."""
    monkeypatch.setattr(StepCosts, "single_is_due", False)
    monkeypatch.setattr(StepCosts, "estimate", lambda self, width: 1.0)
    return pipeline


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: " ".join(map(str, options)) or "greedy")
@pytest.mark.parametrize("speculate", [1, 6])
def test_answers_are_those_without_guesses(eager, pictures, options, speculate):
    chosen = {"max_tokens": 120, "ignore_eos": True} | options
    for text, shown in (("again and again and again", []), ("count: 1 2 1 2 1", pictures[:2]), ("x", [])):
        plain = eager.generate(text, images=shown, **chosen)
        guessed = eager.generate(text, images=shown, speculate=speculate, **chosen)
        assert guessed.token_ids == plain.token_ids
        assert (guessed.text, guessed.finish_reason) == (plain.text, plain.finish_reason)
        assert guessed.cached_tokens == plain.cached_tokens
        for ours, theirs in zip(guessed.logprobs or (), plain.logprobs or (), strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        if chosen["max_tokens"] > 7:
            assert 0 < guessed.drafted_tokens >= guessed.accepted_tokens
        assert plain.drafted_tokens == 0


def test_stop_strings_and_end_of_sequence_inside_a_guess(eager):
    options = {"max_tokens": 200, "repetition_penalty": 0.5}
    whole = eager.generate("again", ignore_eos=True, **options)
    for stop in {whole.text[place : place + 6] for place in (20, 55, 90)}:
        plain = eager.generate("again", ignore_eos=True, stop=stop, **options)
        guessed = eager.generate("again", ignore_eos=True, stop=stop, speculate=8, **options)
        assert (guessed.token_ids, guessed.text) == (plain.token_ids, plain.text)
        assert guessed.finish_reason == "stop"
    model = eager.manifest.model
    last = whole.token_ids[-1]
    changed = [dataclasses.replace(model, eos_token_ids=(token,)) for token in {last, whole.token_ids[40]}]
    for facts in changed:
        object.__setattr__(model, "eos_token_ids", facts.eos_token_ids)
        plain, guessed = (eager.generate("again", speculate=count, **options) for count in (0, 8))
        assert (guessed.token_ids, guessed.text) == (plain.token_ids, plain.text)
        assert guessed.finish_reason == plain.finish_reason == "stop"


@pytest.mark.parametrize("pieces", [1, 2, 5, 11, 12, 13])
def test_an_interrupted_answer_holds_what_was_handed_out(eager, pieces):
    found = []
    for speculate in (0, 8):
        stream = eager.stream("again", max_tokens=200, ignore_eos=True, repetition_penalty=0.5, speculate=speculate)
        text = "".join(next(stream) for _ in range(pieces))
        result = stream.stop()
        assert result.text.startswith(text)
        found.append((result.token_ids, result.text, result.finish_reason))
    assert found[0] == found[1]


def test_chat_goes_on_from_a_guessed_and_from_an_interrupted_answer(eager, pictures):
    chat = eager.chat(max_tokens=60, ignore_eos=True, repetition_penalty=0.5, speculate=8)
    chat.send("again and again", images=pictures[:1])
    stream = chat.stream("and then?")
    for _ in range(9):
        next(stream)
    stream.stop()
    answer = chat.send("so?")
    fresh = eager.generate(chat.messages[:-1], max_tokens=60, ignore_eos=True, repetition_penalty=0.5)
    assert answer.token_ids == fresh.token_ids
    assert answer.cached_tokens > 0


def test_batches_go_without(eager):
    rows = eager.generate_batch(["again", "once more"], max_tokens=40, ignore_eos=True, speculate=8)
    assert [row.drafted_tokens for row in rows] == [0, 0]
    assert rows[0].token_ids == eager.generate("again", max_tokens=40, ignore_eos=True).token_ids


@pytest.mark.parametrize("options", [{"speculate": -1}, {"speculate": 65}, {"speculate_ngram": 0}, {"speculate": 1.5}])
def test_bad_options(pipeline, options):
    with pytest.raises(InputError, match=next(iter(options))):
        pipeline.generate("x", **options)


@pytest.mark.parametrize(
    "eager", [pytest.param(False, marks=pytest.mark.slow, id="measured costs"), pytest.param(True, id="every guess")]
)
def test_the_sample_model_answers_the_same(sample_bundle, monkeypatch, eager):
    """A trained model over pictures and facts; written on past its end it repeats itself."""
    pipeline = deepstitch.load(sample_bundle("ort-cpu"), threads=1)
    if eager:
        monkeypatch.setattr(StepCosts, "single_is_due", False)
        monkeypatch.setattr(StepCosts, "estimate", lambda self, width: 1.0)
    calls = 0
    observe = StepCosts.observe

    def count(self, width, seconds):
        nonlocal calls
        calls += 1
        observe(self, width, seconds)

    monkeypatch.setattr(StepCosts, "observe", count)
    written = 0
    for messages, images in sample_questions():
        for options in ({"max_tokens": 24}, {"max_tokens": 60, "ignore_eos": True}):
            plain = pipeline.generate(messages, images=images, **options)
            guessed = pipeline.generate(messages, images=images, speculate=5, **options)
            assert (guessed.token_ids, guessed.text) == (plain.token_ids, plain.text)
            written += guessed.generated_tokens - 1
    if eager:
        assert calls < 0.6 * written
