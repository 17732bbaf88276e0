"""Stop strings across the borders of pieces."""

from __future__ import annotations

import pytest

from deepstitch.runtime.stop_strings import StopStrings


def feed(stop: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    matcher = StopStrings(stop)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.matched:
            return shown, True
    return [*shown, matcher.flush()], False


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "matched"),
    [
        ([], ["a", "b"], ["a", "b", ""], False),
        (["END"], ["one E", "N", "D two"], ["one ", "", ""], True),
        (["END"], ["one E", "N", "x"], ["one ", "", "ENx", ""], False),
        (["END"], ["one EN"], ["one ", "EN"], False),
        (["END"], ["aENENDb"], ["aEN"], True),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["xyz", "b"], ["ab", "c"], ["a"], True),
        (["\n\n"], ["line\n", "\nmore"], ["line", ""], True),
        (["b", "abc"], ["ab"], ["a"], True),
    ],
)
def test_stop_strings(stop, pieces, shown, matched):
    assert feed(stop, pieces) == (shown, matched)
