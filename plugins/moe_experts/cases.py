"""The table of cases of MoEExperts: what tests, GPU runs and benchmarks read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deepstitch.plugins.common.case import Array, Case, Refused
from deepstitch.plugins.quantized_linear.cases import normal, scaled, some_zero, stored

__all__ = ["CASES", "REFUSED"]

Rows = Callable[[np.random.Generator, tuple[int, ...]], Array]

SWIGLU, GEGLU, RELU2, SILU = range(4)
# Sums in float32 against sums in float64.
NMSE = 1e-11
# Integer formats round the activated numbers to 127 steps. The last bit of a sum can push one of them over the edge
# between two; that is at most this part of its token's power. Nearly all cases come out below NMSE all the same, and
# those named exact_* must.
ONE_STEP = 127.0**-2


def _logits(kind: str) -> Rows:
    """Router logits ``[..., E]`` of one kind."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        logits = normal(rng, shape)
        if kind == "one_expert":
            logits[..., shape[-1] // 2] += 60  # for every token, and the weights of others vanish
        elif kind == "few_experts":
            logits[..., 2:] -= 30
        elif kind == "ties":
            logits = np.round(logits)
        elif kind == "equal":
            logits[:] = 0.25
        elif kind == "masked":
            logits[..., ::3] = -np.inf
        elif kind == "wide":
            logits *= 100  # all but one or two probabilities underflow
        return logits.astype(np.float32)

    return make


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Whole numbers to 127, which every 32 hold: x is its own quantization."""
    x = rng.integers(-127, 128, shape).astype(np.float32)
    x[..., ::32] = 127
    return x


def sevenths(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Multiples of 2**-9 to 7 * 2**-9, which every 32 hold: int4 with a scale of 2**-9."""
    weight = rng.integers(-7, 8, shape).astype(np.float32)
    weight[..., ::32] = 7
    return weight / np.float32(512)


def _case(
    name: str,
    weight_format: str,
    block: int = 0,
    *,
    tokens: tuple[int, ...] | int = 5,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 64,
    intermediate: int = 32,
    scale: str = "float32",
    activations: tuple[int, ...] = (),
    gated: bool = True,
    normalize: bool = True,
    logits: str = "normal",
    x: Rows = normal,
    weight: Rows | None = None,
    poison: bool = False,
    exact: bool = False,
    tags: tuple[str, ...] = (),
) -> Case:
    leading = (tokens,) if isinstance(tokens, int) else tokens
    rows = (2 if gated else 1) * intermediate

    def inputs(rng: np.random.Generator) -> dict[str, Array]:
        made = {"x": x(rng, (*leading, hidden)), "router_logits": _logits(logits)(rng, (*leading, experts))}
        gate_up = (weight or scaled(hidden**-0.5))(rng, (experts, rows, hidden))
        down = (weight or scaled(intermediate**-0.5))(rng, (experts, hidden, intermediate))
        if poison:
            for expert in range(experts):
                if activations[expert % len(activations)] in (RELU2, SILU):
                    gate_up[expert, intermediate:] = np.nan
        made |= stored("gate_up", gate_up, weight_format, block, scale)
        return made | stored("down", down, weight_format, block, scale)

    attributes: dict[str, Any] = {"top_k": top_k, "norm_topk_prob": int(normalize), "weight_format": weight_format}
    attributes |= {"num_experts": experts, "intermediate_size": intermediate}
    attributes |= {"block_size": block} if block else {}
    attributes |= {"activations": list(activations)} if activations else {}
    attributes |= {} if gated else {"gated": 0}
    rounds = block and not exact
    nmse = max(NMSE, ONE_STEP / max(1, math.prod(leading))) if rounds else NMSE
    return Case(name=name, attributes=attributes, inputs=inputs, nmse=nmse, tags=tags)


def _formats() -> list[Case]:
    """Every format, block and type of scale, for few tokens and for more."""
    sizes: dict[str, Any] = {"experts": 4, "hidden": 256, "intermediate": 128, "tags": ("format",)}
    integer = [
        _case(f"{kind}_{block}_{scale}_{tokens}_tokens", kind, block, scale=scale, tokens=tokens, **sizes)
        for kind in ("int4", "int8")
        for block in (32, 64, 128)
        for scale, tokens in (("float32", 3), ("float16", 2), ("float16", 20))
    ]
    floats = [
        _case(f"{kind}_{tokens}_tokens", kind, tokens=tokens, **sizes)
        for kind in ("float32", "float16")
        for tokens in (3, 20)
    ]
    return floats + integer


def _tokens() -> list[Case]:
    """Both regimes and the edges between them."""
    return [
        _case(f"{kind}_ragged_{tokens}", kind, block, tokens=tokens, hidden=96, tags=("tokens",))
        for kind, block in (("int4", 32), ("int8", 32), ("float16", 0), ("float32", 0))
        for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33)
    ]


