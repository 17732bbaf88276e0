"""A 5 x 7 pixel font for the characters the synthetic pictures print.

Drawn by hand, so that rendering depends on no system font and is the same on every machine.
"""

from __future__ import annotations

from functools import cache

import numpy as np

GLYPH_HEIGHT = 7
GLYPH_WIDTH = 5

_ROWS: dict[str, str] = {
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": ".###. #...# ....# ..##. ....# #...# .###.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": ".###. #.... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ....# .###.",
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "C": ".###. #...# #.... #.... #.... #...# .###.",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "J": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "N": "#...# ##..# #.#.# #.#.# #..## #...# #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Z": "##### ....# ...#. ..#.. .#... #.... #####",
}

DIGITS = "0123456789"
LETTERS = "".join(character for character in _ROWS if character.isalpha())


@cache
def glyph(character: str, scale: int) -> np.ndarray:
    """Returns the mask of one character, float32 in {0, 1}, shape (7 * scale, 5 * scale)."""
    rows = [[1.0 if cell == "#" else 0.0 for cell in row] for row in _ROWS[character].split()]
    mask = np.asarray(rows, dtype=np.float32)
    return np.kron(mask, np.ones((scale, scale), dtype=np.float32))
