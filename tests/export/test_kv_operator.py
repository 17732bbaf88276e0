"""CachedAttention over a cache of fewer bits: the definition, ONNX Runtime's kernel and numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from deepstitch.export.functions import DOMAIN, OPSET, VERSION, parse_functions
from deepstitch.export.kv_functions import KV_CACHES, ORT_CPU_TEXTS

from .graphs import session

Arrays = dict[str, np.ndarray]
SMALL = ("fp16", "int8", "int4")
INTEGER = ("int8", "int4")
TARGETS = ("portable", "ort-cpu")
ORT_CPU = parse_functions(ORT_CPU_TEXTS, com_microsoft=1)
HEADS, KV_HEADS, WIDTH = 4, 2, 16
LENGTHS = {
    "prefill": ((0,), (7,)),
    "ragged prefill": ((0, 0), (5, 3)),
    "chunk": ((6,), (4,)),
    "decode": ((9,), (1,)),
    "decode of two rows": ((6, 2), (1, 1)),
    "several rows continue": ((6, 2), (3, 2)),
}


def scales(kind: str) -> list[np.ndarray]:
    """Of keys and of values: other ones, and others for every head and channel."""
    limit = KV_CACHES[kind].largest
    if limit is None:
        return []
    rng = np.random.default_rng(5)
    ranges = (rng.uniform(0.5, 3.0, (2, 1, KV_HEADS, 1, WIDTH)) / limit).astype(np.float32)
    return [ranges[0], ranges[1] * np.float32(0.4)]


def store(kind: str, x: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """``[..., D]`` as it lies in the cache."""
    if scale is None:
        return x.astype(np.float16)
    steps = np.rint(x * (np.float32(1) / scale))
    if kind == "int8":
        return np.clip(steps, -128, 127).astype(np.int8)
    nibbles = (np.clip(steps, -8, 7) + 8).astype(np.uint8)
    return nibbles[..., 0::2] + 16 * nibbles[..., 1::2]


def read(kind: str, stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """The inverse of :func:`store`."""
    if scale is None:
        return stored.astype(np.float32)
    if kind == "int4":
        stored = np.stack((stored % 16, stored // 16), axis=-1).reshape(*stored.shape[:-1], -1).astype(np.int8) - 8
    return stored.astype(np.float32) * scale


def reference(kind: str, feeds: Arrays) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Per row: attention over what was stored, and the valid part of both caches."""
    outputs, caches = [], ([], [])
    for row, (past, new) in enumerate(zip(feeds["past_lengths"], feeds["query_lengths"], strict=True)):
        held = []
        for name, cache, scale in zip(("key", "value"), caches, scales(kind) or (None, None), strict=True):
            fresh = feeds[name][row, :new].reshape(new, KV_HEADS, WIDTH).swapaxes(0, 1)
            stored = store(kind, fresh, None if scale is None else scale[0])
            cache.append(np.concatenate((feeds[f"past_{name}"][row, :, :past], stored), axis=1))
            whole = read(kind, cache[-1], None if scale is None else scale[0])
            held.append(np.repeat(whole.astype(np.float64), HEADS // KV_HEADS, axis=0))
        query = feeds["query"][row, :new].reshape(new, HEADS, WIDTH).swapaxes(0, 1)
        scores = query @ held[0].swapaxes(1, 2) * WIDTH**-0.5
        scores[:, np.arange(past + new) > past + np.arange(new)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = weights / weights.sum(-1, keepdims=True) @ held[1]
        outputs.append(attended.swapaxes(0, 1).reshape(new, -1))
    return outputs, *caches


def feeds_for(kind: str, lengths: str) -> Arrays:
    past, new = LENGTHS[lengths]
    rng = np.random.default_rng(len(lengths))
    rows, longest, capacity = len(past), max(new), max(past) + max(new) + 3
    shape = (rows, KV_HEADS, capacity, WIDTH)
    held = [store(kind, rng.standard_normal(shape, dtype=np.float32), scale) for scale in scales(kind) or (None, None)]
    return {
        "query": rng.standard_normal((rows, longest, HEADS * WIDTH), dtype=np.float32),
        "key": rng.standard_normal((rows, longest, KV_HEADS * WIDTH), dtype=np.float32) * 1.5,  # some are cut off
        "value": rng.standard_normal((rows, longest, KV_HEADS * WIDTH), dtype=np.float32),
        "past_key": held[0],
        "past_value": held[1],
        "past_lengths": np.array(past, np.int32),
        "query_lengths": np.array(new, np.int32),
    }


def run_operator(kind: str, body: str, feeds: Arrays) -> list[np.ndarray]:
    """One node of the operator in ONNX Runtime."""
    operator = KV_CACHES[kind].operator
    proto = KV_CACHES[kind].definition() if body == "portable" else ORT_CPU[operator]

    def declare(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        shape = [None] * (array.ndim - 1) + [array.shape[-1]]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape)

    constants = dict(zip(("key_scale", "value_scale"), scales(kind), strict=False))
    names = ("output", "present_key", "present_value")
    shapes = (feeds["query"], feeds["past_key"], feeds["past_value"])
    node = helper.make_node(
        operator,
        [*feeds, *constants],
        names,
        domain=DOMAIN,
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=WIDTH**-0.5,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [declare(name, array) for name, array in feeds.items()],
        [declare(name, array) for name, array in zip(names, shapes, strict=True)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [("", OPSET), ("com.microsoft", 1), (DOMAIN, VERSION)]
    model = helper.make_model(
        graph, functions=[proto], opset_imports=[helper.make_opsetid(*each) for each in imports], ir_version=11
    )
    return session(model.SerializeToString()).run(None, feeds)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("body", TARGETS)
@pytest.mark.parametrize("kind", SMALL)
def test_operator(kind: str, body: str, lengths: str) -> None:
    feeds = feeds_for(kind, lengths)
    past, new = LENGTHS[lengths]
    if body == "ort-cpu" and len(past) > 1 and max(new) > 1 and max(past) > 0:
        with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="batch_size must be 1"):
            run_operator(kind, body, feeds)
        return
    output, *caches = run_operator(kind, body, feeds)
    expected, *expected_caches = reference(kind, feeds)
    # the kernel attends in float16, and to new keys as they are, not as stored
    tolerance = 2e-3 if (kind, body) == ("fp16", "ort-cpu") else 2e-6
    for row, rows in enumerate(expected):
        np.testing.assert_allclose(output[row, : new[row]], rows, rtol=0, atol=tolerance * np.abs(rows).max())
        for cache, part in zip(caches, expected_caches, strict=True):
            np.testing.assert_array_equal(cache[row, :, : past[row] + new[row]], part[row])


@pytest.mark.parametrize("body", TARGETS)
@pytest.mark.parametrize("kind", INTEGER)
def test_rounding(kind: str, body: str) -> None:
    """Ties go to the even step, far values to the last one; in the kernel as in the definition."""
    feeds = feeds_for(kind, "prefill")
    limit = KV_CACHES[kind].largest
    assert limit is not None
    steps = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, limit + 0.6, -limit - 0.6, 1e6, -1e6, -limit - 2, 0.49], np.float32
    )
    key_scale = scales(kind)[0]
    chosen = np.resize(steps, (1, 7, KV_HEADS, WIDTH)) * key_scale[:, :, 0][:, None]
    feeds["key"] = chosen.reshape(1, 7, -1).astype(np.float32)
    np.testing.assert_array_equal(run_operator(kind, body, feeds)[1][0, :, :7], reference(kind, feeds)[1][0])
