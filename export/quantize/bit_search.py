"""``--weights mixed``: measure what fewer bits cost each part, then choose under the budget."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from deepstitch.errors import MissingDependency
from deepstitch.export.quantize.allocation import Allocation, Sizes, allocate, frontier, parse_budget
from deepstitch.export.quantize.calibration import CalibrationSet
from deepstitch.export.quantize.recipe import INTEGER_BITS, Group, Recipe, decoder_groups, matrix_shape
from deepstitch.export.quantize.sensitivity import Sensitivity, cache_file, load_or_measure, measure
from deepstitch.export.quantize.store import identity
from deepstitch.export.quantize.walk import LayerWalk
from deepstitch.export.quantize.work import QuantizationConfig
from deepstitch.models.checkpoint import Checkpoint, WeightSource

__all__ = ["BitSearch", "search_bits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BitSearch:
    """What was measured, what was possible, and what was chosen.

    Attributes:
        damages: by group and bits, see :mod:`deepstitch.export.quantize.sensitivity`.
        sizes: bytes by group and bits.
        budget: bytes.
        chosen: the least damage within the budget.
        frontier: the same for budgets from the smallest possible to the largest.
    """

    damages: Sensitivity
    sizes: Sizes
    budget: int
    chosen: Allocation
    frontier: tuple[Allocation, ...]

    def to_dict(self) -> dict[str, Any]:
        """For the bundle's quantization.json."""
        return {
            "budget_bytes": self.budget,
            "bytes": self.chosen.nbytes,
            "damage": self.chosen.damage,
            "groups": [
                {
                    "name": group,
                    "bits": self.chosen.bits[group],
                    "bytes": self.sizes[group][self.chosen.bits[group]],
                    "damage": {str(bits): damage for bits, damage in by_bits.items()},
                }
                for group, by_bits in self.damages.items()
            ],
            "frontier": [{"bytes": each.nbytes, "damage": each.damage} for each in self.frontier],
        }


def search_bits(
    asked: QuantizationConfig,
    checkpoint: Checkpoint,
    sources: Mapping[str, WeightSource],
    calibration: CalibrationSet,
    origin: Mapping[str, Any],
    *,
    progress: bool,
) -> BitSearch:
    """Choose the bits of every group of the decoder.

    Args:
        asked: block size, symmetry and budget.
        checkpoint: the model.
        sources: every parameter.
        calibration: prompts to measure on.
        origin: identity of checkpoint and calibration set, for the cached measurement.
        progress: show a bar on stderr.

    Raises:
        InputError: the budget cannot be met; nothing was measured.
        MissingDependency: scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise MissingDependency("scipy", "export", "--weights mixed")
    groups = decoder_groups(sources)
    recipes = {
        bits: Recipe.uniform(sources, bits=bits, vision_bits=None, block=asked.block, symmetric=asked.symmetric)
        for bits in sorted(INTEGER_BITS.values())
    }
    sizes = {
        group.name: {bits: _nbytes(group, recipe, sources) for bits, recipe in recipes.items()} for group in groups
    }
    weights = sum(math.prod(sources[name].shape) for group in groups for name in group.parameters)
    budget = parse_budget(str(asked.budget), sizes, weights)

    def take() -> Sensitivity:
        walk = LayerWalk(checkpoint.config, sources, calibration.prompts)
        formats = {bits: recipe.formats for bits, recipe in recipes.items()}
        disable = None if progress else True
        with tqdm(total=len(groups), desc="measure sensitivity", unit="group", disable=disable) as bar:
            return measure(walk, sources, groups, formats, bar.update)

    work = identity({**origin, "block": asked.block, "symmetric": asked.symmetric, "bits": list(recipes)})
    damages = load_or_measure(cache_file(work), sizes, take)
    return BitSearch(
        damages=damages,
        sizes=sizes,
        budget=budget,
        chosen=allocate(damages, sizes, budget),
        frontier=tuple(frontier(damages, sizes)),
    )


def _nbytes(group: Group, recipe: Recipe, sources: Mapping[str, WeightSource]) -> int:
    return sum(recipe.formats[name].nbytes(matrix_shape(name, sources[name].shape)) for name in group.parameters)
