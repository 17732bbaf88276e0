"""What is timed: the operators at the shapes of the models, and what each call cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array
from deepstitch.plugins.common.roofline import EXPERTS, LINEARS, Experts, Linear, Work
from deepstitch.plugins.kv_cache_append.roofline import append_work

__all__ = ["FULL", "TINY", "Attention", "Measurement", "Shapes", "measurements"]

BLOCK = 32  # of quantized weights
KEY_BLOCK = 64  # of attention patterns
_PARTS = ("key", "value")
_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of one decoder layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Which models, how many tokens, how long contexts."""

    experts: tuple[Experts, ...]
    linears: tuple[Linear, ...]
    attention: tuple[Attention, ...]
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    contexts: tuple[int, ...]
    fractions: tuple[float, ...] = (0.1, 0.25)
    hidden: int = 2048


FULL = Shapes(
    experts=EXPERTS,
    linears=LINEARS,
    attention=(
        Attention(name="30B-A3B", heads=32, kv_heads=4, head_dim=128),
        Attention(name="2B", heads=16, kv_heads=8, head_dim=128),
        Attention(name="vl-sm61", heads=32, kv_heads=8, head_dim=64),
    ),
    decode=(1, 2, 4, 8),
    prefill=(128, 512, 2048),
    contexts=(1024, 8192, 32768),
)
TINY = Shapes(  # what the host shim gets through in seconds
    experts=(Experts(name="tiny", layers=1, experts=4, top_k=2, hidden=64, intermediate=32),),
    linears=(Linear(name="tiny", inputs=64, outputs=40),),
    attention=(Attention(name="tiny", heads=4, kv_heads=2, head_dim=64),),
    decode=(1, 3),
    prefill=(20,),
    contexts=(300,),
    hidden=64,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One call.

    Attributes:
        op: folder of the operator.
        name: what is shown; model, phase, format and size in words.
        attributes: of the operator.
        inputs: makes the tensors.
        work: what the call must move and compute, given its inputs.
        facts: for the report and for whoever does the same in PyTorch.
        shared: outputs that are written over an input.
    """

    op: str
    name: str
    attributes: Mapping[str, Any]
    inputs: Callable[[], dict[str, Array]]
    work: Callable[[dict[str, Array]], Work]
    facts: Mapping[str, Any]
    shared: Mapping[str, str] = field(default_factory=dict)


def measurements(shapes: Shapes) -> Iterator[Measurement]:
    """Every call that is timed."""
    yield from _experts(shapes)
    yield from _linears(shapes)
    yield from _attention(shapes)
    yield from _small(shapes)


def tiled(shape: tuple[int, ...], make: Callable[[np.random.Generator, int], Array], seed: int = 0) -> Array:
    """Random numbers that repeat after a million: making billions would take longer than using them."""
    count = int(np.prod(shape))
    return np.resize(make(np.random.default_rng(seed), min(count, 1 << 20)), shape)


def normal(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> Array:
    return tiled(shape, lambda rng, count: (scale * rng.standard_normal(count)).astype(np.float32), seed)


def weight(name: str, stored: str, shape: tuple[int, ...], seed: int) -> dict[str, Array]:
    """A matrix ``[..., N, K]`` as the operators take it, with its scales."""
    if stored in ("float32", "float16"):
        return {name: normal(shape, 0.02, seed).astype(stored)}
    words = (*shape[:-1], shape[-1] * (4 if stored == "int4" else 8) // 32)
    scales = (*shape[:-1], shape[-1] // BLOCK)
    return {
        name: tiled(words, lambda rng, count: rng.integers(-(1 << 31), 1 << 31, count).astype(np.int32), seed),
        f"{name}_scales": tiled(scales, lambda rng, count: rng.uniform(0.001, 0.003, count).astype(np.float16), seed),
    }


def weight_bytes(stored: str, count: float) -> float:
    return count * (_BYTES[stored] + (2 / BLOCK if stored.startswith("int") else 0))


def arithmetic(stored: str, multiply_adds: float) -> dict[str, float]:
    return {"integer_ops" if stored.startswith("int") else "float_ops": 2 * multiply_adds}


def _phases(shapes: Shapes, stored: str) -> Iterator[tuple[str, int]]:
    """int4 at every size; the other formats at one token and at the middle prefill."""
    every = [("decode", each) for each in shapes.decode] + [("prefill", each) for each in shapes.prefill]
    few = [("decode", shapes.decode[0]), ("prefill", shapes.prefill[len(shapes.prefill) // 2])]
    yield from every if stored == "int4" else few


def _experts(shapes: Shapes) -> Iterator[Measurement]:
    for model in shapes.experts:
        for stored in ("int4", "int8", "float16", "float32"):
            for phase, tokens in _phases(shapes, stored):
                yield _expert_call(model, stored, phase, tokens)


def _expert_call(model: Experts, stored: str, phase: str, tokens: int) -> Measurement:
    def inputs() -> dict[str, Array]:
        logits = np.random.default_rng(tokens).standard_normal((tokens, model.experts)).astype(np.float32)
        up = weight("gate_up", stored, (model.experts, 2 * model.intermediate, model.hidden), 1)
        down = weight("down", stored, (model.experts, model.hidden, model.intermediate), 2)
        return {"x": normal((tokens, model.hidden)), "router_logits": logits, **up, **down}

    def work(arrays: dict[str, Array]) -> Work:
        chosen = np.argsort(-arrays["router_logits"], axis=-1, kind="stable")[:, : model.top_k]
        touched = len(np.unique(chosen)) * model.weights
        moved = 4.0 * tokens * (2 * model.hidden + model.experts)
        return Work(nbytes=weight_bytes(stored, touched) + moved,
                    **arithmetic(stored, tokens * model.top_k * model.weights))  # fmt: skip

    quantized = stored.startswith("int")
    attributes = {"top_k": model.top_k, "norm_topk_prob": 1, "weight_format": stored, "num_experts": model.experts,
                  "intermediate_size": model.intermediate, "activations": [0], "gated": 1,
                  "block_size": BLOCK if quantized else 0}  # fmt: skip
    facts = {"model": model.name, "phase": phase, "tokens": tokens, "format": stored}
    name = f"{model.name} {phase} {tokens} {stored}"
    return Measurement(op="moe_experts", name=name, attributes=attributes, inputs=inputs, work=work, facts=facts)


def _linears(shapes: Shapes) -> Iterator[Measurement]:
    for matrix in shapes.linears:
        for stored in ("int4", "int8", "float16", "float32"):
            for phase, tokens in _phases(shapes, stored):
                yield _linear_call(matrix, stored, phase, tokens)


def _linear_call(matrix: Linear, stored: str, phase: str, tokens: int) -> Measurement:
    def inputs() -> dict[str, Array]:
        return {
            "x": normal((tokens, matrix.inputs)),
            **_renamed(weight("weight", stored, (matrix.outputs, matrix.inputs), 1)),
        }

    size = matrix.inputs * matrix.outputs
    moved = weight_bytes(stored, size) + 4.0 * tokens * (matrix.inputs + matrix.outputs)
    amount = Work(nbytes=moved, **arithmetic(stored, tokens * size))
    attributes = {"weight_format": stored, "block_size": BLOCK if stored.startswith("int") else 0,
                  "out_features": matrix.outputs}  # fmt: skip
    facts = {"model": matrix.name, "phase": phase, "tokens": tokens, "format": stored}
    name = f"{matrix.name} {phase} {tokens} {stored}"
    return Measurement(op="quantized_linear", name=name, attributes=attributes, inputs=inputs, work=lambda _: amount,
                       facts=facts)  # fmt: skip


def _renamed(arrays: dict[str, Array]) -> dict[str, Array]:
    """QuantizedLinear has one matrix, whose scales are called scales."""
    return {"scales" if name.endswith("_scales") else name: value for name, value in arrays.items()}


def _attention(shapes: Shapes) -> Iterator[Measurement]:
    for model in shapes.attention:
        first = model is shapes.attention[0]
        for context in shapes.contexts:
            longest = context == max(shapes.contexts)
            patterns = [("dense", 1.0)] + [(kind, part) for part in shapes.fractions for kind in ("layout", "dynamic")]
            for pattern, fraction in patterns:
                for stored in ("float16", "int8", "float32") if first else ("float16",):
                    rows = shapes.decode if first and longest and stored == "float16" else shapes.decode[:1]
                    for count in rows:
                        yield _attention_call(model, stored, context, (count, 1), pattern, fraction)
                new = min(context, max(shapes.prefill))
                yield _attention_call(model, "float16", context, (1, new), pattern, fraction)


def kept_blocks(context: int, new: int, pattern: str, fraction: float) -> np.ndarray:
    """Which key blocks each query block reads: ``[query blocks, key blocks]`` of 0 and 1; the newest always."""
    past = context - new
    blocks = -(-context // KEY_BLOCK)
    kept = np.zeros((-(-new // KEY_BLOCK), blocks), np.int32)
    rng = np.random.default_rng(context)
    for row in range(len(kept)):
        first = (past + row * KEY_BLOCK) // KEY_BLOCK
        last = (past + min((row + 1) * KEY_BLOCK, new) - 1) // KEY_BLOCK
        count = last + 1 if pattern == "dense" else max(1, round(fraction * (last + 1)))
        kept[row, first : last + 1] = 1
        spare = max(0, count - (last + 1 - first))
        kept[row, rng.permutation(first)[:spare]] = 1
    return kept


def _attention_call(
    model: Attention, stored: str, context: int, batch_and_new: tuple[int, int], pattern: str, fraction: float
) -> Measurement:
    batch, new = batch_and_new
    kept = kept_blocks(context, new, pattern, fraction)
    cache = (batch, model.kv_heads, context, model.head_dim)

    def inputs() -> dict[str, Array]:
        arrays = {"query": normal((batch, new, model.heads * model.head_dim), seed=3)}
        for seed, name in enumerate(("key_cache", "value_cache")):
            arrays[name] = _cached(stored, cache, seed)
        if stored == "int8":
            for name in ("key_scales", "value_scales"):
                arrays[name] = np.full(cache[:3], 0.01, np.float32)
        arrays["past_lengths"] = np.full(batch, context - new, np.int32)
        arrays["query_lengths"] = np.full(batch, new, np.int32)
        return arrays | ({"layout": kept[None, None]} if pattern == "layout" else {})

    attributes: dict[str, Any] = {"num_heads": model.heads, "kv_num_heads": model.kv_heads, "head_dim": model.head_dim,
                                  "scale": model.head_dim**-0.5, "kv_format": stored, "pattern": pattern}  # fmt: skip
    if pattern != "dense":
        attributes["block_size"] = KEY_BLOCK
    if pattern == "dynamic":
        attributes["top_n"] = max(1, round(fraction * kept.shape[1]))
    amount = _attention_work(model, stored, context, batch_and_new, kept, scored=pattern == "dynamic")
    phase = "decode" if new == 1 else "prefill"
    facts = {"model": model.name, "phase": phase, "tokens": batch * new, "batch": batch, "context": context,
             "format": stored, "pattern": pattern, "fraction": fraction}  # fmt: skip
    shown = pattern if pattern == "dense" else f"{pattern} {fraction:.0%}"
    name = f"{model.name} {phase} {batch * new} at {context} {stored} {shown}"
    return Measurement(op="sparse_attention", name=name, attributes=attributes, inputs=inputs, work=lambda _: amount,
                       facts=facts)  # fmt: skip


def _cached(stored: str, shape: tuple[int, ...], seed: int) -> Array:
    if stored == "int8":
        return tiled(shape, lambda rng, count: rng.integers(-127, 128, count).astype(np.int8), seed)
    return normal(shape, seed=seed).astype(stored)


def _attention_work(
    model: Attention, stored: str, context: int, batch_and_new: tuple[int, int], kept: np.ndarray, *, scored: bool
) -> Work:
    batch, new = batch_and_new
    token = model.kv_heads * (model.head_dim * _BYTES[stored] + (4 if stored == "int8" else 0))  # of keys, or of values
    read = min(int(kept.any(axis=0).sum()) * KEY_BLOCK, context)
    nbytes = batch * (2 * read * token + 8.0 * new * model.heads * model.head_dim)
    queries = [min((row + 1) * KEY_BLOCK, new) - row * KEY_BLOCK for row in range(len(kept))]
    pairs = sum(KEY_BLOCK * int(kept[row].sum()) * count for row, count in enumerate(queries))
    # Half of the newest block of each query block lies behind the mask.
    pairs -= KEY_BLOCK * new // 2 if new > 1 else 0
    if scored:
        nbytes += batch * context * token  # the keys, for their means
    return Work(nbytes=nbytes, float_ops=4.0 * batch * model.heads * model.head_dim * pairs)


def _small(shapes: Shapes) -> Iterator[Measurement]:
    for tokens in (shapes.decode[0], shapes.decode[-1], *shapes.prefill):
        phase = "decode" if tokens in shapes.decode else "prefill"
        yield _norm_call(shapes.hidden, tokens, phase)
        for model in shapes.attention:
            yield _rope_call(model, tokens, phase)
            yield _append_call(model, tokens, shapes.contexts[-1], phase)
        yield _deepstack_call(shapes.hidden, tokens, phase)


def _norm_call(hidden: int, tokens: int, phase: str) -> Measurement:
    amount = Work(nbytes=4.0 * hidden * (4 * tokens + 1), float_ops=5.0 * tokens * hidden)
    return Measurement(
        op="rms_norm_rope", name=f"norm of a sum {phase} {tokens}", attributes={"mode": "norm", "has_residual": 1},
        inputs=lambda: {"x": normal((1, tokens, hidden)), "residual": normal((1, tokens, hidden), seed=1),
                        "weight": normal((hidden,), seed=2)},
        work=lambda _: amount, facts={"phase": phase, "tokens": tokens, "mode": "norm"},
    )  # fmt: skip


def _rope_call(model: Attention, tokens: int, phase: str) -> Measurement:
    width, half = model.heads * model.head_dim, model.head_dim // 2
    third = half // 3
    sections = [half - 2 * third, third, third]
    amount = Work(nbytes=8.0 * tokens * width, float_ops=10.0 * tokens * width)

    def inputs() -> dict[str, Array]:
        positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1, 1))
        return {"x": normal((1, tokens, width)), "weight": normal((model.head_dim,), seed=2), "position_ids": positions,
                "inv_freq": (5e6 ** -(np.arange(half) / half)).astype(np.float32)}  # fmt: skip

    attributes = {"mode": "norm_rope", "num_heads": model.heads, "mrope_section": sections}
    return Measurement(op="rms_norm_rope", name=f"{model.name} norm and mRoPE {phase} {tokens}", attributes=attributes,
                       inputs=inputs, work=lambda _: amount,
                       facts={"phase": phase, "tokens": tokens, "mode": "norm_rope"})  # fmt: skip


def _append_call(model: Attention, tokens: int, capacity: int, phase: str) -> Measurement:
    """In place, in a cache of float16."""
    amount = append_work(model.kv_heads, model.head_dim, "float16", tokens)

    def inputs() -> dict[str, Array]:
        cache, new = (1, model.kv_heads, capacity, model.head_dim), (1, tokens, model.kv_heads * model.head_dim)
        parts = {f"past_{part}": normal(cache, seed=seed).astype(np.float16) for seed, part in enumerate(_PARTS)}
        parts |= {part: normal(new, seed=seed) for seed, part in enumerate(_PARTS, start=2)}
        lengths = {"past_lengths": capacity - tokens - 1, "query_lengths": tokens}
        return parts | {name: np.array([value], np.int32) for name, value in lengths.items()}

    return Measurement(op="kv_cache_append", name=f"{model.name} append {phase} {tokens}",
                       attributes={"kv_format": "float16"}, inputs=inputs, work=lambda _: amount,
                       facts={"phase": phase, "tokens": tokens, "capacity": capacity},
                       shared={f"present_{part}": f"past_{part}" for part in _PARTS})  # fmt: skip


def _deepstack_call(hidden: int, tokens: int, phase: str) -> Measurement:
    rows = max(2, tokens // 2)
    index = np.arange(tokens, dtype=np.int32)[None] % rows
    visual = int((index != 0).sum())
    amount = Work(nbytes=4.0 * hidden * (2 * tokens + visual) + 4 * tokens, float_ops=float(visual * hidden))
    return Measurement(
        op="deepstack_add", name=f"add {phase} {tokens}", attributes={"layer": 1},
        inputs=lambda: {"hidden_states": normal((1, tokens, hidden)), "deepstack_embeds": normal((rows, 3 * hidden)),
                        "deepstack_index": index},
        work=lambda _: amount, facts={"phase": phase, "tokens": tokens},
    )  # fmt: skip
