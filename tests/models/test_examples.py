"""The three usage scenarios run on the shipped sample model and give its answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from deepstitch.models import load_model
from deepstitch.models.examples import language_side, text_only, vision_language


@pytest.fixture(scope="module")
def first_question(sample_checkpoint: Path) -> dict[str, str]:
    return json.loads((sample_checkpoint.parent / "pictures" / "questions.json").read_text("utf-8"))[0]


def test_text_only(sample_checkpoint: Path) -> None:
    """The vision-language model gives the same answer to the same prompt."""
    model, tokenizer = (
        load_model(sample_checkpoint),
        Tokenizer.from_file(str(sample_checkpoint / "tokenizer.json")),
    )
    ids = tokenizer.encode(f"<|im_start|>user\n{text_only.QUESTION}<|im_end|>\n<|im_start|>assistant\n").ids
    length = len(ids)
    with torch.no_grad():
        while len(ids) == length or ids[-1] != tokenizer.token_to_id("<|im_end|>"):
            positions = torch.arange(len(ids)).expand(3, 1, -1)
            ids.append(int(model(torch.tensor([ids]), positions)[0, -1].argmax()))
    assert text_only.main() == tokenizer.decode(ids[length:]) == "cold"


def test_vision_language(first_question: dict[str, str]) -> None:
    assert vision_language.main() == (first_question["question"], first_question["answer"])


def test_language_side(first_question: dict[str, str]) -> None:
    assert language_side.main() == (first_question["question"], first_question["answer"])


@pytest.mark.parametrize("example", [language_side, text_only, vision_language])
def test_each_is_short_and_says_how_to_run_it(example: object) -> None:
    source = Path(example.__file__).read_text("utf-8")
    assert source.count("\n") < 80
    assert f"python -m {example.__name__}" in source