def _loads() -> list[Case]:
    """Many slots an expert, many tokens, and more tokens than are worked on at a time."""
    few: dict[str, Any] = {"hidden": 32, "tags": ("tokens",)}
    return [
        *(
            _case(f"{kind}_130_tokens", kind, block, tokens=130, experts=2, top_k=1, hidden=96, tags=("tokens",))
            for kind, block in (("int4", 32), ("int8", 32), ("float16", 0), ("float32", 0))
        ),
        _case("int4_8_tokens_2_experts", "int4", 32, tokens=8, experts=2, **few),
        _case("int8_9_tokens_2_experts", "int8", 32, tokens=9, experts=2, **few),
        _case("int8_64_slots_each", "int8", 32, tokens=64, experts=2, **few),
        _case("int4_40_tokens_64_experts", "int4", 32, tokens=40, experts=64, top_k=4, **few),
        _case("float32_33_tokens_16_experts", "float32", tokens=33, experts=16, top_k=1, **few),
        _case("int4_one_of_many_is_busy", "int4", 32, tokens=48, experts=32, top_k=1, logits="one_expert", **few),
        _case("float32_2100_tokens", "float32", tokens=2100, experts=3, top_k=1, **few),
    ]


def _routing() -> list[Case]:
    """Numbers of experts, and how the tokens fall to them."""
    cases = [
        _case(
            f"{kind}_{experts}_experts_top_{top_k}_{tokens}_tokens",
            kind,
            block,
            experts=experts,
            top_k=top_k,
            tokens=tokens,
            normalize=normalize,
            tags=("routing",),
        )
        for kind, block, experts, top_k, tokens, normalize in (
            ("int4", 32, 1, 1, 3, True),
            ("int4", 32, 2, 2, 3, False),
            ("int8", 32, 3, 2, 2, True),
            ("int4", 32, 4, 2, 6, False),
            ("float16", 0, 4, 4, 3, False),
            ("int8", 32, 4, 4, 18, True),
            ("int4", 32, 8, 1, 12, False),
            ("int4", 32, 16, 16, 2, True),
            ("int4", 32, 128, 8, 1, True),
            ("int8", 32, 128, 8, 3, True),
            ("int4", 32, 128, 8, 17, True),
            ("float16", 0, 128, 8, 2, False),
            ("int4", 32, 256, 16, 2, True),
            ("int4", 32, 256, 1, 3, False),
            ("int8", 32, 256, 8, 20, True),
            ("float32", 0, 256, 10, 1, True),
            ("float32", 0, 37, 5, 11, True),
        )
    ]
    cases += [
        _case(
            f"{kind}_logits_{logits}_{tokens}_tokens_{'' if normalize else 'not_'}normalized",
            kind,
            block,
            logits=logits,
            tokens=tokens,
            top_k=top_k,
            normalize=normalize,
            tags=("routing",),
        )
        for logits in ("one_expert", "few_experts", "ties", "equal", "masked", "wide")
        for kind, block, tokens, top_k, normalize in (("int4", 32, 4, 2, True), ("float32", 0, 21, 3, False))
    ]
    cases.append(_case("all_tokens_to_one", "int4", 32, logits="one_expert", tokens=70, top_k=1, tags=("routing",)))
    return cases


def _activations() -> list[Case]:
    """Every activation, and experts that differ."""
    cases = [
        _case(
            f"{kind}_{name}_{tokens}_tokens",
            kind,
            block,
            tokens=tokens,
            experts=4,
            activations=activations,
            gated=gated,
            poison=gated and kind == "float32",
            tags=("activation",),
        )
        for kind, block in (("int4", 32), ("float32", 0))
        for tokens in (2, 19)
        for name, activations, gated in (
            ("geglu", (GEGLU,), True),
            ("relu2", (RELU2,), False),
            ("silu", (SILU,), False),
            ("relu2_in_gated_storage", (RELU2,), True),
            ("each_its_own", (SWIGLU, GEGLU, RELU2, SILU), True),
            ("two_ungated", (SILU, RELU2, RELU2, SILU), False),
        )
    ]
    listed = (SWIGLU,) * 8
    cases.append(_case("int8_swiglu_listed", "int8", 32, activations=listed, tags=("activation",)))
    return cases


