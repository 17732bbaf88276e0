"""From the canonical graph to what a target executes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import onnx_ir as ir

from deepstitch.errors import UnsupportedError, did_you_mean
from deepstitch.export.weights import WeightPlan

if TYPE_CHECKING:
    from deepstitch.export.exporter import ExportConfig

__all__ = ["TARGETS", "Target", "target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A way to run the graphs.

    Attributes:
        passes: builds the target's pass list; it may register weight layouts with the plan.
        batched_continuation: see :class:`deepstitch.manifest.ModelFacts`; ``kv_cache_in_place`` likewise.
        unbatched_caches: kinds of KV cache over which ``batched_continuation`` is not so.
        check: refuses what the target cannot hold, by the flags alone.
    """

    name: str
    passes: Callable[[WeightPlan], list[ir.passes.InPlacePass]]
    batched_continuation: bool
    kv_cache_in_place: bool = True
    unbatched_caches: tuple[str, ...] = ()
    check: Callable[[ExportConfig], None] = lambda config: None


def _targets() -> Mapping[str, Target]:
    from deepstitch.export.lower import ort_cpu, ort_cuda, portable, trt8, trt10

    modules = (portable, ort_cpu, ort_cuda, trt8, trt10)
    return MappingProxyType({module.TARGET.name: module.TARGET for module in modules})


TARGETS = ("portable", "ort-cpu", "ort-cuda", "trt8", "trt10")


def target(name: str) -> Target:
    """Look a target up.

    Raises:
        UnsupportedError: there is no such target.
    """
    known = _targets()
    if name not in known:
        raise UnsupportedError(
            f"--target {name}: not a target{did_you_mean(name, known)}; targets are {', '.join(known)}"
        )
    return known[name]
