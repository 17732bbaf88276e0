"""Memory on the card before anything is built: what the engines, the cache and TensorRT take, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepstitch.export.contract import DECODER
from deepstitch.export.tensorrt.footprint import Footprint, footprint, writes_cache_in_place
from deepstitch.export.tensorrt.profiles import Limits, profiles, sizes_of
from deepstitch.export.tensorrt.shapes import Propagation
from deepstitch.export.tensorrt.subject import Subject
from deepstitch.memory_estimate import WEIGHT_BYTES, Workload, estimate_memory, kept_pictures

__all__ = ["OVERHEAD_BYTES", "Choice", "Item", "MemoryPlan", "Planner", "weights_kinds"]

MIB = 1 << 20
# CUDA's context and the code of TensorRT 8.6 and of the plugins, loaded as it is needed. An estimate: not measured on
# any card.
OVERHEAD_BYTES = 300 * MIB
_LEAST_WORKSPACE = 64 * MIB  # for TensorRT's own matrix products


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one may change about a plan.

    Attributes:
        limits: the largest inputs.
        cache_dtype: of the KV cache.
        weights: another ``--weights`` than the graphs have; None: theirs.
        vision_weights: likewise.
    """

    limits: Limits
    cache_dtype: str
    weights: str | None = None
    vision_weights: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One part of the memory. ``basis`` says how the number came about."""

    name: str
    nbytes: int
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The parts, and what there is.

    Attributes:
        available: bytes of the card; None: not known.
        source: where that number is from.
        advice: what to change, where it does not fit.
    """

    items: tuple[Item, ...]
    available: int | None
    source: str
    advice: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(item.nbytes for item in self.items)

    @property
    def fits(self) -> bool | None:
        """None where it is not known what there is."""
        return None if self.available is None else self.total_bytes <= self.available

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self) | {"total_bytes": self.total_bytes, "fits": self.fits}


class Planner:
    """Makes plans for one model; sizes are followed once for each set of limits."""

    def __init__(self, subject: Subject, propagations: Mapping[str, Propagation], available: int | None = None) -> None:
        """For a card of ``available`` bytes; None: not known."""
        self.subject = subject
        self._available = available
        self._propagations = propagations
        self._in_place = DECODER in subject.graphs and writes_cache_in_place(subject.graphs[DECODER].graph)
        self._known: dict[tuple[Any, ...], Footprint] = {}

    def footprints(self, limits: Limits) -> dict[str, Footprint]:
        """Of every profile at its largest sizes, by the profile's name."""
        found = {}
        for profile in profiles(limits, self.subject.merge_size, self.subject.graphs):
            sizes = profile.corners["max"]
            key = (profile.name, *sizes.items())
            if key not in self._known:
                propagation = self._propagations[profile.graph]
                tensors = propagation.run(sizes_of(self.subject.contracts[profile.graph][0], sizes))
                self._known[key] = footprint(propagation, tensors)
            found[profile.name] = self._known[key]
        return found

    def total_bytes(self, choice: Choice) -> int:
        """Of all parts together."""
        return sum(item.nbytes for item in self.items(choice))

    def items(self, choice: Choice) -> tuple[Item, ...]:
        """The parts."""
        found = self.footprints(choice.limits)
        each = list(found.values())
        busiest = max(found, key=lambda name: found[name].activations)
        items, edges = [], 0
        if "decode" in found:  # of half a bundle there is one of the two
            nbytes = _weights(found["decode"], choice.weights)
            items.append(Item(name="decoder weights", nbytes=nbytes, basis=_WEIGHTS))
            edges += max(found[name].edges for name in ("prefill", "decode"))
        if "vision" in found:
            nbytes = _weights(found["vision"], choice.vision_weights)
            items.append(Item(name="vision weights", nbytes=nbytes, basis=_WEIGHTS))
            edges += found["vision"].edges
        asked = max(_LEAST_WORKSPACE, *(one.workspace for one in each))
        workspace = -(-asked // MIB) * MIB  # the builder may align each plugin's part in its own way
        return (
            *items,
            *((self._cache(choice),) if "decode" in found else ()),
            *((self._pictures(),) if "vision" in found else ()),
            Item(name="activations", nbytes=found[busiest].activations, basis=_ACTIVATIONS.format(busiest)),
            Item(name="workspace", nbytes=workspace, basis=_WORKSPACE),
            Item(name="inputs and outputs", nbytes=edges, basis="of the largest profiles, the KV cache left out"),
            Item(name="CUDA and TensorRT", nbytes=OVERHEAD_BYTES, basis="an estimate, measured on no card"),
        )

    def _cache(self, choice: Choice) -> Item:
        limits = choice.limits
        load = Workload(context=limits.max_context, batch=limits.batch, prefill_chunk=limits.prefill_chunk)
        once = estimate_memory(self.subject.shape, load, self.subject.weights, 0, choice.cache_dtype).kv_cache_bytes
        basis = f"{choice.cache_dtype}, {limits.max_context:,} tokens, {limits.batch} rows"
        if self._in_place:
            return Item(name="KV cache", nbytes=once, basis=f"{basis}; written in place by a plugin")
        return Item(
            name="KV cache", nbytes=2 * once, basis=f"{basis}; twice, because TensorRT writes it to a new place"
        )

    def _pictures(self) -> Item:
        return Item(name="pictures kept", nbytes=kept_pictures(self._available), basis=_PICTURES)


_WEIGHTS = "constants of the engine, as TensorRT holds them"
_PICTURES = "encoded, for when they come again: a 32nd of the card, 256 MiB at most"
_ACTIVATIONS = "tensors alive at once in {}, none fused; the engines take turns in one block"
_WORKSPACE = "the limit the builder is given: what the largest plugin asks for, 64 MiB at least"


def _weights(found: Footprint, kind: str | None) -> int:
    if kind is None:
        return found.weights
    return found.weights - found.matrices.nbytes + int(found.matrices.values * WEIGHT_BYTES[kind])


def weights_kinds(found: Footprint) -> list[str]:
    """Kinds that store the matrices of an engine in fewer bytes than it has now, the mildest first."""
    return [
        kind for kind, width in WEIGHT_BYTES.items() if found.matrices.values * width < 0.99 * found.matrices.nbytes
    ]
