"""Makes questions with known answers about synthetic pictures, and a few about text alone.

An `Episode` is one shared prefix (pictures and text) with several questions about it; every question is an
ordinary chat turn: prefix plus question text is the user's message, the answer is the assistant's. Episodes
follow from `(split, kind, index)` alone, and the two splits draw from disjoint seeds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from deepstitch.models.sample import text_tasks
from deepstitch.models.sample.drawing import COLOR_NAMES, Picture, Sign, Thing, compose, render
from deepstitch.models.sample.words import SHAPES, plural

HELD_OUT = "held-out"
TRAIN = "train"
KINDS = ("one", "several", "album", "album-long", "text", "recall", "recall-long")
SIDES = tuple(range(96, 257, 32))

_SEED_SPAN = 1 << 40


@dataclass(slots=True, kw_only=True, frozen=True)
class Question:
    """One question; `text` follows the prefix directly, `task` names the table row it counts for.

    `mentions` says, for training, which words of the text name a shape of the picture, and where it is:
    (number of the word, y, x), coordinates from -1 to 1.
    """

    task: str
    text: str
    answer: str
    mentions: tuple[tuple[int, float, float], ...] = ()


@dataclass(slots=True, kw_only=True, frozen=True)
class Episode:
    """A prefix and its questions.

    Attributes:
        prefix: Strings and `Picture`s in prompt order.
        questions: What is asked about it, each on its own.
        seed: What the episode was made from; also seeds the noise of the pictures.
    """

    prefix: tuple[str | Picture, ...]
    questions: tuple[Question, ...]
    seed: int

    @property
    def pictures(self) -> list[Picture]:
        """The pictures, in prompt order."""
        return [part for part in self.prefix if isinstance(part, Picture)]

    def pixels(self) -> list[Any]:
        """Draws the pictures: a list of uint8 arrays (height, width, 3)."""
        return [render(picture, self.seed * 64 + index) for index, picture in enumerate(self.pictures)]


def episode_seed(split: str, kind: str, index: int) -> int:
    """Returns the seed of an episode; training seeds and held-out seeds never meet."""
    if not 0 <= index < _SEED_SPAN:
        raise ValueError(f"episode index must be in [0, 2**40), got {index}")
    base = {HELD_OUT: 0, TRAIN: len(KINDS)}[split] + KINDS.index(kind)
    return base * _SEED_SPAN + index


def make_episode(
    split: str,
    kind: str,
    index: int,
    *,
    sizes: list[tuple[int, int]] | None = None,
    fillers: int | None = None,
) -> Episode:
    """Makes one episode.

    Args:
        split: `TRAIN` or `HELD_OUT`.
        kind: One of `KINDS`.
        index: Which episode of that kind.
        sizes: Picture sizes (height, width) to use instead of drawn ones, so that a batch can share them.
        fillers: Filler sentences of a "recall" text, likewise.

    Returns:
        The episode; it depends on nothing but the arguments.
    """
    seed = episode_seed(split, kind, index)
    rng = random.Random(seed)
    if kind in ("text", "recall", "recall-long"):
        lead, questions = text_tasks.make(rng, kind, fillers)
        return Episode(
            prefix=(lead,) if lead else (),
            questions=tuple(Question(task=task, text=text, answer=answer) for task, text, answer in questions),
            seed=seed,
        )
    if sizes is None:
        sizes = draw_sizes(rng, kind)
    if kind == "one":
        return _one(rng, split, seed, sizes)
    if kind == "several":
        return _several(rng, seed, sizes)
    return _album(rng, seed, sizes, "album-long" if kind == "album-long" else "album")


def draw_sizes(rng: random.Random, kind: str) -> list[tuple[int, int]]:
    """Draws picture sizes for an episode; large pictures are rarer, because they cost more."""
    if kind == "one":
        return [_size(rng, 256)]
    if kind == "several":
        return [_size(rng, 160) for _ in range(rng.randint(2, 4))]
    if kind == "album":
        return [_size(rng, 128) for _ in range(rng.randint(5, 12))]
    return [(rng.choice((160, 192, 224)), rng.choice((160, 192, 224, 256))) for _ in range(rng.randint(36, 48))]


def _size(rng: random.Random, largest: int) -> tuple[int, int]:
    sides = [side for side in SIDES if side <= largest]
    while True:
        height, width = rng.choice(sides), rng.choice(sides)
        if rng.random() < (9 * 1024) / (height * width):
            return height, width


# What is asked about a single picture: in training six of these, so that hard kinds come more often; of
# held-out pictures each kind once.
_ASKED_IN_TRAINING = ("color", "shape", "number", "letters", *("count", "position", "relation") * 3)


def _one(rng: random.Random, split: str, seed: int, sizes: list[tuple[int, int]]) -> Episode:
    picture = compose(rng, *sizes[0])
    kinds = list(_ASKED_IN_TRAINING if split == TRAIN else _QUESTIONS)
    rng.shuffle(kinds)
    questions: list[Question] = []
    for kind in kinds:
        question = _ask(rng, picture, kind, "")
        if question is not None and all(question.text != other.text for other in questions):
            questions.append(question)
        if split == TRAIN and len(questions) == 6:
            break
    return Episode(prefix=(picture,), questions=tuple(questions), seed=seed)


def _several(rng: random.Random, seed: int, sizes: list[tuple[int, int]]) -> Episode:
    pictures = [compose(rng, *size) for size in sizes]
    questions = [Question(task="pictures", text="How many pictures are there?", answer=str(len(pictures)))]
    if rng.random() < 0.7:
        questions = []
    kinds = ["color", "shape", "number", "letters"] * 2
    rng.shuffle(kinds)
    for kind in kinds[: 2 + len(pictures)]:
        index = rng.randrange(len(pictures))
        question = _ask(rng, pictures[index], kind, f" in picture {index + 1}")
        if question is not None:
            questions.append(replace(question, task=f"several: {kind}"))
    questions += [which for _ in range(2) if (which := _which(rng, pictures)) is not None]
    prefix: list[str | Picture] = []
    numbered = rng.random() < 0.3  # what the chat template writes with add_vision_id
    for index, picture in enumerate(pictures):
        prefix += [f"Picture {index + 1}: ", picture] if numbered else [picture]
    unique = {question.text: question for question in questions}
    return Episode(prefix=tuple(prefix), questions=tuple(unique.values()), seed=seed)


def _album(rng: random.Random, seed: int, sizes: list[tuple[int, int]], task: str) -> Episode:
    """Many pictures; what is asked for occurs in exactly one of them."""
    shape, color = rng.choice(SHAPES), rng.choice(COLOR_NAMES)
    shapes = [other for other in SHAPES if other != shape]
    colors = [other for other in COLOR_NAMES if other != color]
    pictures = [compose(rng, *size, simple=True) for size in sizes]
    with_shape, with_color, with_number, with_letters = (rng.randrange(len(sizes)) for _ in range(4))
    for index, picture in enumerate(pictures):
        for thing in picture.things:
            thing.shape, thing.color = rng.choice(shapes), rng.choice(colors)
        kept = {"number": with_number, "letters": with_letters}
        picture.signs = [sign for sign in picture.signs if kept[sign.kind] == index]
    odd, plain = pictures[with_shape].things[0], pictures[with_color].things[-1]
    odd.shape, plain.color = shape, color
    questions = [
        Question(task=task, text=f"What color is the {shape}?", answer=odd.color),
        Question(task=task, text=f"What shape is {color}?", answer=plain.shape),
    ]
    for index, kind in ((with_number, "number"), (with_letters, "letters")):
        question = _ask(rng, pictures[index], kind, "")
        if question is not None:
            questions.append(Question(task=task, text=question.text, answer=question.answer))
    return Episode(prefix=tuple(pictures), questions=tuple(questions), seed=seed)


def _ask(rng: random.Random, picture: Picture, kind: str, where: str) -> Question | None:
    asked = _QUESTIONS[kind](rng, picture, where)
    if asked is None:
        return None
    return Question(task=kind, text=asked[0], answer=asked[1], mentions=_mentions(asked[0], picture))


def _mentions(text: str, picture: Picture) -> tuple[tuple[int, float, float], ...]:
    words = ["", *text.rstrip("?").split()]
    found = []
    for number, (before, word) in enumerate(pairwise(words)):
        if word in SHAPES:
            for thing in picture.things:
                if thing.shape == word and before in ("the", thing.color):
                    y, x = (
                        (2 * thing.row + 1) * 32 / picture.height - 1,
                        (2 * thing.column + 1) * 32 / picture.width - 1,
                    )
                    found.append((number, y, x))
                    break
    return tuple(found)


def _reference(rng: random.Random, picture: Picture, thing: Thing) -> str | None:
    same_shape = sum(other.shape == thing.shape for other in picture.things)
    if same_shape == 1 and rng.random() < 0.5:
        return thing.shape
    same = sum(other.shape == thing.shape and other.color == thing.color for other in picture.things)
    return f"{thing.color} {thing.shape}" if same == 1 else None


def _color(rng: random.Random, picture: Picture, where: str) -> tuple[str, str] | None:
    shapes = [thing.shape for thing in picture.things]
    single = [thing for thing in picture.things if shapes.count(thing.shape) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return f"What color is the {thing.shape}{where}?", thing.color


def _shape(rng: random.Random, picture: Picture, where: str) -> tuple[str, str] | None:
    colors = [thing.color for thing in picture.things]
    single = [thing for thing in picture.things if colors.count(thing.color) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    return f"What shape is {thing.color}{where}?", thing.shape


def _count(rng: random.Random, picture: Picture, where: str) -> tuple[str, str] | None:
    choice = rng.random()
    if choice < 0.25:
        return f"How many shapes are there{where}?", str(len(picture.things))
    present = rng.random() < 0.85
    if choice < 0.65:
        color = rng.choice(picture.things).color if present else rng.choice(COLOR_NAMES)
        number = sum(thing.color == color for thing in picture.things)
        return f"How many {color} shapes are there{where}?", str(number)
    shape = rng.choice(picture.things).shape if present else rng.choice(SHAPES)
    number = sum(thing.shape == shape for thing in picture.things)
    return f"How many {plural(shape)} are there{where}?", str(number)


def _position(rng: random.Random, picture: Picture, where: str) -> tuple[str, str] | None:
    candidates: list[tuple[str, int, int]] = []
    for thing in picture.things:
        name = _reference(rng, picture, thing)
        if name is not None:
            candidates.append((name, thing.row, thing.column))
    for sign in picture.signs:
        if len(sign.columns) == 1:
            candidates.append((_sign_name(sign), sign.row, sign.columns[0]))
    rows, columns = picture.height // 32, picture.width // 32
    clear = [c for c in candidates if 2 * c[1] + 1 != rows and 2 * c[2] + 1 != columns]
    if not clear:
        return None
    name, row, column = rng.choice(clear)
    vertical = "top" if 2 * row + 1 < rows else "bottom"
    horizontal = "left" if 2 * column + 1 < columns else "right"
    return f"Where is the {name}{where}?", f"{vertical} {horizontal}"


def _sign_name(sign: Sign) -> str:
    return "number" if sign.kind == "number" else "letters" if len(sign.text) > 1 else "letter"


def _relation(rng: random.Random, picture: Picture, where: str) -> tuple[str, str] | None:
    things = rng.sample(picture.things, len(picture.things))
    named = [(name, thing) for thing in things if (name := _reference(rng, picture, thing)) is not None]
    if len(named) < 2:
        return None
    (first, one), (second, two) = named[:2]
    rows, columns = one.row - two.row, one.column - two.column
    if abs(columns) > abs(rows) or (abs(columns) == abs(rows) and rng.random() < 0.5):
        return f"Is the {first} left or right of the {second}{where}?", "left" if columns < 0 else "right"
    return f"Is the {first} above or below the {second}{where}?", "above" if rows < 0 else "below"


def _number(rng: random.Random, picture: Picture, where: str) -> tuple[str, str] | None:
    sign = picture.sign("number")
    return None if sign is None else (f"What number is printed{where}?", sign.text)


def _letters(rng: random.Random, picture: Picture, where: str) -> tuple[str, str] | None:
    sign = picture.sign("letters")
    if sign is None:
        return None
    noun = "letters are" if len(sign.text) > 1 else "letter is"
    return f"What {noun} printed{where}?", sign.text


_QUESTIONS = {
    "color": _color, "shape": _shape, "count": _count, "position": _position, "relation": _relation,
    "number": _number, "letters": _letters,
}  # fmt: skip


def _which(rng: random.Random, pictures: list[Picture]) -> Question | None:
    index = rng.randrange(len(pictures))
    thing = rng.choice(pictures[index].things)
    for name in rng.sample((thing.color, thing.shape, f"{thing.color} {thing.shape}"), 3):
        holders = [i for i, picture in enumerate(pictures) if _holds(picture, name)]
        if len(holders) == 1:
            noun = f"{name} shape" if name in COLOR_NAMES else name
            article = "an" if noun[0] in "aeiou" else "a"
            return Question(task="which picture", text=f"Which picture has {article} {noun}?", answer=str(index + 1))
    return None


def _holds(picture: Picture, name: str) -> bool:
    return any(name in (thing.color, thing.shape, f"{thing.color} {thing.shape}") for thing in picture.things)
