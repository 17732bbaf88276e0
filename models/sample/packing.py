"""Turns episodes into batches: several questions share one prefix and do not see each other.

A row is `prefix, question 1, answer 1, question 2, answer 2, ...`. Attention is causal inside the prefix and
from each question to the prefix and itself; rotary positions of every question continue from the end of the
prefix. Each question is therefore computed exactly as if it stood alone behind the prefix, in the chat
template's own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from deepstitch.models.sample.drawing import PATCH, Picture, patch_labels
from deepstitch.models.sample.generator import Episode
from deepstitch.models.sample.tokenizer import build_tokenizer, model_config, special_id

MERGE = 2
PADDING = -1  # segment number of padding; 0 is the prefix, questions count from 1


@dataclass(slots=True, kw_only=True)
class VisionGroup:
    """All pictures of one size in a batch.

    Attributes:
        pixels: uint8 (n, height, width, 3).
        rows: int64 (n * tokens,): where each image token stands in the flattened (B * S) batch.
        forms: int64 (n * tokens, 4): what each 16-pixel patch of the token shows.
        colors: int64 (n * tokens, 4): its colour.
    """

    pixels: np.ndarray
    rows: np.ndarray
    forms: np.ndarray
    colors: np.ndarray


@dataclass(slots=True, kw_only=True)
class Batch:
    """A packed batch of B rows of S tokens.

    Attributes:
        input_ids: int64 (B, S).
        position_ids: int64 (3, B, S).
        segments: int16 (B, S); see the module's first lines.
        vision: pictures by size.
        rows: int64 (A,): flattened positions whose logits predict `targets`.
        targets: int64 (A,).
        questions: int64 (A,): index into `tasks` of the question a target belongs to.
        tasks: task name of every question.
        mention_rows: int64 (M,): flattened positions of question tokens that name a shape.
        mention_places: float32 (M, 2): where that shape is, y and x from -1 to 1.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    segments: np.ndarray
    vision: list[VisionGroup]
    rows: np.ndarray
    targets: np.ndarray
    questions: np.ndarray
    tasks: list[str]
    mention_rows: np.ndarray
    mention_places: np.ndarray


@lru_cache(maxsize=65536)
def encode(text: str) -> tuple[int, ...]:
    """Returns the token ids of a text; remembered, because questions repeat."""
    return tuple(build_tokenizer().encode(text).ids)


@lru_cache(maxsize=1)
def _frame() -> dict[str, tuple[int, ...]]:
    return {
        "open": encode("<|im_start|>user\n"),
        "turn": encode("<|im_end|>\n<|im_start|>assistant\n"),
        "end": encode("<|im_end|>"),
    }


@dataclass(slots=True, kw_only=True)
class _Row:
    ids: list[int]
    positions: list[np.ndarray]  # (3, n) pieces
    segments: list[int]
    pictures: list[tuple[int, Picture]]  # (offset of its first image token, picture)
    answers: list[tuple[int, int, int]]  # (position that predicts, target, question)
    tasks: list[str]
    mentions: list[tuple[int, float, float]]


def _text_positions(start: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(start, start + length), (3, length))


def _image_positions(start: int, rows: int, columns: int) -> np.ndarray:
    grid = np.indices((rows, columns)).reshape(2, -1)
    return np.concatenate([np.zeros((1, rows * columns), dtype=np.int64), grid]) + start


def _pack(episode: Episode, first_question: int) -> _Row:
    frame = _frame()
    start, pad, stop = (special_id(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end"))
    row = _Row(ids=[], positions=[], segments=[], pictures=[], answers=[], tasks=[], mentions=[])
    position = 0

    def text(ids: Sequence[int], at: int) -> int:
        row.ids.extend(ids)
        row.positions.append(_text_positions(at, len(ids)))
        return at + len(ids)

    position = text(frame["open"], position)
    for part in episode.prefix:
        if isinstance(part, str):
            position = text(encode(part) if len(part) < 200 else build_tokenizer().encode(part).ids, position)
            continue
        position = text((start,), position)
        grid = part.height // (PATCH * MERGE), part.width // (PATCH * MERGE)
        row.pictures.append((len(row.ids), part))
        row.ids.extend([pad] * (grid[0] * grid[1]))
        row.positions.append(_image_positions(position, *grid))
        position = text((stop,), position + max(grid))
    row.segments = [0] * len(row.ids)
    for number, question in enumerate(episode.questions):
        asked = encode(question.text) + frame["turn"]
        answer = encode(question.answer) + frame["end"]
        row.mentions += [(len(row.ids) + word, y, x) for word, y, x in question.mentions]  # a word is a token
        predicts = len(row.ids) + len(asked) - 1
        row.answers += [(predicts + i, token, first_question + number) for i, token in enumerate(answer)]
        row.segments += [number + 1] * (len(asked) + len(answer) - 1)
        text(asked + answer[:-1], position)
        row.tasks.append(question.task)
    return row


def pack(episodes: Sequence[Episode]) -> Batch:
    """Packs episodes into one batch, padded on the right to the longest."""
    rows: list[_Row] = []
    tasks: list[str] = []
    for episode in episodes:
        rows.append(_pack(episode, len(tasks)))
        tasks += rows[-1].tasks
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), special_id("<|endoftext|>"), dtype=np.int64)
    positions = np.zeros((3, len(rows), length), dtype=np.int64)
    segments = np.full((len(rows), length), PADDING, dtype=np.int16)
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size], segments[index, :size] = row.ids, row.segments
        positions[:, index, :size] = np.concatenate(row.positions, axis=1)
    answers = np.asarray(
        [
            (index * length + at, target, question)
            for index, row in enumerate(rows)
            for at, target, question in row.answers
        ],
        dtype=np.int64,
    ).reshape(-1, 3)
    mentions = np.asarray(
        [(index * length + at, y, x) for index, row in enumerate(rows) for at, y, x in row.mentions],
        dtype=np.float64,
    ).reshape(-1, 3)
    return Batch(
        input_ids=ids,
        position_ids=positions,
        segments=segments,
        vision=_group_pictures(episodes, rows, length),
        rows=answers[:, 0],
        targets=answers[:, 1],
        questions=answers[:, 2],
        tasks=tasks,
        mention_rows=mentions[:, 0].astype(np.int64),
        mention_places=mentions[:, 1:].astype(np.float32),
    )


