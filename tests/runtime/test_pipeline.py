"""Whole runs: text and pictures in, answers out; batches and turns equal runs of their own."""

from __future__ import annotations

import numpy as np
import pytest

import deepstitch
from deepstitch.errors import InputError
from deepstitch.runtime.embedding import merge
from deepstitch.runtime.pipeline import Pipeline

from .tiny_bundle import CONTEXT, DEEPSTACK, HIDDEN, reference_logits

PROMPTS = ["what colour is it?", "count the red ones, please, and say where they are", "left", "and now?"]
SHOWN = [[0], [1, 2], [], [3]]


def alone(pipeline: Pipeline, row: int, pictures: list[np.ndarray], **options):
    return pipeline.generate(PROMPTS[row], images=[pictures[i] for i in SHOWN[row]], **options)


def test_tokens_are_those_of_the_numpy_decoder(pipeline, pictures):
    result = pipeline.generate("tell me", images=pictures[:2], max_tokens=10, ignore_eos=True)
    prompt = pipeline.prepare("tell me", images=pictures[:2])
    parts = pipeline.parts
    row = merge(
        parts.table,
        prompt,
        parts.encoder.features([prompt.vision])[0],
        visual_ids=parts.visual_ids,
        deepstack_width=DEEPSTACK * HIDDEN,
    )
    embeds, positions, index = row.embeds[:], row.position_ids, row.deepstack_index
    wanted = []
    for step in range(10):
        wanted.append(int(reference_logits(embeds, positions, row.deepstack, index)[-1].argmax()))
        embeds = np.concatenate([embeds, parts.table(np.array(wanted[-1:]))])
        place = len(prompt.input_ids) + prompt.rope_delta + step
        positions = np.concatenate([positions, np.full((3, 1), place)], axis=1)
        index = np.append(index, 0)
    assert list(result.token_ids) == wanted
    assert result.text == parts.processor.tokenizer.decode(wanted)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 5}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_batch_rows_equal_single_runs(pipeline, pictures, options):
    images = [[pictures[i] for i in shown] for shown in SHOWN]
    together = pipeline.generate_batch(PROMPTS, images=images, max_tokens=24, ignore_eos=True, **options)
    for row, result in enumerate(together):
        single = alone(pipeline, row, pictures, max_tokens=24, ignore_eos=True, **options)
        assert result.token_ids == single.token_ids
        assert (result.text, result.prompt_tokens) == (single.text, single.prompt_tokens)


def test_batch_rows_stop_on_their_own(pipeline, pictures):
    """Each row meets a stop string at another step; those that go on are not disturbed."""
    images = [[pictures[i] for i in shown] for shown in SHOWN]
    full = [alone(pipeline, row, pictures, max_tokens=30, ignore_eos=True) for row in range(4)]
    words = pipeline.parts.processor.tokenizer.decode
    stops = [words([full[0].token_ids[4]]), words([full[2].token_ids[9]])]
    together = pipeline.generate_batch(PROMPTS, images=images, max_tokens=30, ignore_eos=True, stop=stops)
    lengths = set()
    for row, result in enumerate(together):
        single = alone(pipeline, row, pictures, max_tokens=30, ignore_eos=True, stop=stops)
        assert (result.token_ids, result.text) == (single.token_ids, single.text)
        assert result.finish_reason == single.finish_reason
        lengths.add(len(result.token_ids))
    assert len(lengths) > 1
    by_length = sorted(together, key=lambda result: len(result.token_ids))
    seconds = [result.timings["decode"] for result in by_length]
    assert seconds == sorted(seconds) and seconds[0] > 0


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
def test_chunked_prefill_changes_nothing(pipeline, pictures, chunk):
    whole = alone(pipeline, 1, pictures, max_tokens=12)
    assert alone(pipeline, 1, pictures, max_tokens=12, prefill_chunk=chunk).token_ids == whole.token_ids


def test_an_answer_can_be_ended_between_two_chunks_of_its_prompt(pipeline):
    stream = pipeline.stream("hello " * 20, max_tokens=20, prefill_chunk=4)
    turns = stream.turns()
    assert [next(turns) for _ in range(3)] == ["", "", ""]
    result = stream.stop()
    assert (result.token_ids, result.text) == ((), "") and result.timings["prefill"] > 0
    assert list(turns) == []


def test_stream_pieces_join_to_the_text(pipeline, pictures):
    stream = pipeline.stream("hello", images=pictures[:1], max_tokens=20, stop=["zzz"])
    assert "".join(stream) == stream.result.text
    assert stream.result.text == pipeline.generate("hello", images=pictures[:1], max_tokens=20).text


def test_stop_string_cuts_the_text_but_not_the_tokens(pipeline):
    full = pipeline.generate("hello", max_tokens=20, ignore_eos=True)
    stop = full.text[5:9]
    cut = pipeline.generate("hello", max_tokens=20, ignore_eos=True, stop=stop)
    assert cut.text == full.text[: full.text.find(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)]


def test_end_of_sequence_ends_the_answer(pipeline):
    """The tokens go on to one that is declared to end the sequence."""
    tokens = pipeline.generate("hello", max_tokens=10, ignore_eos=True).token_ids
    model = pipeline.manifest.model
    object.__setattr__(model, "eos_token_ids", (tokens[3],))
    result = pipeline.generate("hello", max_tokens=10)
    assert result.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    assert result.finish_reason == "stop"
    assert result.text == pipeline.parts.processor.tokenizer.decode(result.token_ids[:-1])