def _numbers() -> list[Case]:
    """What is hard about the numbers, and about the shapes."""
    cases = [
        _case(f"{kind}_{name}_{tokens}_tokens", kind, block, tokens=tokens, x=x, tags=("numbers",))
        for kind, block, tokens in (("int4", 32, 3), ("int8", 32, 18), ("float32", 0, 4))
        for name, x in (("zero_blocks", some_zero), ("huge", scaled(1e12)), ("small", scaled(1e-12)))
    ]
    exact: dict[str, Any] = {
        "x": integers,
        "weight": sevenths,
        "activations": (RELU2,),
        "exact": True,
        "tags": ("numbers",),
    }
    cases += [
        _case("exact_1_token", "int4", 32, tokens=1, gated=False, hidden=160, **exact),
        _case("exact_6_tokens", "int4", 32, tokens=6, hidden=128, intermediate=96, **exact),
        _case("exact_40_tokens", "int4", 32, tokens=40, gated=False, experts=3, hidden=96, **exact),
        _case("int4_zero_weights", "int4", 32, weight=some_zero, tags=("numbers",)),
        _case("int4_least", "int4", 32, tokens=1, hidden=32, experts=2, top_k=1, tags=("shape",)),
        _case("int8_sequences", "int8", 32, tokens=(2, 3), tags=("shape",)),
        _case("float32_four_axes", "float32", tokens=(2, 1, 9), tags=("shape",)),
        _case("int4_long_rows", "int4", 128, tokens=2, experts=3, hidden=1024, intermediate=128, tags=("shape",)),
        # rows longer than the activations that fit in shared memory at a time
        _case("int4_longer_rows", "int4", 32, tokens=8, experts=2, hidden=2176, tags=("shape",)),
        _case("int8_longer_middle", "int8", 32, tokens=7, experts=2, hidden=32, intermediate=2112, tags=("shape",)),
        _case("float32_longer_rows", "float32", tokens=8, experts=2, hidden=544, intermediate=544, tags=("shape",)),
        _case("float16_longest_rows", "float16", tokens=1, experts=2, hidden=4160, tags=("shape",)),
        _case("int8_wide_middle", "int8", 64, tokens=1, experts=2, hidden=64, intermediate=704, tags=("shape",)),
        _case("float16_wide_middle", "float16", tokens=17, experts=2, hidden=32, intermediate=352, tags=("shape",)),
    ]
    for kind, block in (("int4", 32), ("int8", 32), ("float16", 0), ("float32", 0)):
        cases.append(_case(f"{kind}_no_tokens", kind, block, tokens=0, tags=("empty",)))
    cases.append(_case("int4_no_sequences", "int4", 32, tokens=(0, 4), tags=("empty",)))
    return cases


CASES: tuple[Case, ...] = (*_formats(), *_tokens(), *_loads(), *_routing(), *_activations(), *_numbers())


def _refused(
    name: str, text: str, attributes: dict[str, Any] | None = None, *, without: str = "", **replaced: Array
) -> Refused:
    """A good int4 call of 2 tokens, 4 experts, H 64 and I 32, one thing of which is wrong."""
    rng = np.random.default_rng(0)
    given = {"top_k": 2, "norm_topk_prob": 1, "weight_format": "int4", "block_size": 32} | (attributes or {})
    given = {"num_experts": 4, "intermediate_size": 32} | given
    tensors = {"x": normal(rng, (2, 64)), "router_logits": normal(rng, (2, 4))}
    tensors |= stored("gate_up", normal(rng, (4, 64, 64)), "int4", 32)
    tensors |= stored("down", normal(rng, (4, 64, 32)), "int4", 32)
    tensors |= replaced
    tensors.pop(without, None)
    return Refused(name, {key: value for key, value in given.items() if value is not None}, tensors, text)


