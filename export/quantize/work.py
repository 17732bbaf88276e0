"""The part of an export that turns weights into integers: what was asked for, checked early and carried out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tqdm.auto import tqdm

import deepstitch
from deepstitch.errors import ConfigError, InputError, UnsupportedError, did_you_mean
from deepstitch.export.quantize.calibration import CalibrationSet
from deepstitch.export.quantize.recipe import BLOCKS, INTEGER_BITS, Recipe
from deepstitch.export.quantize.store import QuantizedStore, identity
from deepstitch.manifest import Quantization
from deepstitch.models.checkpoint import Checkpoint, WeightSource

if TYPE_CHECKING:
    from deepstitch.export.exporter import ExportConfig
    from deepstitch.export.quantize.bit_search import BitSearch

__all__ = ["METHODS", "MIXED", "QuantizationConfig", "QuantizationWork", "quantization_work"]

MIXED = "mixed"
METHODS = ("rtn", "search", "gptq")


class Layout(TypedDict):
    """What all integers have in common."""

    vision_bits: int | None
    block: int
    symmetric: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """How integers are chosen.

    Attributes:
        block: weights per scale, one of 32, 64, 128. A parameter whose input width it does not divide takes the
            largest smaller block that does.
        symmetric: no zero points.
        method: ``rtn`` (round to nearest), ``search`` (scale of least squared error) or ``gptq``; None: ``gptq`` with a
            calibration set, else ``search``.
        calibration: JSON Lines file of conversations, see
            :class:`deepstitch.export.quantize.calibration.CalibrationSet`.
        budget: for ``mixed``, what the integer weights may take: bytes (``"9GB"``, ``"700MB"``) or an average
            (``"5.5bits"``).
    """

    block: int = 32
    symmetric: bool = True
    method: str | None = None
    calibration: Path | None = None
    budget: str | None = None

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise UnsupportedError(f"--block {self.block}: must be one of {', '.join(map(str, BLOCKS))}")
        if self.method is not None and self.method not in METHODS:
            hint = did_you_mean(self.method, METHODS)
            raise UnsupportedError(f"--method {self.method}: must be one of {', '.join(METHODS)}{hint}")
        if self.method == "gptq" and self.calibration is None:
            raise InputError("--method gptq looks at the model's inputs: pass conversations with --calibration FILE")

    def check(self, weights: str, vision_weights: str, *, calibrated_cache: bool = False) -> None:
        """Refuse flags that say nothing for these weights.

        Args:
            weights: of the decoder.
            vision_weights: of the vision encoder.
            calibrated_cache: the KV cache needs the calibration set, whatever the weights do.

        Raises:
            ConfigError: calibration or budget without integers.
            InputError: ``mixed`` without calibration or budget.
        """
        integers = weights == MIXED or weights in INTEGER_BITS or vision_weights in INTEGER_BITS
        if calibrated_cache and self.calibration is None:
            raise InputError(
                "--kv-cache int8 and int4 take their scales from what your prompts put into the cache: pass "
                "conversations with --calibration FILE"
            )
        searches = self.method in ("rtn", "search") and self.budget is None
        if searches and self.calibration is not None and not calibrated_cache:
            raise ConfigError(f"--method {self.method} takes no --calibration; leave one of the two out")
        if not integers and self != QuantizationConfig(calibration=self.calibration if calibrated_cache else None):
            raise ConfigError(
                f"--weights {weights}: --block, --asymmetric, --method, --calibration and --budget are for int8, int4 "
                "and mixed"
            )
        if weights == MIXED and (self.budget is None or self.calibration is None):
            raise InputError(
                "--weights mixed chooses bit widths by what they cost on your prompts: pass --calibration FILE and a "
                "--budget such as 9GB or 5.5bits"
            )
        if weights != MIXED and self.budget is not None:
            raise ConfigError("--budget is for --weights mixed")

    @property
    def chosen_method(self) -> str:
        """The method, where none was named too."""
        return self.method or ("gptq" if self.calibration is not None else "search")

    def words(self) -> list[str]:
        """As on the command line."""
        words = ["--block", str(self.block), "--method", self.chosen_method]
        words += [] if self.symmetric else ["--asymmetric"]
        words += ["--calibration", self.calibration.name] if self.calibration else []
        return words + (["--budget", self.budget] if self.budget else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationWork:
    """A recipe about to be carried out.

    Attributes:
        recipe: which parameter becomes what.
        store: where the integers are kept until the bundle has them.
        search: how ``mixed`` chose, else None.
    """

    recipe: Recipe
    store: QuantizedStore
    method: str
    checkpoint: Checkpoint
    sources: Mapping[str, WeightSource]
    calibration: CalibrationSet | None
    search: BitSearch | None
    progress: bool

    def run(self) -> None:
        """Quantize everything that an interrupted run has not finished."""
        from deepstitch.export.quantize.quantizer import Quantizer
        from deepstitch.export.quantize.walk import LayerWalk

        walk = None
        if self.method == "gptq" and self.calibration is not None:
            walk = LayerWalk(self.checkpoint.config, self.sources, self.calibration.prompts)
        quantizer = Quantizer(self.sources, self.recipe, self.method, self.store, walk)
        with tqdm(
            total=quantizer.total_bytes,
            initial=quantizer.finished_bytes,
            desc=f"quantize ({self.method})",
            unit="B",
            unit_scale=True,
            disable=None if self.progress else True,
        ) as bar:
            quantizer.run(bar.update)

    def facts(self) -> Quantization:
        """For the manifest."""
        looked = self.method == "gptq" or self.search is not None  # else it was for the scales of the KV cache
        return Quantization(
            method=self.method,
            calibration_tokens=self.calibration.tokens if self.calibration is not None and looked else 0,
            bits_per_weight=round(self.recipe.bits_per_weight(self.sources), 3),
            formats={name: str(stored) for name, stored in self.recipe.formats.items()},
        )


def quantization_work(
    config: ExportConfig, checkpoint: Checkpoint, sources: Mapping[str, WeightSource]
) -> QuantizationWork | None:
    """Decide the format of every parameter; None where no integers were asked for.

    Raises:
        UnsupportedError: no block size fits a parameter.
        InputError: the calibration set or the budget cannot be used.
    """
    asked = config.quantization
    vision_bits = INTEGER_BITS.get(config.vision) if checkpoint.config.vision is not None else None
    if config.weights not in (*INTEGER_BITS, MIXED) and vision_bits is None:
        return None
    calibration = CalibrationSet.open(asked.calibration, checkpoint) if asked.calibration is not None else None
    origin = {
        "deepstitch": deepstitch.__version__,
        "shards": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files],
        "layout": config.expert_layout,
        "calibration": calibration.digest if calibration is not None else None,
    }
    search = None
    if config.weights == MIXED:
        assert calibration is not None and asked.budget is not None  # QuantizationConfig.check
        from deepstitch.export.quantize.bit_search import search_bits

        search = search_bits(asked, checkpoint, sources, calibration, origin, progress=config.progress)
    recipe = _recipe(config, sources, search, vision_bits)
    formats = {name: str(stored) for name, stored in recipe.formats.items()}
    work = identity({**origin, "method": asked.chosen_method, "formats": formats})
    return QuantizationWork(
        recipe=recipe,
        store=QuantizedStore(config.output, work),
        method=asked.chosen_method,
        checkpoint=checkpoint,
        sources=sources,
        calibration=calibration,
        search=search,
        progress=config.progress,
    )


def _recipe(
    config: ExportConfig, sources: Mapping[str, WeightSource], search: BitSearch | None, vision_bits: int | None
) -> Recipe:
    asked = config.quantization
    layout: Layout = {"vision_bits": vision_bits, "block": asked.block, "symmetric": asked.symmetric}
    if search is not None:
        return Recipe.by_group(sources, search.chosen.bits, **layout)
    return Recipe.uniform(sources, bits=INTEGER_BITS.get(config.weights), **layout)