def test_counts_timings_and_logprobs(pipeline, pictures):
    result = pipeline.generate("hello", images=pictures[1:2], max_tokens=5, ignore_eos=True, logprobs=3)
    assert result.generated_tokens == 5 and result.finish_reason == "length"
    assert result.visual_tokens == 6 < result.prompt_tokens
    assert set(result.timings) == {"load", "preprocess", "encode", "prefill", "decode", "engine"}
    assert all(seconds > 0 for seconds in result.timings.values())
    assert result.generation_tps == pytest.approx(4 / result.timings["decode"])
    assert len(result.logprobs) == 5
    for entry, token in zip(result.logprobs, result.token_ids, strict=True):
        assert entry.token_id == token == entry.top[0][0]
        assert len(entry.top) == 3 and entry.logprob == entry.top[0][2] < 0
    assert result.to_dict()["logprobs"][0]["top"][0]["token_id"] == result.token_ids[0]


def test_the_same_picture_is_encoded_once(pipeline, pictures):
    pipeline.generate("one", images=[pictures[0], pictures[0]], max_tokens=1)
    assert (pipeline.parts.encoder.hits, pipeline.parts.encoder.misses) == (1, 1)
    pipeline.generate("two", images=[pictures[0].copy()], max_tokens=1)
    assert pipeline.parts.encoder.misses == 1


def equal_start(left: np.ndarray, right: np.ndarray) -> int:
    """How many leading ids are equal."""
    size = min(len(left), len(right))
    return int((left[:size] == right[:size]).cumprod().sum())


def test_chat_equals_fresh_runs_and_computes_only_what_is_new(pipeline, pictures):
    chat = pipeline.chat("be brief", max_tokens=9)
    turns = [("look", pictures[:1]), ("and this?", pictures[1:3]), ("so?", [])]
    cached, fed = [], np.zeros(0, np.int64)
    for text, images in turns:
        answer = chat.send(text, images=images)
        fresh = pipeline.generate(chat.messages[:-1], max_tokens=9)
        assert (answer.token_ids, answer.text) == (fresh.token_ids, fresh.text)
        assert answer.prompt_tokens == fresh.prompt_tokens
        ids = pipeline.prepare(chat.messages[:-1]).input_ids
        assert answer.cached_tokens == equal_start(fed, ids)
        cached.append(answer.cached_tokens)
        fed = np.concatenate([ids, answer.token_ids[:-1]])  # the last token was never fed back
    assert cached[0] == 0 < cached[1] < cached[2]
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    again = chat.send("look", images=pictures[:1])
    assert again.cached_tokens > 0  # the system message and the picture are still there
    assert again.token_ids == pipeline.generate(chat.messages[:-1], max_tokens=9).token_ids


def test_chat_notices_another_picture_of_the_same_size(pipeline, pictures):
    chat = pipeline.chat(max_tokens=6)
    chat.send("look", images=pictures[:1])
    chat.clear()
    other = 255 - pictures[0]
    answer = chat.send("look", images=[other])
    assert answer.token_ids == pipeline.generate("look", images=[other], max_tokens=6).token_ids


def test_chat_goes_on_after_an_interrupted_and_an_abandoned_answer(pipeline, pictures):
    chat = pipeline.chat(max_tokens=40, ignore_eos=True)
    stream = chat.stream("look", images=pictures[:1])
    for _ in range(3):
        next(stream)
    stopped = stream.stop()
    assert stopped.finish_reason == "interrupted" and chat.messages[-1]["content"] == stopped.text
    abandoned = chat.stream("never read to its end")
    next(abandoned)
    answer = chat.send("so?")
    assert len(chat.messages) == 4
    fresh = pipeline.generate(chat.messages[:-1], max_tokens=40, ignore_eos=True)
    assert answer.token_ids == fresh.token_ids
    assert answer.cached_tokens > 0


def test_a_prompt_longer_than_the_context(pipeline):
    with pytest.raises(InputError, match=rf"the prompt has \d+ tokens, the model's context is {CONTEXT}"):
        pipeline.generate("red " * 3000)
    with pytest.raises(InputError, match=rf"max_tokens 9999 exceed .*{CONTEXT}"):
        pipeline.generate("red", max_tokens=9999)


def test_batches_that_make_no_sense(pipeline):
    with pytest.raises(InputError, match="a list of at least one prompt"):
        pipeline.generate_batch([])
    with pytest.raises(InputError, match="images holds 1 lists for 2 prompts"):
        pipeline.generate_batch(["a", "b"], images=[[]])


def test_load_is_the_front_door(tiny_bundle):
    assert deepstitch.load(tiny_bundle, threads=1).generate("x", max_tokens=1).generated_tokens == 1
    with pytest.raises(InputError, match=r"engine 'ortt' does not exist .did you mean 'ort'"):
        deepstitch.load(tiny_bundle, engine="ortt")
    with pytest.raises(InputError, match="threads=0"):
        deepstitch.load(tiny_bundle, threads=0)
