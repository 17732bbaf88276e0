"""What to change where a plan does not fit: changes that are enough alone, else the mildest that are together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deepstitch.export.contract import DECODER, VISION_ENCODER
from deepstitch.export.kv_functions import KV_CACHES
from deepstitch.export.passes.attention_to_plugin import ATTENTIONS
from deepstitch.export.tensorrt.memory_plan import Choice, Planner, weights_kinds
from deepstitch.memory_estimate import CACHE_BITS

if TYPE_CHECKING:
    from deepstitch.export.tensorrt.profiles import Limits

__all__ = ["Change", "advise", "levers", "readable"]

_LEAST_CHUNK, _LEAST_PATCHES, _LEAST_CONTEXT, _CONTEXT_STEP = 64, 256, 512, 256
_CACHE_FLAGS = {kind.dtype: kind.name for kind in KV_CACHES.values() if kind.operator in ATTENTIONS}

Change = tuple[str, Callable[[Choice], Choice]]
"""What is said of a change, and the change."""


def readable(nbytes: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.0f} MiB"


def advise(planner: Planner, choice: Choice, available: int) -> tuple[str, ...]:
    """Changes that make a plan fit; said as flags, with what is needed then.

    Args:
        planner: of the model.
        choice: that does not fit.
        available: bytes of the card.
    """
    stored, every = list(_storage(planner, choice)), levers(planner, choice)
    alone = {lever[0][0]: _first_enough(planner, choice, available, lever) for lever in every}
    said = [found for found in alone.values() if found is not None]
    if not any(alone[lever[0][0]] for lever in stored):  # what takes nothing from what can be asked
        said += _together(planner, choice, available, stored)
    if not said:
        said = _together(planner, choice, available, every)
    if not said:
        changes = [lever[-1] for lever in every]
        least, words = readable(planner.total_bytes(_applied(choice, changes))), ", ".join(name for name, _ in changes)
        said = [f"nothing: even with {words} it takes {least}; a card with more memory, or a smaller model"]
    return tuple(said)


def levers(planner: Planner, choice: Choice) -> list[list[Change]]:
    """Everything that can be changed, by what is changed; each from its mildest step on."""
    return [*_storage(planner, choice), *_smaller_limits(planner, choice)]


def _first_enough(planner: Planner, choice: Choice, available: int, lever: list[Change]) -> str | None:
    for name, change in lever:
        total = planner.total_bytes(change(choice))
        if total <= available:
            return f"{name} ({readable(total)} in all)"
    return None


def _together(planner: Planner, choice: Choice, available: int, chosen: list[list[Change]]) -> list[str]:
    """The changes of several levers; nothing where all of them are not enough."""
    taken: list[Change] = []
    for lever in chosen:
        fitting = (each for each in lever if planner.total_bytes(_applied(choice, [*taken, each])) <= available)
        taken.append(next(fitting, lever[-1]))
        if planner.total_bytes(_applied(choice, taken)) <= available:
            break
    else:
        return []
    for change in list(taken):  # those that turned out not to be needed
        rest = [each for each in taken if each is not change]
        taken = rest if planner.total_bytes(_applied(choice, rest)) <= available else taken
    total = planner.total_bytes(_applied(choice, taken))
    return [f"{' together with '.join(name for name, _ in taken)} ({readable(total)} in all)"]


def _applied(choice: Choice, changes: list[Change]) -> Choice:
    for _, change in changes:
        choice = change(choice)
    return choice


def _storage(planner: Planner, choice: Choice) -> Iterator[list[Change]]:
    """Ways to store the same in fewer bytes; each from its mildest step on."""
    found = planner.footprints(choice.limits)
    ways = [_cache(choice)] if "decode" in found else []
    if "vision" in found:
        ways.append(_stored("--vision-weights", "vision_weights", weights_kinds(found["vision"])))
    if "decode" in found:
        ways.append(_stored("--weights", "weights", weights_kinds(found["decode"])))
    yield from filter(None, map(list, ways))


def _smaller_limits(planner: Planner, choice: Choice) -> Iterator[list[Change]]:
    """Ways to ask for less, the mildest first; each from its mildest step on."""
    limits = choice.limits
    contexts = range((limits.max_context - 1) // _CONTEXT_STEP * _CONTEXT_STEP, _LEAST_CONTEXT - 1, -_CONTEXT_STEP)
    ways = []
    if DECODER in planner.subject.graphs:
        ways = [
            _halved("--prefill-chunk", "prefill_chunk", limits, _LEAST_CHUNK),
            _stepped("--batch", "batch", [1] if limits.batch > 1 else []),
            _stepped("--max-context", "max_context", list(contexts)),
        ]
    if VISION_ENCODER in planner.subject.graphs:
        ways[2:2] = [_stepped("--images", "images", [1] if limits.images > 1 else [])]
        ways.append(_halved("--image-patches", "image_patches", limits, _LEAST_PATCHES))
    yield from filter(None, map(list, ways))


def _halved(flag: str, name: str, limits: Limits, least: int) -> Iterator[Change]:
    steps, value = [], getattr(limits, name) // 2
    while value >= least:
        steps.append(value)
        value //= 2
    return _stepped(flag, name, steps)


def _stepped(flag: str, name: str, steps: list[int]) -> Iterator[Change]:
    for value in steps:
        yield f"{flag} {value}", _with_limit(name, value)


def _with_limit(name: str, value: int) -> Callable[[Choice], Choice]:
    def change(choice: Choice) -> Choice:
        limits = replace(choice.limits, **{name: value})
        chunk = min(limits.prefill_chunk, limits.max_context)
        return replace(choice, limits=replace(limits, prefill_chunk=chunk))

    return change


def _cache(choice: Choice) -> Iterator[Change]:
    for dtype, flag in _CACHE_FLAGS.items():
        if CACHE_BITS[dtype] < CACHE_BITS[choice.cache_dtype]:
            yield f"an export with --kv-cache {flag}", _replacing(cache_dtype=dtype)


def _stored(flag: str, name: str, kinds: list[str]) -> Iterator[Change]:
    for kind in kinds:
        yield f"an export with {flag} {kind}", _replacing(**{name: kind})


def _replacing(**changes: Any) -> Callable[[Choice], Choice]:
    def change(choice: Choice) -> Choice:
        return replace(choice, **changes)

    return change
