"""The runtimes, the variants of a model each can run, and the settings each is given a chance with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PEERS", "Candidate", "Peer", "Variant", "candidates", "own_variant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One form of the weights.

    Attributes:
        name: as the runtime calls it.
        bits: class in which runtimes are compared: 32, 16, 8 or 4.
        always: measured whatever ``--bits`` says, for a runtime that has no other.
    """

    name: str
    bits: int
    always: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One runtime.

    Attributes:
        name: as in ``--peers``.
        module: of :mod:`benchmarks.peers.children`.
        variants: what it can run.
        package: whose version is reported.
    """

    name: str
    module: str
    variants: tuple[Variant, ...]
    package: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Settings to try: those of the model's loading, and those of one call."""

    open: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def own_variant(name: str, flags: tuple[str, ...]) -> Variant:
    """A form of our weights given by flags of the export; its class is that of the decoder's matrices."""
    kind = flags[flags.index("--weights") + 1] if "--weights" in flags[:-1] else name
    return Variant(name=name, bits={"fp32": 32, "fp16": 16, "int8": 8}.get(kind, 4))


_TORCH = (Variant(name="fp32", bits=32, always=True), Variant(name="bf16", bits=16, always=True))

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="deepstitch",
            module="ours",
            package="onnxruntime",
            variants=(
                Variant(name="fp32", bits=32),
                Variant(name="fp16", bits=16),
                Variant(name="int8", bits=8),
                Variant(name="int4", bits=4),
            ),
        ),
        Peer(
            name="llama.cpp",
            module="llama",
            package="llama_cpp_python",
            variants=(
                Variant(name="F32", bits=32),
                Variant(name="BF16", bits=16),
                Variant(name="Q8_0", bits=8),
                Variant(name="Q4_0", bits=4),
                Variant(name="Q4_K_M", bits=4),
            ),
        ),
        Peer(name="transformers", module="hf", package="transformers", variants=_TORCH),
        Peer(name="transformers-compiled", module="hf", package="transformers", variants=_TORCH),
        Peer(
            name="openvino",
            module="vino",
            package="openvino",
            variants=(
                Variant(name="fp32", bits=32),
                Variant(name="int8", bits=8),
                Variant(name="int4", bits=4),
            ),
        ),
        Peer(
            name="onnxruntime-genai",
            module="genai",
            package="onnxruntime_genai",
            variants=(Variant(name="fp32", bits=32), Variant(name="int8", bits=8), Variant(name="int4", bits=4)),
        ),
    )
}

_ATTENTION: tuple[dict[str, Any], ...] = (
    *({"flash": flash, "kv": kv} for flash in ("on", "off") for kv in ("f16", "bf16", "f32")),
    {"flash": "on", "kv": "q8_0"},
    {"flash": "off", "kv": "q8_0", "kv_v": "f16"},
)
_VISION: tuple[dict[str, Any], ...] = tuple(
    {"mmproj": dtype, "vision_flash": flash} for dtype in ("bf16", "f16", "f32", "q8_0") for flash in ("on", "off")
)


def candidates(peer: str, variant: Variant, kind: str, *, quick: bool, experts: bool) -> list[Candidate]:
    """What to try for figures of one kind before the rounds begin; one entry means nothing to choose from.

    Args:
        peer: name of the runtime.
        variant: of its weights.
        kind: of the figures.
        quick: try fewer.
        experts: whether the model is a mixture of experts.
    """
    if peer == "llama.cpp":
        return list(_llama(variant, kind, quick=quick))
    if peer.startswith("transformers"):
        compiled = {"compile": True} if peer.endswith("compiled") else {}
        kinds = ["grouped_mm", "batched_mm", "eager"] if experts and kind in ("prefill", "decode") else []
        if compiled:
            kinds = kinds[:2]  # the eager loop over experts has as many graph breaks as experts
        return [Candidate(open={**compiled, "experts": name}) for name in kinds] or [Candidate(open=compiled)]
    return [Candidate()]


def _llama(variant: Variant, kind: str, *, quick: bool) -> Iterator[Candidate]:
    repacks = (True, False) if variant.bits < 16 else (True,)
    if kind in ("prefill", "decode"):
        chosen = _ATTENTION if not quick else ({"flash": "on", "kv": "f16"}, {"flash": "off", "kv": "bf16"})
        yield from (Candidate(open={"repack": repack}, settings=each) for repack in repacks for each in chosen)
    elif kind == "image":
        yield from (Candidate(settings=each) for each in (_VISION[:4] if quick else _VISION))
    elif kind in ("load", "memory"):
        yield from (Candidate(open={"repack": repack}) for repack in repacks)
    else:
        yield Candidate()  # put together from the choices for other kinds