def _refused_attributes() -> list[Refused]:
    return [
        _refused("top_k_over_experts", "top_k is 5", {"top_k": 5}),
        _refused("top_k_over_16", "top_k is 17", {"top_k": 17, "num_experts": 64}),
        _refused("top_k_zero", "top_k is 0", {"top_k": 0}),
        _refused("top_k_missing", "needs the attribute top_k", {"top_k": None}),
        _refused("experts_over_256", "num_experts is 257", {"num_experts": 257}),
        _refused("no_experts", "num_experts is 0", {"num_experts": 0}),
        _refused("norm_neither_0_nor_1", "norm_topk_prob is 2", {"norm_topk_prob": 2}),
        _refused("gated_neither_0_nor_1", "gated is 3", {"gated": 3}),
        _refused("unknown_attribute", "has no attribute topk", {"topk": 2}),
        _refused("unknown_format", "weight_format is 'fp8'", {"weight_format": "fp8"}),
        _refused("block_of_16", "block_size is 16", {"block_size": 16}),
        _refused("no_block", "block_size is 0", {"block_size": None}),
        _refused("block_with_floats", "have no blocks", {"weight_format": "float16"}),
        _refused("unknown_activation", "activations", {"activations": [4]}),
        _refused("negative_activation", "activations", {"activations": [0, 1, -1, 0]}),
        _refused("three_activations", "activations", {"activations": [0, 1, 2]}),
        _refused("no_activation", "activations", {"activations": []}),
        _refused("swiglu_without_up_rows", "gated", {"gated": 0}),
        _refused("geglu_without_up_rows", "gated", {"gated": 0, "activations": [3, 3, 1, 2]}),
        _refused("intermediate_of_48", "intermediate_size", {"intermediate_size": 48}),
        _refused("intermediate_zero", "intermediate_size is 0", {"intermediate_size": 0}),
        _refused("block_does_not_divide_i", "block_size 64 does not divide", {"block_size": 64}),
    ]


def _refused_inputs() -> list[Refused]:
    zeros = np.zeros
    silu: dict[str, Any] = {"gated": 0, "activations": [3]}
    return [
        _refused("x_is_half", "x is float16", x=zeros((2, 64), np.float16)),
        _refused("x_of_48", "must be a positive multiple of 32", x=zeros((2, 48), np.float32)),
        _refused("x_of_other_length", "gate_up has shape [4, 64, 8]", x=zeros((2, 96), np.float32)),
        _refused("logits_of_other_tokens", "router_logits has shape [3, 4]", router_logits=zeros((3, 4), np.float32)),
        _refused("logits_of_other_experts", "router_logits has shape [2, 5]", router_logits=zeros((2, 5), np.float32)),
        _refused(
            "logits_of_other_rank", "router_logits has shape [1, 2, 4]", router_logits=zeros((1, 2, 4), np.float32)
        ),
        _refused("half_logits", "router_logits is float16", router_logits=zeros((2, 4), np.float16)),
        _refused("gate_up_packed_as_int8", "gate_up has shape [4, 64, 16]", gate_up=zeros((4, 64, 16), np.int32)),
        _refused("gate_up_of_other_experts", "gate_up has shape [3, 64, 8]", gate_up=zeros((3, 64, 8), np.int32)),
        _refused("gate_up_without_up_rows", "gate_up has shape [4, 32, 8]", gate_up=zeros((4, 32, 8), np.int32)),
        _refused("gate_up_with_up_rows", "gate_up has shape [4, 64, 8]", silu),
        _refused("gate_up_of_floats", "gate_up is float32", gate_up=zeros((4, 64, 64), np.float32)),
        _refused("down_transposed", "down has shape [4, 32, 8]", down=zeros((4, 32, 8), np.int32)),
        _refused("down_not_packed", "down has shape [4, 64, 32]", down=zeros((4, 64, 32), np.int32)),
        _refused("no_gate_up_scales", "gate_up_scales", without="gate_up_scales"),
        _refused("no_down_scales", "down_scales", without="down_scales"),
        _refused(
            "gate_up_scales_of_one_block",
            "gate_up_scales has shape [4, 64, 1]",
            gate_up_scales=zeros((4, 64, 1), np.float32),
        ),
        _refused(
            "down_scales_transposed", "down_scales has shape [4, 1, 64]", down_scales=zeros((4, 1, 64), np.float32)
        ),
        _refused("integer_scales", "down_scales is int32", down_scales=zeros((4, 64, 1), np.int32)),
    ]


REFUSED: tuple[Refused, ...] = (*_refused_attributes(), *_refused_inputs())
