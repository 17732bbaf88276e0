"""Table taps, rotary tables and segments against Hugging Face's vision helpers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deepstitch.runtime.preprocess import VisionBatch, vision_inputs

GRIDS = {
    "one": [[1, 4, 6]],
    "smallest": [[1, 2, 2]],
    "thin": [[1, 2, 40]],
    "wider than the table": [[1, 30, 14]],
    "three images": [[1, 4, 4], [1, 8, 6], [1, 2, 10]],
    "video": [[3, 4, 6]],
    "mixed": [[1, 6, 4], [2, 4, 4], [1, 2, 2], [4, 2, 6]],
    "large": [[1, 128, 92]],
}


@pytest.mark.parametrize("name", GRIDS)
def test_taps_and_segments_equal_hf_bit_for_bit(name, vision):
    import torch
    from transformers import vision_utils

    grid = torch.tensor(GRIDS[name])
    for side in (2, 8, 48):
        actual = vision_inputs(GRIDS[name], dataclasses.replace(vision, num_grid_per_side=side))
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, side, mode="bilinear", align_corners=True, spatial_merge_size=2
        )
        np.testing.assert_array_equal(actual.position_indices, indices.numpy().T)
        np.testing.assert_array_equal(actual.position_weights, weights.numpy().T)
        np.testing.assert_array_equal(actual.cu_seqlens, vision_utils.get_vision_cu_seqlens(grid).numpy())
        assert actual.position_indices.dtype == np.int64 and actual.cu_seqlens.dtype == np.int32


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("heads", [(32, 1), (64, 2), (144, 2)])
def test_rotary_tables_equal_hf(name, vision, heads):
    import torch
    from transformers import vision_utils
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeVisionConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionRotaryEmbedding

    hidden, count = heads
    config = Qwen3VLMoeVisionConfig(hidden_size=hidden, num_heads=count)
    positions = vision_utils.get_vision_position_ids(torch.tensor(GRIDS[name]), 2)
    cos, sin = Qwen3VLMoeVisionRotaryEmbedding(config)(torch.zeros(1), positions)
    half = hidden // count // 2
    actual = vision_inputs(GRIDS[name], dataclasses.replace(vision, head_dim=hidden // count))
    assert actual.rotary_cos.shape == (positions.shape[0], half) and actual.rotary_cos.dtype == np.float32
    np.testing.assert_allclose(actual.rotary_cos, cos[:, :half].numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(actual.rotary_sin, sin[:, :half].numpy(), rtol=0, atol=1e-6)


def test_packing_equals_separate_calls_and_take_undoes_it(vision):
    grid = np.array(GRIDS["mixed"])
    packed = vision_inputs(grid, vision)
    count = int(grid.prod(1).sum())
    batch = VisionBatch(
        pixel_values=np.random.default_rng(0).random((count, 8), dtype=np.float32),
        **packed._asdict(),
        grid_thw=grid,
        tokens_per_item=grid.prod(1) // 4,
        content_keys=("a", "b", "c", "d"),
    )
    start = 0
    for index, row in enumerate(grid):
        single = vision_inputs(row[None], vision)
        part = batch.take([index])
        for name in packed._fields:
            np.testing.assert_array_equal(getattr(part, name), getattr(single, name))
        np.testing.assert_array_equal(part.pixel_values, batch.pixel_values[start : start + row.prod()])
        start += row.prod()
    swapped = batch.take([2, 1])
    assert swapped.content_keys == ("c", "b") and swapped.cu_seqlens.tolist() == [0, 4, 20, 36]
    assert set(batch.graph_inputs()) == {"pixel_values", *packed._fields}
