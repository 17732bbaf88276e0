"""Questions that need no picture: small facts, copying, and finding a fact again in (long) filler text."""

from __future__ import annotations

import random

from deepstitch.models.sample.words import ADJECTIVES, COLORS, NAMES, NOUNS, OPPOSITES, PLACES, VERBS

Asked = tuple[str, str, str]  # task, question text, answer


FILLERS = (0, 0, 0, 0, 1, 2, 4, 8, 15, 40)


def make(rng: random.Random, kind: str, fillers: int | None = None) -> tuple[str, list[Asked]]:
    """Returns the shared text prefix (may be empty) and the questions about it.

    Args:
        rng: Source of every choice.
        kind: "text", "recall" (tens to hundreds of tokens) or "recall-long" (about two to four thousand).
        fillers: Filler sentences of a "recall" text, instead of a number drawn from `FILLERS`.
    """
    if kind == "text":
        return "", [rng.choice((_successor, _sum, _opposite, _copy))(rng) for _ in range(8)]
    if kind == "recall":
        return _recall(rng, "recall", rng.choice(FILLERS) if fillers is None else fillers)
    return _recall(rng, "recall-long", rng.randint(230, 420))


def _successor(rng: random.Random) -> Asked:
    number = rng.randint(1, 98)
    if rng.random() < 0.5:
        return "text", f"What comes after {number}?", str(number + 1)
    return "text", f"What comes before {number}?", str(number - 1)


def _sum(rng: random.Random) -> Asked:
    first, second = rng.randint(0, 9), rng.randint(0, 9)
    return "text", f"What is {first} + {second}?", str(first + second)


def _opposite(rng: random.Random) -> Asked:
    first, second = rng.sample(rng.choice(OPPOSITES), 2)
    return "text", f"What is the opposite of {first}?", second


def _copy(rng: random.Random) -> Asked:
    words = " ".join(rng.choice(NOUNS) for _ in range(rng.randint(2, 5)))
    return "text", f"Repeat: {words}", words


def filler(rng: random.Random) -> str:
    """Returns one meaningless sentence of the sample world."""
    subject = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    ending = f"the {rng.choice(NOUNS)} {rng.choice(PLACES)} the {rng.choice(NOUNS)}"
    return f"{subject} {rng.choice(VERBS)} {ending}."


def _recall(rng: random.Random, task: str, fillers: int) -> tuple[str, list[Asked]]:
    name, number = rng.choice(NAMES), str(rng.randint(10, 99))
    color, noun = rng.choice(tuple(COLORS)), rng.choice(NOUNS)
    sentences = [filler(rng) for _ in range(fillers)]
    for fact in (f"The number is {number}.", f"The color is {color}.", f"{name} has the {noun}."):
        sentences.insert(rng.randint(0, len(sentences)), fact)
    # Every sentence but the first follows a space; the questions follow one too.
    asked = (
        (" What is the number?", number),
        (" What is the color?", color),
        (f" What does {name} have?", noun),
    )
    return "Facts: " + " ".join(sentences), [(task, text, answer) for text, answer in asked]