def _merge_order(labels: np.ndarray) -> np.ndarray:
    height, width = labels.shape
    blocks = labels.reshape(height // MERGE, MERGE, width // MERGE, MERGE).transpose(0, 2, 1, 3)
    return blocks.reshape(-1, MERGE * MERGE)


def _group_pictures(episodes: Sequence[Episode], rows: list[_Row], length: int) -> list[VisionGroup]:
    sizes: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = {}
    for index, (episode, row) in enumerate(zip(episodes, rows, strict=True)):
        for (offset, picture), pixels in zip(row.pictures, episode.pixels(), strict=True):
            forms, colors = (_merge_order(labels) for labels in patch_labels(picture))
            where = index * length + offset + np.arange(len(forms))
            sizes.setdefault((picture.height, picture.width), []).append((pixels, where, forms, colors))
    return [
        VisionGroup(
            pixels=np.stack([entry[0] for entry in entries]),
            rows=np.concatenate([entry[1] for entry in entries]),
            forms=np.concatenate([entry[2] for entry in entries]),
            colors=np.concatenate([entry[3] for entry in entries]),
        )
        for _, entries in sorted(sizes.items())
    ]


def patchify(pixels: np.ndarray) -> np.ndarray:
    """Cuts pictures into normalised patches in merge-block order.

    Args:
        pixels: uint8 (n, height, width, 3).

    Returns:
        float32 (n * patches, 3 * 2 * 16 * 16); the frame is repeated to fill the two-frame patch.
    """
    n, height, width, _ = pixels.shape
    grid = (height // (PATCH * MERGE), MERGE, PATCH, width // (PATCH * MERGE), MERGE, PATCH)
    blocks = pixels.reshape(n, *grid, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)  # n, gh, gw, mh, mw, c, py, px
    patches = blocks.reshape(-1, 3, 1, PATCH * PATCH).astype(np.float32) / 127.5 - 1.0
    return np.repeat(patches, 2, axis=2).reshape(len(patches), -1)


@lru_cache(maxsize=256)
def vision_geometry(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns what the vision encoder needs to know about one picture size.

    Args:
        height: Pixels.
        width: Pixels.

    Returns:
        position_indices int64 (4, P), position_weights float32 (4, P), rotary cos and sin float32 (P,
        head_dim / 2).
    """
    vision = model_config()["vision_config"]
    side = round(vision["num_position_embeddings"] ** 0.5)
    rows, columns = height // PATCH, width // PATCH
    ys, xs = (np.linspace(0, side - 1, count, dtype=np.float32) for count in (rows, columns))
    y, x = (grid.reshape(rows, columns) for grid in np.meshgrid(ys, xs, indexing="ij"))
    y0, x0 = y.astype(np.int64), x.astype(np.int64)
    y1, x1 = np.minimum(y0 + 1, side - 1), np.minimum(x0 + 1, side - 1)
    dy, dx = y - y0, x - x0
    indices = np.stack([y0 * side + x0, y0 * side + x1, y1 * side + x0, y1 * side + x1])
    weights = np.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
    grid_y, grid_x = np.indices((rows, columns))
    order = _merge_order(np.arange(rows * columns).reshape(rows, columns)).reshape(-1)
    quarter = vision["hidden_size"] // vision["num_heads"] // 4
    frequencies = 10000.0 ** (-np.arange(quarter, dtype=np.float32) / quarter)
    angles = np.concatenate(
        [grid.reshape(-1)[order, None].astype(np.float32) * frequencies for grid in (grid_y, grid_x)], axis=1
    )
    return (
        indices.reshape(4, -1)[:, order],
        weights.reshape(4, -1)[:, order].astype(np.float32),
        np.cos(angles).astype(np.float32),
        np.sin(angles).astype(np.float32),
    )
