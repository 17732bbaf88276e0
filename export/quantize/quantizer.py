"""Quantizes a checkpoint unit by unit: layer after layer, and inside a layer expert after expert."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from deepstitch.export.quantize.gptq import InputStatistics, gptq
from deepstitch.export.quantize.recipe import Recipe, is_expert
from deepstitch.export.quantize.rounding import Quantized, round_to_nearest
from deepstitch.export.quantize.store import QuantizedStore
from deepstitch.export.quantize.walk import LayerWalk, QuantizedStack, StackedExperts
from deepstitch.models import ops
from deepstitch.models.checkpoint import WeightSource
from deepstitch.models.moe import Qwen3MoeSparseMoeBlock

__all__ = ["Quantizer"]

_UNIT = re.compile(r"^(.*\.(?:layers|blocks|deepstack_merger_list)\.\d+)\.")
_PIECE = 1 << 26  # float32 bytes of a matrix read at a time
_STATE = "hidden.state"
Progress = Callable[[int], object]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True)
class _Unit:
    """Arrays of the unit being made, by tensor name."""

    arrays: dict[str, Any]
    progress: Progress

    def add(self, name: str, result: Quantized) -> None:
        self.arrays |= {name + suffix: array for suffix, array in result.arrays().items()}
        self.progress(4 * result.numbers.numel())

    def add_experts(self, name: str, results: Iterable[Quantized]) -> None:
        stacks: dict[str, list[Any]] = {}
        for result in results:
            for suffix, array in result.arrays().items():
                stacks.setdefault(suffix, []).append(array)
            self.progress(4 * result.numbers.numel())
        self.arrays |= {name + suffix: np.stack(parts) for suffix, parts in stacks.items()}


class Quantizer:
    """Carries out a recipe; what was finished before an interruption is not done again."""

    def __init__(
        self,
        sources: Mapping[str, WeightSource],
        recipe: Recipe,
        method: str,
        store: QuantizedStore,
        walk: LayerWalk | None,
    ) -> None:
        """Prepare.

        Args:
            sources: every parameter.
            recipe: which of them to quantize, and how.
            method: ``rtn``, ``search`` or ``gptq``; ``gptq`` needs ``walk``.
            store: where results go.
            walk: calibration prompts, None for a method without.
        """
        self._sources = sources
        self._recipe = recipe
        self._method = method
        self._store = store
        self._walk = walk
        self._units: dict[str, list[str]] = {}
        for name in recipe.formats:
            found = _UNIT.match(name)
            self._units.setdefault(found[1] if found else name, []).append(name)

    @property
    def total_bytes(self) -> int:
        """Float32 bytes of all parameters of the recipe: what :meth:`run` reports progress of."""
        return sum(self._bytes(unit) for unit in self._units)

    @property
    def finished_bytes(self) -> int:
        """Those of the units that are finished."""
        return sum(self._bytes(unit) for unit in self._units if self._store.has_unit(unit))

    def run(self, progress: Progress) -> None:
        """Quantize every unit that is not finished.

        Args:
            progress: called with the number of float32 bytes just quantized.
        """
        walked = self._walk_units() if self._walk is not None else {}
        for unit, names in self._units.items():
            if unit not in walked and unit != "lm_head.weight" and not self._store.has_unit(unit):
                self._store.add_unit(unit, self._directly(names, progress))
        if self._walk is not None and not all(self._store.has_unit(unit) for unit in walked):
            self._run_walk(self._walk, walked, progress)
        if "lm_head.weight" in self._units and not self._store.has_unit("lm_head.weight"):
            self._store.add_unit("lm_head.weight", self._head(progress))

    def _bytes(self, unit: str) -> int:
        return sum(4 * math.prod(self._sources[name].shape) for name in self._units[unit])

    def _walk_units(self) -> dict[str, int]:
        assert self._walk is not None
        units = {self._walk.layer_prefix(index).rstrip("."): index for index in range(self._walk.num_layers)}
        return {unit: index for unit, index in units.items() if unit in self._units}

    def _directly(self, names: Iterable[str], progress: Progress) -> dict[str, Any]:
        """Quantize parameters one by one, from their weights alone."""
        unit = _Unit({}, progress)
        for name in names:
            if is_expert(name):
                results = _in_threads(partial(self._round_expert, name), range(self._sources[name].shape[0]))
                unit.add_experts(name, results)
                continue
            arrays = []
            for part in _in_threads(partial(self._round_rows, name), self._row_ranges(name)):
                arrays.append(part.arrays())
                progress(4 * part.numbers.numel())
            unit.arrays |= {name + key: np.concatenate([each[key] for each in arrays]) for key in arrays[0]}
        return unit.arrays

    def _round(self, name: str, weight: Tensor) -> Quantized:
        return round_to_nearest(weight, self._recipe.formats[name], search=self._method != "rtn")

    def _round_expert(self, name: str, expert: int) -> Quantized:
        weight = self._sources[name].read_float32(expert, expert + 1)[0].T
        return self._round(name, torch.from_numpy(np.ascontiguousarray(weight)))

    def _round_rows(self, name: str, rows: range) -> Quantized:
        return self._round(name, self._read_rows(name, rows))

    def _read_rows(self, name: str, rows: range) -> Tensor:
        return torch.from_numpy(self._sources[name].read_float32(rows.start, rows.stop))

    def _row_ranges(self, name: str) -> list[range]:
        """The rows of a matrix, so many at a time that memory stays bounded."""
        shape = self._sources[name].shape
        step = max(1, _PIECE // (4 * math.prod(shape[1:])))
        return [range(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]

    def _head(self, progress: Progress) -> dict[str, Any]:
        if self._walk is None or self._method != "gptq":
            return self._directly(["lm_head.weight"], progress)
        if not self._walk.hidden:
            self._walk.load(self._state)
        statistics = InputStatistics(self._sources["lm_head.weight"].shape[1])
        for hidden in self._walk.final_hidden():
            statistics.add(hidden)
        parts = []
        for rows in self._row_ranges("lm_head.weight"):
            part = self._read_rows("lm_head.weight", rows)
            parts.append(gptq(part, self._recipe.formats["lm_head.weight"], statistics).arrays())
            progress(4 * part.numel())
        return {"lm_head.weight" + key: np.concatenate([each[key] for each in parts]) for key in parts[0]}

    @property
    def _state(self) -> Any:
        return self._store.folder / _STATE

    def _run_walk(self, walk: LayerWalk, units: Mapping[str, int], progress: Progress) -> None:
        finished = [index for unit, index in units.items() if self._store.has_unit(unit)]
        first = max(finished, default=-1) + 1
        if first:
            walk.load(self._state)
        else:
            walk.start()
        for unit, index in list(units.items())[first:]:
            with walk.layer(index) as layer:
                arrays = _LayerQuantizer(self._recipe, walk, layer, f"{unit}.", progress).run()
                walk.advance(index, walk.outputs(layer))
            self._store.folder.mkdir(parents=True, exist_ok=True)
            temporary = self._state.with_suffix(".partial")
            walk.save(temporary)
            self._store.add_unit(unit, arrays)
            temporary.replace(self._state)


class _LayerQuantizer:
    """One decoder layer with GPTQ: each weight sees inputs that come through the quantized ones before it."""

    def __init__(self, recipe: Recipe, walk: LayerWalk, layer: nn.Module, prefix: str, progress: Progress) -> None:
        self._formats = recipe.formats
        self._walk = walk
        self._layer = layer
        self._prefix = prefix
        self._unit = _Unit({}, progress)

    def run(self) -> dict[str, Any]:
        """Quantize; the layer is left with the quantized weights."""
        attention: Any = self._layer.self_attn
        self._linears("self_attn.", ("q_proj", "k_proj", "v_proj"), attention)
        self._linears("self_attn.", ("o_proj",), attention)
        mlp: Any = self._layer.mlp
        if isinstance(mlp, Qwen3MoeSparseMoeBlock):
            self._experts(mlp)
        else:
            self._linears("mlp.", ("gate_proj", "up_proj"), mlp)
            self._linears("mlp.", ("down_proj",), mlp)
        return self._unit.arrays

    def _linears(self, stem: str, names: tuple[str, ...], module: Any) -> None:
        """Linears that read the same input."""
        wanted = [name for name in names if f"{self._prefix}{stem}{name}.weight" in self._formats]
        if not wanted:
            return
        first = getattr(module, wanted[0])
        statistics = InputStatistics(first.in_features)
        for inputs in self._walk.inputs_of(first, self._layer):
            statistics.add(inputs)
        for name in wanted:
            parameter = f"{self._prefix}{stem}{name}.weight"
            weight = getattr(module, name).weight
            result = gptq(weight.detach(), self._formats[parameter], statistics)
            with torch.no_grad():
                weight.copy_(result.dequantized())
            self._unit.add(parameter, result)

    def _experts(self, mlp: Qwen3MoeSparseMoeBlock) -> None:
        names = [f"{self._prefix}mlp.experts.{part}_proj" for part in ("gate_up", "down")]
        if names[0] not in self._formats:
            return
        tokens = torch.cat([x.flatten(0, -2) for x in self._walk.inputs_of(mlp, self._layer)])
        with torch.no_grad():
            _, chosen = ops.select_experts(mlp.gate(tokens), mlp.top_k, mlp.norm_topk_prob)
        source: Any = mlp.experts
        first: list[Quantized] = []
        second: list[Quantized] = []

        def quantize(expert: int) -> tuple[Quantized, Quantized]:
            routed = tokens[(chosen == expert).any(-1)]
            gate_up = _gptq(source.gate_up_proj[expert].T.contiguous(), self._formats[names[0]], routed)
            activated = ops.swiglu(routed @ gate_up.dequantized().T)
            return gate_up, _gptq(source.down_proj[expert].T.contiguous(), self._formats[names[1]], activated)

        for gate_up, down in _in_threads(quantize, range(len(source.gate_up_proj))):
            self._unit.progress(4 * (gate_up.numbers.numel() + down.numbers.numel()))
            first.append(gate_up)
            second.append(down)
        stacked = _Unit({}, lambda _: None)
        for name, results in zip(names, (first, second), strict=True):
            stacked.add_experts(name, results)
        self._unit.arrays |= stacked.arrays
        mlp.experts = StackedExperts(QuantizedStack(first), QuantizedStack(second))  # type: ignore[assignment]


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply ``function`` to every item, in order, with one single-threaded worker per core.

    The matrices are small: handing whole ones to threads costs less than splitting every operation.
    """
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _gptq(weight: Tensor, stored: Any, inputs: Tensor) -> Quantized:
    statistics = InputStatistics(weight.shape[1])
    if len(inputs):
        statistics.add(inputs)
    return gptq(weight, stored, statistics)
