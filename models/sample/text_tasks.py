"""Questions that need no picture: small facts, copying, and finding a fact again in (long) filler text."""

from __future__ import annotations

import random

from deepstitch.models.sample.words import ADJECTIVES, COLORS, NAMES, NOUNS, OPPOSITES, PLACES, VERBS

Asked = tuple[str, str, str]  # task, question text, answer


FILLERS = (0, 0, 0, 2, 6, 15, 40)


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
        fillers = rng.choice(FILLERS) if fillers is None else fillers
        facts = rng.randint(2, 4) if fillers == 0 and rng.random() < 0.7 else rng.randint(2, 12)
        return _recall(rng, "recall", facts=facts, fillers=fillers)
    return _recall(rng, "recall-long", facts=rng.randint(8, 16), fillers=rng.randint(230, 420))


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


def _recall(rng: random.Random, task: str, *, facts: int, fillers: int) -> tuple[str, list[Asked]]:
    names = rng.sample(NAMES, facts)
    values = [_value(rng) for _ in names]
    sentences = [filler(rng) for _ in range(fillers)]
    for name, value in zip(names, values, strict=True):
        sentences.insert(rng.randint(0, len(sentences)), f"{name} has {value}.")
    asked = rng.sample(range(facts), min(8, facts))
    # Every sentence but the first follows a space; the questions follow one too.
    questions = [(task, f" What does {names[i]} have?", values[i]) for i in asked]
    return "Facts: " + " ".join(sentences), questions


def _value(rng: random.Random) -> str:
    choice = rng.random()
    if choice < 0.5:
        return str(rng.randint(10, 99))
    return rng.choice(tuple(COLORS)) if choice < 0.75 else rng.choice(NOUNS)
