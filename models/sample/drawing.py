"""Draws synthetic pictures: plain shapes and small printed signs on a noisy background.

A picture is a grid of 32 x 32 pixel cells, the area one image token covers. A shape sits in one cell, a sign
in a run of cells of one row, both shifted by a few pixels. Everything follows from the random generators
given.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from deepstitch.models.sample.font import DIGITS, GLYPH_HEIGHT, GLYPH_WIDTH, LETTERS, glyph
from deepstitch.models.sample.words import COLORS, SHAPES

CELL = 32
PATCH = 16
RADII = (9, 11, 13)

COLOR_NAMES = tuple(COLORS)
GLYPH_NAMES = DIGITS + LETTERS
# Per-patch labels for the auxiliary training target: 0 is background.
NUM_FORM_LABELS = 1 + len(SHAPES) + len(GLYPH_NAMES)
NUM_COLOR_LABELS = 1 + len(COLORS)


@dataclass(slots=True, kw_only=True)
class Thing:
    """One shape: its names, its cell, and its centre in pixels."""

    shape: str
    color: str
    row: int
    column: int
    y: int
    x: int
    radius: int


@dataclass(slots=True, kw_only=True)
class Sign:
    """One printed number or letter sequence; `kind` is "number" or "letters"."""

    text: str
    kind: str
    y: int
    x: int
    scale: int
    columns: range
    row: int


@dataclass(slots=True, kw_only=True)
class Picture:
    """One composed picture; `height` and `width` are in pixels, multiples of 32."""

    height: int
    width: int
    things: list[Thing] = field(default_factory=list)
    signs: list[Sign] = field(default_factory=list)

    def sign(self, kind: str) -> Sign | None:
        """Returns the sign of that kind, or None."""
        return next((sign for sign in self.signs if sign.kind == kind), None)


@cache
def sprite(shape: str, radius: int) -> np.ndarray:
    """Returns the anti-aliased coverage of a shape, float32 (2 * radius + 1, 2 * radius + 1, 1)."""
    steps = 4
    side = 2 * radius + 1
    axis = ((np.arange(side * steps) + 0.5) / steps - side / 2) / radius
    y, x = np.meshgrid(axis, axis, indexing="ij")
    distance = np.hypot(x, y)
    if shape == "circle":
        inside = distance < 1.0
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) < 0.85
    elif shape == "triangle":
        inside = (y < 0.85) & (y > -0.95 + 1.9 * abs(x))
    elif shape == "diamond":
        inside = abs(x) + abs(y) < 1.05
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95)
    elif shape == "ring":
        inside = (distance < 1.0) & (distance > 0.58)
    else:  # star: a radius that swings between two values five times around
        angle = np.arctan2(x, -y)
        wave = np.abs(((angle / (2 * np.pi) * 5) % 1.0) - 0.5) * 2
        inside = distance < 0.38 + 0.68 * wave**1.3
    coverage = inside.astype(np.float32).reshape(side, steps, side, steps).mean(axis=(1, 3))
    return coverage[:, :, None]


def _place_sign(rng: random.Random, picture: Picture, free: set[tuple[int, int]], kind: str, length: int) -> None:
    characters = DIGITS if kind == "number" else LETTERS
    text = "".join(rng.choice(characters) for _ in range(length))
    if kind == "number" and length > 1 and text[0] == "0":
        text = rng.choice(DIGITS[1:]) + text[1:]
    scale = rng.choice((2, 3))
    width = length * (GLYPH_WIDTH + 1) * scale
    span = -(-(width + 4) // CELL)
    rows, columns = picture.height // CELL, picture.width // CELL
    for _ in range(8):
        row, column = rng.randrange(rows), rng.randrange(max(1, columns - span + 1))
        cells = {(row, column + step) for step in range(span)}
        if column + span <= columns and cells <= free:
            free -= cells
            slack = min(3, (span * CELL - width) // 2)
            y = row * CELL + CELL // 2 + rng.randint(-3, 3)
            x = column * CELL + span * CELL // 2 + rng.randint(-slack, slack)
            run = range(column, column + span)
            picture.signs.append(Sign(text=text, kind=kind, y=y, x=x, scale=scale, columns=run, row=row))
            return


def compose(rng: random.Random, height: int, width: int, *, simple: bool = False) -> Picture:
    """Lays out one picture.

    Args:
        rng: Source of every choice.
        height: Pixels, a multiple of 32.
        width: Pixels, a multiple of 32.
        simple: One to three shapes and both signs where they fit, for prompts with many pictures.

    Returns:
        The picture, with at least one shape.
    """
    picture = Picture(height=height, width=width)
    rows, columns = height // CELL, width // CELL
    free = {(row, column) for row in range(rows) for column in range(columns)}
    if simple or rng.random() < 0.65:
        lengths = (1, 2, 2, 3) if columns > 2 else (1, 2)
        _place_sign(rng, picture, free, "number", rng.choice(lengths))
    if simple or rng.random() < 0.45:
        _place_sign(rng, picture, free, "letters", rng.choice((1, 2)))
    cells = sorted(free)
    wanted = rng.randint(1, 3) if simple else rng.choice((2, 3, 3, 4, 4, 5, 6))
    cells = rng.sample(cells, min(len(cells), wanted))
    palette: tuple[str, ...] = COLOR_NAMES
    forms: tuple[str, ...] = SHAPES
    style = rng.random()
    if style < 0.2:
        palette = tuple(rng.sample(COLOR_NAMES, 2))
    elif style < 0.4:
        forms = tuple(rng.sample(SHAPES, 2))
    for row, column in cells:
        radius = rng.choice(RADII)
        slack = CELL // 2 - radius - 1
        picture.things.append(
            Thing(
                shape=rng.choice(forms),
                color=rng.choice(palette),
                row=row,
                column=column,
                y=row * CELL + CELL // 2 + rng.randint(-slack, slack),
                x=column * CELL + CELL // 2 + rng.randint(-slack, slack),
                radius=radius,
            )
        )
    return picture


def render(picture: Picture, seed: int) -> np.ndarray:
    """Draws a picture, uint8 (height, width, 3); `seed` drives the noise and small colour shifts."""
    noise = np.random.default_rng(seed)
    shade = noise.integers(0, 45, 3) if noise.random() < 0.6 else noise.integers(195, 235, 3)
    canvas = np.empty((picture.height, picture.width, 3), dtype=np.uint8)
    canvas[:] = shade.astype(np.uint8)
    canvas += noise.integers(0, 16, (picture.height, picture.width, 1), dtype=np.uint8)
    for thing in picture.things:
        color = np.asarray(COLORS[thing.color], dtype=np.float32) + noise.integers(-12, 13, 3)
        r = thing.radius
        _blend(canvas, thing.y - r, thing.x - r, sprite(thing.shape, r), color)
    ink = np.full(3, 245.0 if shade.mean() < 100 else 10.0, dtype=np.float32)
    for sign in picture.signs:
        pitch = (GLYPH_WIDTH + 1) * sign.scale
        left = sign.x - len(sign.text) * pitch // 2 + sign.scale // 2
        top = sign.y - GLYPH_HEIGHT * sign.scale // 2
        for index, character in enumerate(sign.text):
            _blend(canvas, top, left + index * pitch, glyph(character, sign.scale)[:, :, None], ink)
    return canvas


def _blend(canvas: np.ndarray, top: int, left: int, coverage: np.ndarray, color: np.ndarray) -> None:
    region = canvas[top : top + coverage.shape[0], left : left + coverage.shape[1]]
    region[:] = np.clip(region + coverage * (color - region), 0, 255).astype(np.uint8)


def patch_labels(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Returns what each 16-pixel patch shows: form and colour labels, int64 (height / 16, width / 16)."""
    shape = (picture.height // PATCH, picture.width // PATCH)
    forms, colors = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for thing in picture.things:
        rows = slice(2 * thing.row, 2 * thing.row + 2)
        columns = slice(2 * thing.column, 2 * thing.column + 2)
        forms[rows, columns] = 1 + SHAPES.index(thing.shape)
        colors[rows, columns] = 1 + COLOR_NAMES.index(thing.color)
    for sign in picture.signs:
        pitch = (GLYPH_WIDTH + 1) * sign.scale
        left = sign.x - len(sign.text) * pitch // 2 + sign.scale // 2
        for index, character in enumerate(sign.text):
            column = (left + index * pitch + GLYPH_WIDTH * sign.scale // 2) // PATCH
            forms[sign.y // PATCH, column] = 1 + len(SHAPES) + GLYPH_NAMES.index(character)
    return forms, colors
