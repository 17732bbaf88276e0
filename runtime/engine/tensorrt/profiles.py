"""Which optimization profile takes inputs of given shapes, and what to say where none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from deepstitch.engine_manifest import EngineProfile
from deepstitch.errors import InputError
from deepstitch.manifest import TensorSpec

__all__ = ["Profiles"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Axis:
    """What an axis counts, the flag of 'deepstitch build' that allows more, and what helps without building."""

    what: str
    flag: str
    instead: str = ""


_AXES: Mapping[str, _Axis] = MappingProxyType(
    {
        "B": _Axis("rows", "--batch"),
        "C": _Axis("tokens of the KV cache", "--max-context"),
        "L": _Axis("tokens of a row whose logits are wanted", "--logits"),
        "N+1": _Axis("frames, and one more,", "--images", "pass a shorter clip, or "),
        "P": _Axis("patches", "--image-patches or --images", "pass a smaller picture or shorter clip, or "),
        "R": _Axis("rows of DeepStack, with that of zeros,", "--prefill-chunk"),
        "S": _Axis("new tokens of a row", "--prefill-chunk"),
    }
)


class Profiles:
    """The profiles of one engine, in the order of their numbers."""

    def __init__(self, graph: str, inputs: Sequence[TensorSpec], profiles: Sequence[EngineProfile]) -> None:
        self._graph = graph
        self._inputs = tuple(inputs)
        self._profiles = tuple(profiles)

    def __len__(self) -> int:
        return len(self._profiles)

    def largest(self, axis: str) -> int:
        """The largest size of a named axis in any profile."""
        found = [high for profile in self._profiles for name, _, high in self._ranges(profile) if name == axis]
        return max(found)

    def choose(self, shapes: Mapping[str, Shape]) -> int:
        """Number of the last profile that takes these inputs: later ones are for smaller calls.

        Raises:
            InputError: none does; the message names the flag of the builder to change.
        """
        refusals = [self._problems(profile, shapes) for profile in self._profiles]
        for number in reversed(range(len(refusals))):
            if not refusals[number]:
                return number
        # the profile that comes closest; of equals the first, which is for large calls
        raise InputError(min(refusals, key=len)[0])

    def _problems(self, profile: EngineProfile, shapes: Mapping[str, Shape]) -> list[str]:
        """By how many axes a profile does not fit, as text."""
        sizes: dict[str, int] = {}
        for spec in self._inputs:
            for axis, size in zip(spec.shape, shapes[spec.name], strict=True):
                if isinstance(axis, str):
                    sizes[axis] = size
        problems = {
            axis: self._refusal(axis, sizes[axis], low, high)
            for axis, low, high in self._ranges(profile)
            if not low <= sizes[axis] <= high
        }
        return list(problems.values())

    def _ranges(self, profile: EngineProfile) -> list[tuple[str, int, int]]:
        """Name, smallest and largest size of every dynamic axis of every input."""
        found = []
        for spec in self._inputs:
            low, _, high = profile.shapes[spec.name]
            for axis, least, most in zip(spec.shape, low, high, strict=True):
                if isinstance(axis, str):
                    found.append((axis, least, most))
        return found

    def _refusal(self, axis: str, size: int, low: int, high: int) -> str:
        known = _AXES[axis]
        if size < low:
            return f"{self._graph}: {size} {known.what} are fewer than the {low} the engine was built for"
        return (
            f"{self._graph}: {size} {known.what} are more than the {high} the engine was built for; "
            f"{known.instead}build the engines again with a larger {known.flag}"
        )
