"""SparseAttention in numpy, in float64, one kv head at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array

__all__ = ["kept_blocks", "reference", "visible_keys"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    """The queries and keys of one batch row or segment.

    Attributes:
        row: its number.
        query: ``[queries, num_heads, D]``.
        key: ``[keys, kv_num_heads, D]``.
        value: like key.
        start: position of the first query among the keys.
        out: ``[queries, num_heads, D]``, where the result goes.
    """

    row: int
    query: Array
    key: Array
    value: Array
    start: int
    out: Array


def reference(attributes: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The operator as README.md and schema.py say it.

    Args:
        attributes: all of them (resolved).
        inputs: by name; float32, float16 and int8 are brought to float64 first.

    Returns:
        ``output`` like ``query``, float32.
    """
    kv_heads, group = attributes["kv_num_heads"], attributes["num_heads"] // attributes["kv_num_heads"]
    output = np.zeros(inputs["query"].shape, np.float64)
    split = _causal if attributes["mode"] == "causal" else _segments
    for each in split(attributes, inputs, output):
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            sees = visible_keys(attributes, inputs, each.row, head, each.query[:, heads], each.key[:, head], each.start)
            used = sees.any(axis=0)  # nothing else is looked at
            key, value, sees = each.key[used, head], each.value[used, head], sees[:, used]
            if used.any():
                each.out[:, heads] = _attend(each.query[:, heads], key, value, sees, attributes["scale"])
    return {"output": output.astype(np.float32)}


def _causal(attributes: Mapping[str, Any], inputs: Mapping[str, Array], output: Array) -> Iterator[_Sequence]:
    batch, tokens, _ = output.shape
    shape = (batch, tokens, attributes["num_heads"], attributes["head_dim"])
    query, out = inputs["query"].reshape(shape).astype(np.float64), output.reshape(shape)
    stored = []
    for name in ("key", "value"):
        numbers = inputs[f"{name}_cache"].astype(np.float64)
        if attributes["kv_format"] == "int8":
            numbers = numbers * inputs[f"{name}_scales"].astype(np.float64)[..., None]
        stored.append(numbers.transpose(0, 2, 1, 3))
    for row in range(batch):
        past, new = int(inputs["past_lengths"][row]), int(inputs["query_lengths"][row])
        keys = slice(0, past + new)
        yield _Sequence(
            row=row,
            query=query[row, :new],
            key=stored[0][row, keys],
            value=stored[1][row, keys],
            start=past,
            out=out[row, :new],
        )


def _segments(attributes: Mapping[str, Any], inputs: Mapping[str, Array], output: Array) -> Iterator[_Sequence]:
    def heads(tensor: Array) -> Array:
        return tensor.reshape(tensor.shape[0], tensor.shape[1] // attributes["head_dim"], attributes["head_dim"])

    query, key, value = (heads(inputs[name].astype(np.float64)) for name in ("query", "key", "value"))
    bounds = inputs["cu_seqlens"].tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        rows = slice(begin, end)
        out = heads(output)[rows]
        yield _Sequence(row=row, query=query[rows], key=key[rows], value=value[rows], start=0, out=out)


def _attend(query: Array, key: Array, value: Array, sees: Array, scale: float) -> Array:
    """query ``[Q, G, D]``, key, value ``[K, D]``, sees ``[Q, K]`` -> ``[Q, G, D]``; a row that sees nothing: zeros."""
    scores = np.where(sees[:, None], query @ key.T * np.float64(np.float32(scale)), -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ value


def visible_keys(
    attributes: Mapping[str, Any],
    inputs: Mapping[str, Array],
    row: int,
    head: int,
    query: Array,
    key: Array,
    start: int,
) -> Array:
    """Which keys each query of a batch row or segment sees, for one kv head.

    Args:
        attributes: resolved.
        inputs: ``layout``, ``gate_scores`` and ``pooled_keys`` of them are looked at.
        row: batch row or segment.
        head: kv head.
        query: ``[queries, group, D]``.
        key: ``[keys, D]``.
        start: position of the first query.

    Returns:
        ``[queries, keys]`` bool.
    """
    position = start + np.arange(query.shape[0])[:, None]
    slot = np.arange(key.shape[0])[None, :]
    causal = attributes["mode"] == "causal"
    sees = (slot <= position) if causal else np.ones(np.broadcast_shapes(slot.shape, position.shape), bool)
    if attributes["pattern"] == "window":
        window = attributes["window"]
        near = (slot > position - window) & (slot < position + window)
        return sees & (near | (slot < attributes["sink"]))
    if attributes["pattern"] == "dense" or sees.size == 0:
        return sees
    kept = kept_blocks(attributes, inputs, row, head, query, key, start)
    block = attributes["block_size"]
    return sees & kept[np.arange(query.shape[0]) // block][:, np.arange(key.shape[0]) // block]


def kept_blocks(
    attributes: Mapping[str, Any],
    inputs: Mapping[str, Array],
    row: int,
    head: int,
    query: Array,
    key: Array,
    start: int,
) -> Array:
    """Patterns layout and dynamic: ``[query blocks, key blocks]`` bool. Arguments as for :func:`visible_keys`."""
    block = attributes["block_size"]
    query_blocks, key_blocks = (-(-tensor.shape[0] // block) for tensor in (query, key))
    if attributes["pattern"] == "layout":
        given = _given(inputs["layout"], row, head, (query_blocks, key_blocks), 0)
        return np.asarray(given != 0)
    kept = np.zeros((query_blocks, key_blocks), bool)
    gate = _given(inputs["gate_scores"], row, head, kept.shape, np.nan) if attributes["gate"] else None
    for index in range(query_blocks):
        queries = query[index * block : (index + 1) * block]
        first = start + index * block
        last = first + queries.shape[0] - 1
        candidates = last // block + 1 if attributes["mode"] == "causal" else key_blocks
        always = {0, *range(first // block, last // block + 1)}
        if gate is None:
            mean_query = queries.mean(axis=(0, 1))
            scores = [mean_query @ _mean_key(attributes, inputs, row, head, key, n) for n in range(candidates)]
        else:
            scores = list(gate[index, :candidates])
        scores = [-np.inf if np.isnan(score) else score for score in scores]
        order = sorted(range(candidates), key=lambda n: (n not in always, -scores[n], n))
        kept[index, order[: max(attributes["top_n"], len(always))]] = True
    return kept


def _mean_key(
    attributes: Mapping[str, Any], inputs: Mapping[str, Array], row: int, head: int, key: Array, block: int
) -> Array:
    if attributes["has_pooled_keys"]:
        return inputs["pooled_keys"][row, head, block].astype(np.float64)
    size = attributes["block_size"]
    return np.asarray(key[block * size : (block + 1) * size].mean(axis=0))


def _given(tensor: Array, row: int, head: int, shape: tuple[int, int], missing: float) -> Array:
    """The part of ``layout`` or ``gate_scores`` for a row and kv head, cut or filled up to ``shape``."""
    part = tensor[row if tensor.shape[0] > 1 else 0, head if tensor.shape[1] > 1 else 0]
    out = np.full(shape, missing, np.float64)
    rows, columns = min(shape[0], part.shape[0]), min(shape[1], part.shape[1])
    out[:rows, :columns] = part[:rows, :columns]
    return out
