"""What preprocessing hands to the runtime: plain numpy, ready to be bound to the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Prompt", "VisionBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionBatch:
    """Inputs of the vision encoder for N images and clips, packed in the order the prompt names them.

    P is the number of patches, T = P / merge_size**2 the number of visual tokens.

    Attributes:
        pixel_values: ``[P, C*Tp*ps*ps]`` float32.
        position_indices: ``[4, P]`` int64, bilinear taps into the learned position table.
        position_weights: ``[4, P]`` float32.
        rotary_cos: ``[P, head_dim/2]`` float32.
        rotary_sin: ``[P, head_dim/2]`` float32.
        cu_seqlens: ``[segments+1]`` int32, one attention segment per image or pair of video frames.
        grid_thw: ``[N, 3]`` int64, patches per item along time, height, width.
        tokens_per_item: ``[N]`` int64, visual tokens per item; they sum to T.
        content_keys: N sha256 hex digests of pixels and grid; equal keys mean equal encoder outputs.
    """

    pixel_values: npt.NDArray[np.float32]
    position_indices: npt.NDArray[np.int64]
    position_weights: npt.NDArray[np.float32]
    rotary_cos: npt.NDArray[np.float32]
    rotary_sin: npt.NDArray[np.float32]
    cu_seqlens: npt.NDArray[np.int32]
    grid_thw: npt.NDArray[np.int64]
    tokens_per_item: npt.NDArray[np.int64]
    content_keys: tuple[str, ...]

    @classmethod
    def without_pixels(cls, grid_thw: npt.NDArray[np.int64], keys: Sequence[str], merge_size: int) -> VisionBatch:
        """Items whose encoder outputs are there already: sizes and keys, and no patches."""
        empty, whole = np.zeros((0, 0), np.float32), np.zeros((4, 0), np.int64)
        return cls(
            pixel_values=empty,
            position_indices=whole,
            position_weights=whole.astype(np.float32),
            rotary_cos=empty,
            rotary_sin=empty,
            cu_seqlens=np.zeros(1, np.int32),
            grid_thw=grid_thw,
            tokens_per_item=grid_thw.prod(axis=1) // merge_size**2,
            content_keys=tuple(keys),
        )

    def graph_inputs(self) -> dict[str, npt.NDArray[np.generic]]:
        """Tensors by the input names of the vision_encoder graph."""
        return {
            "pixel_values": self.pixel_values,
            "position_indices": self.position_indices,
            "position_weights": self.position_weights,
            "rotary_cos": self.rotary_cos,
            "rotary_sin": self.rotary_sin,
            "cu_seqlens": self.cu_seqlens,
        }

    def take(self, items: Sequence[int]) -> VisionBatch:
        """A batch of some of the items, in the given order: those a cache does not hold yet, for example."""
        patches = self.grid_thw.prod(axis=1)
        ends = np.cumsum(patches)
        rows = np.concatenate([np.arange(ends[i] - patches[i], ends[i]) for i in items])
        grid = self.grid_thw[list(items)]
        seqlens = np.repeat(grid[:, 1] * grid[:, 2], grid[:, 0])
        return VisionBatch(
            pixel_values=self.pixel_values[rows],
            position_indices=self.position_indices[:, rows],
            position_weights=self.position_weights[:, rows],
            rotary_cos=self.rotary_cos[rows],
            rotary_sin=self.rotary_sin[rows],
            cu_seqlens=np.concatenate([[0], np.cumsum(seqlens)]).astype(np.int32),
            grid_thw=grid,
            tokens_per_item=self.tokens_per_item[list(items)],
            content_keys=tuple(self.content_keys[i] for i in items),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of a batch, tokenised and with its visual tokens in place.

    Attributes:
        input_ids: ``[S]`` int64, one placeholder id per visual token.
        position_ids: ``[3, S]`` int64, mRoPE rows t, h, w.
        rope_delta: position of the next token is ``S + rope_delta``, on all three rows.
        vision: inputs of the vision encoder, None without images and clips.
        text: the rendered prompt, each image still one placeholder.
        timestamps: of every image and clip: seconds of each time step of a clip, none of an image.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    rope_delta: int
    vision: VisionBatch | None
    text: str
    timestamps: tuple[tuple[float, ...], ...] = ()
