"""The words of the sample world: everything a question, an answer or a filler sentence can say."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (40, 175, 60),
    "blue": (40, 80, 225),
    "yellow": (240, 215, 40),
    "purple": (150, 50, 190),
    "orange": (245, 130, 25),
}

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star")

QUADRANTS = ("top left", "top right", "bottom left", "bottom right")

NAMES = _words(
    "Ann Bob Cara Dan Eva Finn Gus Hana Ivan Jana Karl Lena Max Nora Otto Pia Quin Rosa Sam Tina "
    "Ugo Vera Will Xena Yara Zeno Aldo Bella Cleo Dirk Elsa Fred Gina Hugo Iris Jack Kira Leo Mona Nils "
    "Olga Paul Rita Sven Tess Uma Vito Wanda"
)

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("left", "right"), ("top", "bottom"),
    ("old", "new"), ("open", "closed"), ("wet", "dry"), ("high", "low"), ("day", "night"), ("yes", "no"),
    ("light", "dark"), ("happy", "sad"), ("early", "late"), ("full", "empty"),
)  # fmt: skip

ADJECTIVES = _words("old new big small quiet green red wet dry long short happy slow warm dark light")
NOUNS = _words(
    "cat dog fox bird horse fish tree river house boat road garden bridge stone table lamp book hill "
    "field town train window door market"
)
VERBS = _words("saw found liked passed watched followed left reached")
PLACES = _words("near behind under beside over")

QUESTION_WORDS = _words(
    "What color is the shape are there How many things in picture pictures Which has a an and Where "
    "Is of or below above number letters printed number from does have comes after before opposite "
    "Repeat user assistant system Picture From Copy shapes circles squares triangles diamonds crosses rings "
    "stars has have does + = . : ? Facts The the A a In at on top bottom left right yes no it this image "
    "Describe"
)


def plural(shape: str) -> str:
    """Returns the plural of a shape name."""
    return shape + ("es" if shape.endswith("ss") else "s")


def vocabulary() -> list[str]:
    """Returns every word, sorted and without repeats, that must be one token."""
    words: set[str] = set(QUESTION_WORDS) | set(COLORS) | set(SHAPES) | set(NAMES)
    words |= set(ADJECTIVES) | set(NOUNS) | set(VERBS) | set(PLACES)
    words |= {word for pair in OPPOSITES for word in pair}
    return sorted(words)
