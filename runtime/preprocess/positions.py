"""mRoPE positions of Qwen3-VL: three rows (t, h, w) per token, from token ids and patch grids.

1. Text takes the next position, the same on all three rows.
2. An image, or one time step of a clip, starts at the next position p: its tokens have t = p, h = p + row,
   w = p + column of the merged grid. Afterwards the next position is p + max(rows, columns).
3. Every time step of a clip is a segment of its own: timestamps in the text stand between them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from deepstitch.errors import InputError
from deepstitch.manifest import ModelFacts, VisionFacts

__all__ = ["MRopeState", "mrope_position_ids"]

_Int = npt.NDArray[np.int64]


class MRopeState:
    """Positions of one sequence as it grows: prompt chunks, further turns, decoded tokens.

    A chunk may end in the middle of an image; the next one continues there.

    Attributes:
        num_tokens: tokens seen so far.
        next_position: position of the next text token.
    """

    __slots__ = ("_merge", "_segments", "_used", "_visual_ids", "next_position", "num_tokens")

    def __init__(self, *, visual_token_ids: Collection[int] = (), merge_size: int = 1) -> None:
        self._visual_ids = np.array(sorted(visual_token_ids), dtype=np.int64)
        self._merge = merge_size
        self._segments: deque[tuple[int, int]] = deque()  # merged (rows, columns), the first may be half used
        self._used = 0  # tokens of the first segment already placed
        self.num_tokens = 0
        self.next_position = 0

    @classmethod
    def for_model(cls, model: ModelFacts, vision: VisionFacts | None) -> MRopeState:
        """State at the start of a sequence for the model of a manifest."""
        ids = [each for each in (model.image_token_id, model.video_token_id) if each is not None]
        if vision is None:
            return cls()
        return cls(visual_token_ids=ids, merge_size=vision.spatial_merge_size)

    @property
    def rope_delta(self) -> int:
        """What to add to a token's index in the sequence to get its position, from here on."""
        return self.next_position - self.num_tokens

    @property
    def inside_item(self) -> bool:
        """Whether announced visual tokens are still to come."""
        return bool(self._segments)

    def fork(self) -> MRopeState:
        """An independent copy: the same sequence, to be continued differently."""
        other = MRopeState(visual_token_ids=self._visual_ids.tolist(), merge_size=self._merge)
        other._segments, other._used = self._segments.copy(), self._used
        other.num_tokens, other.next_position = self.num_tokens, self.next_position
        return other

    def extend(self, input_ids: npt.ArrayLike, grid_thw: npt.ArrayLike | None = None) -> _Int:
        """Place the next tokens of the sequence.

        Args:
            input_ids: ``[S]`` token ids, one placeholder id per visual token.
            grid_thw: ``[N, 3]`` grids of the images and clips that begin in ``input_ids``, in order; those
                of later chunks may be announced early.

        Returns:
            ``[3, S]`` int64.

        Raises:
            InputError: a visual token has no grid.
        """
        self._announce(grid_thw)
        ids = np.asarray(input_ids, dtype=np.int64).reshape(-1)
        positions = np.empty((3, ids.size), np.int64)
        visual = np.isin(ids, self._visual_ids)
        edges = np.flatnonzero(visual[1:] != visual[:-1]) + 1
        start = 0
        for end in [*edges.tolist(), ids.size]:
            if end == start:
                continue
            if visual[start]:
                self._place_visual(positions[:, start:end])
            else:
                positions[:, start:end] = self.next_position + np.arange(end - start)
                self.next_position += end - start
            start = end
        self.num_tokens += ids.size
        return positions

    def step(self, count: int = 1) -> _Int:
        """Place ``count`` tokens the model wrote, which are text whatever their ids; ``[3, count]`` int64."""
        positions = np.broadcast_to(self.next_position + np.arange(count), (3, count)).copy()
        self.next_position += count
        self.num_tokens += count
        return positions

    def _announce(self, grid_thw: npt.ArrayLike | None) -> None:
        if grid_thw is None:
            return
        for steps, height, width in np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3).tolist():
            self._segments.extend([(height // self._merge, width // self._merge)] * steps)

    def _place_visual(self, out: _Int) -> None:
        """Fill ``[3, n]`` from the announced segments."""
        done = 0
        while done < out.shape[1]:
            if not self._segments:
                raise InputError(
                    f"the prompt holds {out.shape[1] - done} visual tokens more than its images and videos "
                    "have; pass the grid of every image"
                )
            rows, columns = self._segments[0]
            count = min(rows * columns - self._used, out.shape[1] - done)
            index = np.arange(self._used, self._used + count)
            part = out[:, done : done + count]
            part[0] = self.next_position
            part[1] = self.next_position + index // columns
            part[2] = self.next_position + index % columns
            done += count
            self._used += count
            if self._used == rows * columns:
                self._segments.popleft()
                self._used = 0
                self.next_position += max(rows, columns)


def mrope_position_ids(
    input_ids: npt.ArrayLike,
    grid_thw: npt.ArrayLike | None,
    *,
    visual_token_ids: Collection[int],
    merge_size: int,
    attention_mask: npt.ArrayLike | None = None,
) -> tuple[_Int, _Int]:
    """Positions of a whole batch of complete prompts.

    Args:
        input_ids: ``[B, S]`` token ids, padded on either side.
        grid_thw: ``[N, 3]`` grids of all images and clips, in the order they appear row by row.
        visual_token_ids: placeholder ids of images and clips.
        merge_size: patches per token along one side.
        attention_mask: ``[B, S]``, zero at padding; None means no padding.

    Returns:
        position_ids ``[3, B, S]`` int64, zero at padding, and rope_deltas ``[B]`` int64: the next position of
        a row is its number of valid tokens plus its delta.

    Raises:
        InputError: visual tokens and grids do not match.
    """
    ids = np.atleast_2d(np.asarray(input_ids, dtype=np.int64))
    mask = np.ones(ids.shape) if attention_mask is None else np.asarray(attention_mask)
    valid = mask.reshape(ids.shape) != 0
    positions, deltas = np.zeros((3, *ids.shape), np.int64), np.zeros(len(ids), np.int64)
    queue = MRopeState(visual_token_ids=visual_token_ids, merge_size=merge_size)
    queue._announce(grid_thw)
    for row in range(len(ids)):
        queue.next_position = queue.num_tokens = 0
        positions[:, row, valid[row]] = queue.extend(ids[row, valid[row]])
        deltas[row] = queue.rope_delta
        if queue._used or (queue.inside_item and row == len(ids) - 1):
            raise InputError(f"row {row} holds fewer visual tokens than its images and videos have; was it truncated?")
    return positions, deltas
