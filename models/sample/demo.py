"""Writes the example pictures that ship, each with a question and the true answer, from held-out seeds."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from deepstitch.models.sample.generator import HELD_OUT, Episode, Question, make_episode

PICTURES = Path(__file__).parent / "pictures"

# Task shown by each example, and the held-out episode of kind "one" to look for it from.
_EXAMPLES = {"color": 1000, "shape": 1100, "count": 1200, "position": 1300, "relation": 1400, "number": 1500}
_LARGEST_AREA = 128 * 128  # noise does not compress: small pictures keep the files small


def example_episodes() -> list[tuple[Episode, Question]]:
    """Returns the episode and the question behind each example picture."""
    return [_find(task, first) for task, first in _EXAMPLES.items()]


def _find(task: str, first: int) -> tuple[Episode, Question]:
    for index in range(first, first + 100):
        episode = make_episode(HELD_OUT, "one", index)
        (picture,) = episode.pictures
        asked = next((question for question in episode.questions if question.task == task), None)
        if asked is not None and picture.height * picture.width <= _LARGEST_AREA and len(picture.things) > 2:
            return episode, asked
    raise AssertionError(f"no small held-out picture from {first} asks for {task}")


def write_pictures(folder: Path = PICTURES) -> None:
    """Writes one PNG per task and `questions.json`, a list of {image, task, question, answer}."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for episode, question in example_episodes():
        name = f"{question.task}.png"
        Image.fromarray(episode.pixels()[0]).save(folder / name, optimize=True)
        entries.append({"image": name, "task": question.task, "question": question.text, "answer": question.answer})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_pictures()
