"""Optimization profiles: between which sizes of its inputs each engine has to work."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from deepstitch.engine_manifest import Limits
from deepstitch.errors import InputError
from deepstitch.export.contract import DECODER, VISION_ENCODER
from deepstitch.export.tensorrt.plugin_nodes import Typed
from deepstitch.manifest import TensorSpec

__all__ = ["CORNERS", "Limits", "Profile", "profiles", "sizes_of"]

CORNERS = ("min", "opt", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Sizes of the named axes of one graph.

    Attributes:
        name: ``vision``, ``prefill`` or ``decode``.
        graph: whose.
        corners: sizes by axis name, for each of :data:`CORNERS`.
    """

    name: str
    graph: str
    corners: Mapping[str, Mapping[str, int]]


def profiles(
    limits: Limits, merge_size: int | None, graphs: Container[str] = (VISION_ENCODER, DECODER)
) -> list[Profile]:
    """The profiles the engines get: one for the vision encoder, two for the decoder; half a bundle has some of them.

    The decoder's DeepStack rows are those of its call's own tokens, which may all be visual ones of any number of
    pictures, and the row of zeros. Capacity is that of the cache, which is allocated once; smaller ones are allowed.
    """
    found = []
    if merge_size is not None:
        found.append(Profile(name="vision", graph=VISION_ENCODER, corners=_vision(limits, merge_size)))
    tokens = limits.prefill_chunk
    visual = (1, tokens + 1, limits.batch * tokens + 1) if merge_size is not None else (1, 1, 1)
    chunk = {"B": (1, 1, limits.batch), "S": (1, tokens, tokens), "R": visual}
    token = {"B": (1, 1, limits.batch), "S": (1, 1, 1), "R": (1, 1, 1)}
    cache = {"C": (1, limits.max_context, limits.max_context)}
    for name, axes, logits in (("prefill", chunk, limits.logits), ("decode", token, 1)):
        sizes_by_axis = axes | cache | {"L": (1, 1, logits)}
        corners = {
            corner: {axis: sizes[place] for axis, sizes in sizes_by_axis.items()}
            for place, corner in enumerate(CORNERS)
        }
        found.append(Profile(name=name, graph=DECODER, corners=corners))
    return [each for each in found if each.graph in graphs]


def _vision(limits: Limits, merge_size: int) -> dict[str, dict[str, int]]:
    unit = merge_size**2
    sizes = {
        "min": (unit, 1),
        "opt": (limits.image_patches, 1),
        "max": (limits.patches, limits.patches // unit),  # frames of a video are segments too, as small as a token
    }
    return {
        corner: {"P": patches, "N+1": segments + 1, "T": patches // unit}
        for corner, (patches, segments) in sizes.items()
    }


def sizes_of(specs: tuple[TensorSpec, ...], axes: Mapping[str, int]) -> dict[str, Typed]:
    """Types and sizes of graph inputs or outputs.

    Args:
        specs: as in the manifest.
        axes: sizes by axis name.

    Raises:
        InputError: an axis that no profile knows.
    """
    unknown = {axis for spec in specs for axis in spec.shape if isinstance(axis, str) and axis not in axes}
    if unknown:
        raise InputError(f"the graph has an axis {', '.join(sorted(unknown))}; the profiles know {', '.join(axes)}")
    return {
        spec.name: Typed(spec.dtype, tuple(axes[axis] if isinstance(axis, str) else axis for axis in spec.shape))
        for spec in specs
    }
