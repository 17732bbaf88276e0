"""mRoPE positions against Hugging Face's get_rope_index, and the state that carries them along."""

from __future__ import annotations

import numpy as np
import pytest

from deepstitch.errors import InputError
from deepstitch.runtime.preprocess import MRopeState, mrope_position_ids

IMAGE, VIDEO, START, END = 90, 91, 92, 93
OPTIONS = {"visual_token_ids": (IMAGE, VIDEO), "merge_size": 2}


def image(height, width):
    return [START, *[IMAGE] * (height * width // 4), END], [[1, height, width]]


def clip(steps, height, width):
    """As the processor writes a clip: per time step a timestamp, then the step between start and end."""
    one = [5, 6, 7, START, *[VIDEO] * (height * width // 4), END]
    return [START, *one * steps, END], [[steps, height, width]]


def text(count):
    return list(range(1, count + 1)), []


CASES = {
    "text": [text(9)],
    "one image": [text(4), image(4, 6), text(3)],
    "image first and last": [image(4, 4), text(2), image(6, 2)],
    "two sizes": [text(1), image(8, 4), text(5), image(2, 12), text(2)],
    "three images": [image(2, 2), image(4, 4), image(16, 16), text(1)],
    "video": [text(3), clip(3, 4, 6), text(4)],
    "video and images": [image(4, 8), text(2), clip(2, 6, 4), text(1), image(2, 2), clip(1, 4, 4), text(2)],
}


def row(name):
    ids, grids = [], []
    for part_ids, part_grids in CASES[name]:
        ids += part_ids
        grids += part_grids
    return ids, grids


@pytest.fixture(scope="module")
def reference():
    import torch
    from transformers import Qwen3VLMoeConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

    with torch.device("meta"):
        small = {"num_hidden_layers": 1, "hidden_size": 32, "num_experts": 2, "head_dim": 8, "vocab_size": 99}
        model = Qwen3VLMoeModel(Qwen3VLMoeConfig(text_config=small, vision_config={"depth": 1}))

    def run(ids, grids, mask=None):
        ids = torch.tensor(ids)
        types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        kinds = {IMAGE: [], VIDEO: []}
        remaining = iter(grids)
        flat = ids.flatten().tolist()
        at = 0
        while at < len(flat):  # sort the grids into HF's two lists
            if flat[at] in kinds:
                steps, height, width = grid = next(remaining)
                kinds[flat[at]].append(grid)
                left = steps * height * width // 4
                while left:
                    left -= flat[at] in kinds
                    at += 1
            else:
                at += 1
        tensors = [torch.tensor(kinds[kind]) if kinds[kind] else None for kind in (IMAGE, VIDEO)]
        mask = None if mask is None else torch.tensor(mask)
        positions, deltas = model.get_rope_index(ids, types, tensors[0], tensors[1], attention_mask=mask)
        return positions.numpy(), deltas[:, 0].numpy()

    return run


@pytest.mark.parametrize("name", CASES)
def test_equals_hf(name, reference):
    ids, grids = row(name)
    positions, deltas = mrope_position_ids(ids, grids, **OPTIONS)
    expected = reference([ids], grids)
    np.testing.assert_array_equal(positions, expected[0])
    np.testing.assert_array_equal(deltas, expected[1])


@pytest.mark.parametrize("left", [False, True])
def test_padded_batch_equals_hf(left, reference):
    rows = [row(name) for name in ("text", "three images", "video and images", "one image")]
    width = max(len(ids) for ids, _ in rows)
    ids, mask, grids = [], [], []
    for row_ids, row_grids in rows:
        pad = width - len(row_ids)
        ids.append([0] * pad + row_ids if left else row_ids + [0] * pad)
        mask.append([0] * pad + [1] * len(row_ids) if left else [1] * len(row_ids) + [0] * pad)
        grids += row_grids
    positions, deltas = mrope_position_ids(ids, grids, attention_mask=mask, **OPTIONS)
    expected = reference(ids, grids, mask)
    np.testing.assert_array_equal(positions, expected[0])
    np.testing.assert_array_equal(deltas, expected[1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2, 5, 17])
def test_state_survives_chunks_that_cut_images(name, size):
    ids, grids = row(name)
    whole, deltas = mrope_position_ids(ids, grids, **OPTIONS)
    state = MRopeState(**OPTIONS)
    chunks = [state.extend(ids[start : start + size], None if start else grids) for start in range(0, len(ids), size)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), whole[:, 0])
    assert state.rope_delta == deltas[0] and state.num_tokens == len(ids) and not state.inside_item


def test_state_survives_turns_and_decoding(reference):
    first, second, answer = row("two sizes"), row("video"), [3, 4, 5, 6]
    state = MRopeState(**OPTIONS)
    parts = [state.extend(first[0], first[1])]
    parts += [state.step() for _ in answer]
    parts.append(state.extend(second[0], second[1]))
    expected, deltas = reference([first[0] + answer + second[0]], first[1] + second[1])
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected[:, 0])
    assert state.rope_delta == deltas[0]


def test_tokens_the_model_writes_are_text_and_a_fork_is_independent():
    state = MRopeState(**OPTIONS)
    state.extend(*image(4, 6))
    before = state.next_position
    other = state.fork()
    assert other.step(3).tolist() == [[before, before + 1, before + 2]] * 3
    assert state.next_position == before and other.next_position == before + 3


def test_an_image_advances_by_its_longer_side():
    state = MRopeState(**OPTIONS)
    state.extend([IMAGE] * 15, [[1, 6, 10]])
    assert state.next_position == 5 and state.rope_delta == -10


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, IMAGE], [], "1 visual tokens more"),
        ([IMAGE] * 5, [[1, 4, 4]], "1 visual tokens more"),
        ([IMAGE] * 3, [[1, 4, 4]], "fewer visual tokens"),
        ([1, 2], [[1, 4, 4]], "fewer visual tokens"),
    ],
)
def test_refuses_ids_that_do_not_match_the_grids(ids, grids, message):
    with pytest.raises(InputError, match=message):
        mrope_position_ids(ids, grids, **OPTIONS)
