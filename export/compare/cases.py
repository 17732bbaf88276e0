"""The case matrix: prompts that broke exporters of Qwen3-VL, as data.

Sizes are relative, so that one matrix serves every checkpoint: ``inputs.py`` fits them to the checkpoint's
pixel limits and vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepstitch.errors import InputError, did_you_mean

__all__ = ["CASES", "Case", "Clip", "Part", "Picture", "Text", "Turn", "select_cases"]


@dataclass(frozen=True, slots=True)
class Text:
    """Random tokens."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A random picture, so many merged tokens taller and wider than the smallest square that is allowed."""

    taller: int
    wider: int


@dataclass(frozen=True, slots=True)
class Clip:
    """A random clip of ``steps`` time steps; between them stands text, as timestamps do."""

    steps: int


Part = Text | Picture | Clip
Turn = tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt, or several in one batch.

    Attributes:
        purpose: what it shows, for the report.
        rows: per batch row its turns; a later turn is prefilled over the cache of the earlier ones.
        chunk: prefill in pieces of this many tokens; None takes a turn at once.
        decode: tokens fed one by one after the prompt.
        needs_vision: without pictures the case would repeat another one, so text-only models skip it.
    """

    name: str
    purpose: str
    rows: tuple[tuple[Turn, ...], ...]
    chunk: int | None = None
    decode: int = 0
    needs_vision: bool = False


SMALL, WIDE, TALL = Picture(0, 1), Picture(1, 3), Picture(2, 1)

CASES: tuple[Case, ...] = (
    Case(name="text", purpose="no picture", rows=(((Text(24),),),)),
    Case(name="one-image", purpose="one picture", rows=(((Text(5), WIDE, Text(7)),),), needs_vision=True),
    Case(
        name="two-sizes",
        purpose="two pictures of different sizes",
        rows=(((Text(4), SMALL, Text(3), TALL, Text(6)),),),
        needs_vision=True,
    ),
    Case(
        name="three-images",
        purpose="three pictures, two of them side by side",
        rows=(((Text(3), SMALL, WIDE, Text(5), TALL, Text(4)),),),
        needs_vision=True,
    ),
    Case(
        name="batch-2",
        purpose="two rows of different lengths with different pictures",
        rows=(((Text(6), SMALL, Text(9)),), ((Text(2), WIDE, Text(3), TALL, Text(8)),)),
        decode=4,
    ),
    Case(
        name="video",
        purpose="a clip of three time steps",
        rows=(((Text(5), Clip(3), Text(6)),),),
        needs_vision=True,
    ),
    Case(
        name="multi-turn",
        purpose="a second turn with a picture of its own over the cache of the first",
        rows=(((Text(5), WIDE, Text(6)), (Text(4), SMALL, Text(7))),),
        decode=4,
    ),
    Case(
        name="chunked-prefill",
        purpose="a prompt in pieces of five tokens, cut inside its pictures",
        rows=(((Text(8), TALL, Text(3), WIDE, Text(12)),),),
        chunk=5,
    ),
    Case(
        name="decode-32",
        purpose="32 tokens one by one after a picture",
        rows=(((Text(6), SMALL, Text(5)),),),
        decode=32,
    ),
)


def select_cases(names: Iterable[str]) -> tuple[Case, ...]:
    """The cases of these names, in the order of the matrix; all of them where there are no names.

    Raises:
        InputError: there is no such case.
    """
    known = {case.name: case for case in CASES}
    wanted = set(names)
    for name in sorted(wanted - known.keys()):
        raise InputError(f"--case {name}: no such case{did_you_mean(name, known)}; there are {', '.join(known)}")
    return tuple(case for case in CASES if not wanted or case.name in wanted)
