"""Optimization profiles: between which sizes of its inputs each engine has to work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepstitch.errors import InputError
from deepstitch.export.contract import DECODER, VISION_ENCODER
from deepstitch.export.tensorrt.plugin_nodes import Typed
from deepstitch.manifest import TensorSpec

__all__ = ["CORNERS", "Limits", "Profile", "profiles", "sizes_of"]

CORNERS = ("min", "opt", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest inputs the engines are built for.

    Attributes:
        images: pictures of one call of the vision encoder.
        image_patches: patches of one picture, before merging.
        max_context: tokens a row of the KV cache holds.
        batch: rows of the decoder.
        prefill_chunk: new tokens of a row in one call.
    """

    images: int = 1
    image_patches: int = 4096
    max_context: int = 4096
    batch: int = 1
    prefill_chunk: int = 512

    @property
    def patches(self) -> int:
        """Of one call of the vision encoder."""
        return self.images * self.image_patches

    def check(self, *, merge_size: int | None, context: int) -> None:
        """Refuse what the model cannot have.

        Args:
            merge_size: patches on a side that become one token; None for a model without vision.
            context: tokens the model allows.

        Raises:
            InputError: too long a context, or patches that cannot be merged.
        """
        if self.max_context > context:
            raise InputError(f"--max-context {self.max_context} is more than the {context} tokens the model allows")
        if self.prefill_chunk > self.max_context:
            raise InputError(
                f"--prefill-chunk {self.prefill_chunk} is more than --max-context {self.max_context}; a chunk must fit "
                "into the cache"
            )
        if merge_size is not None and self.image_patches % merge_size**2:
            raise InputError(
                f"--image-patches {self.image_patches}: {merge_size**2} patches become one token; give a multiple"
            )


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


def profiles(limits: Limits, merge_size: int | None) -> list[Profile]:
    """The profiles the engines get: one for the vision encoder, two for the decoder.

    The decoder gives the logits of one token per row. Its DeepStack rows are all visual tokens of a call of the vision
    encoder and the row of zeros. Capacity is that of the cache, which is allocated once; smaller ones are allowed.
    """
    found = []
    if merge_size is not None:
        found.append(Profile(name="vision", graph=VISION_ENCODER, corners=_vision(limits, merge_size)))
    rows = limits.patches // merge_size**2 + 1 if merge_size is not None else 1
    chunk = {"B": (1, 1, limits.batch), "S": (1, limits.prefill_chunk, limits.prefill_chunk), "R": (1, rows, rows)}
    token = {"B": (1, 1, limits.batch), "S": (1, 1, 1), "R": (1, 1, 1)}
    cache = {"L": (1, 1, 1), "C": (1, limits.max_context, limits.max_context)}
    for name, axes in (("prefill", chunk), ("decode", token)):
        corners = {
            corner: {axis: sizes[place] for axis, sizes in (axes | cache).items()}
            for place, corner in enumerate(CORNERS)
        }
        found.append(Profile(name=name, graph=DECODER, corners=corners))
    return found


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
