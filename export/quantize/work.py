"""The part of an export that turns weights into integers: what was asked for, checked early and carried out."""

from __future__ import annotations

import sys
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
from deepstitch.export.writer import COPIED_FILES
from deepstitch.manifest import Quantization, file_sha256
from deepstitch.models.checkpoint import Checkpoint, WeightSource

if TYPE_CHECKING:
    from deepstitch.export.exporter import ExportConfig
    from deepstitch.export.quantize.bit_search import BitSearch

__all__ = ["METHODS", "MIXED", "QuantizationConfig", "QuantizationWork", "quantization_work"]

_GENERATION_CONFIG = "generation_config.json"  # says how answers are sampled, which no calibration prompt is
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
            calibration set, else ``search``. Only the decoder is calibrated; see :meth:`method_for`.
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
        decoder = weights == MIXED or weights in INTEGER_BITS
        integers = decoder or vision_weights in INTEGER_BITS
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
        if integers and not decoder and (self.method == "gptq" or (self.calibration and not calibrated_cache)):
            raise ConfigError(
                f"--vision-weights {vision_weights}: the vision encoder is rounded from its weights alone, and "
                f"--weights {weights} leaves nothing to calibrate; leave out --calibration and --method gptq, or give "
                "--weights int8, int4 or mixed"
            )
        if weights == MIXED and (self.budget is None or self.calibration is None):
            raise InputError(
                "--weights mixed chooses bit widths by what they cost on your prompts: pass --calibration FILE and a "
                "--budget such as 9GB or 5.5bits"
            )
        if weights != MIXED and self.budget is not None:
            raise ConfigError("--budget is for --weights mixed")

    def method_for(self, weights: str, recipe: Recipe) -> str:
        """The method that carries out a recipe, where none was named too.

        Eight bits are not searched: a recipe of nothing else is ``rtn``. Under ``gptq``, what no prompt reaches on its
        way through the layers (the embedding table, the vision encoder) is rounded by ``search``.

        Args:
            weights: of the decoder.
            recipe: what becomes what.
        """
        calibrated = self.calibration is not None and (weights == MIXED or weights in INTEGER_BITS)
        method = self.method or ("gptq" if calibrated else "search")
        searched = any(stored.bits < max(INTEGER_BITS.values()) for stored in recipe.formats.values())
        return "rtn" if method == "search" and not searched else method

    def words(self, method: str) -> list[str]:
        """As on the command line, with the method that was used."""
        words = ["--block", str(self.block), "--method", method]
        words += [] if self.symmetric else ["--asymmetric"]
        words += ["--calibration", self.calibration.name] if self.calibration else []
        return words + (["--budget", self.budget] if self.budget else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationWork:
    """A recipe about to be carried out.

    Attributes:
        recipe: which parameter becomes what.
        store: where the integers are kept until the bundle has them.
        method: see :meth:`QuantizationConfig.method_for`.
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

        if self.progress:
            self._name_others()
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

    def _name_others(self) -> None:
        """Before new work takes its space: name what exports with other flags have left."""
        if self.store.folder.exists():
            return
        for folder, nbytes in self.store.others().items():
            tqdm.write(
                f"{folder}: an interrupted export with other flags left {nbytes / 1e6:,.1f} MB there; remove the "
                "folder if you do not want to resume that export",
                file=sys.stderr,
            )

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
        ConfigError: integers for a vision encoder that the model does not have.
        UnsupportedError: no block size fits a parameter.
        InputError: the calibration set or the budget cannot be used.
    """
    asked = config.quantization
    vision_bits = INTEGER_BITS.get(config.vision)
    if vision_bits is not None and checkpoint.config.vision is None:
        raise ConfigError(f"--vision-weights {config.vision}: this model has no vision encoder; leave the flag out")
    if config.weights not in (*INTEGER_BITS, MIXED) and vision_bits is None:
        return None
    calibration = CalibrationSet.open(asked.calibration, checkpoint) if asked.calibration is not None else None
    origin = {
        "deepstitch": deepstitch.__version__,
        "shards": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files],
        "files": {path.name: file_sha256(path) for path in _settings(checkpoint.folder)},
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
    method = asked.method_for(config.weights, recipe)
    work = identity({**origin, "method": method, "formats": formats})
    return QuantizationWork(
        recipe=recipe,
        store=QuantizedStore(config.output, work),
        method=method,
        checkpoint=checkpoint,
        sources=sources,
        calibration=calibration,
        search=search,
        progress=config.progress,
    )


def _settings(folder: Path) -> list[Path]:
    """Files that decide what the calibration prompts look like in the layers: config, tokenizer, template, pictures."""
    names = (name for name in COPIED_FILES if name != _GENERATION_CONFIG)
    return [path for name in names if (path := folder / name).is_file()]


def _recipe(
    config: ExportConfig, sources: Mapping[str, WeightSource], search: BitSearch | None, vision_bits: int | None
) -> Recipe:
    asked = config.quantization
    layout: Layout = {"vision_bits": vision_bits, "block": asked.block, "symmetric": asked.symmetric}
    if search is not None:
        return Recipe.by_group(sources, search.chosen.bits, **layout)
    return Recipe.uniform(sources, bits=INTEGER_BITS.get(config.weights), **layout)
