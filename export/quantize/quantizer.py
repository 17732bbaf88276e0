"""Quantizes a checkpoint unit by unit: layer after layer, and inside a layer expert after expert."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from deepstitch.export.quantize.gptq import InputStatistics, gptq
from deepstitch.export.quantize.recipe import Recipe, is_expert, matrix_shape
from deepstitch.export.quantize.rounding import Quantized, round_to_nearest
from deepstitch.export.quantize.store import QuantizedStore
from deepstitch.export.quantize.walk import LayerWalk, QuantizedStack, StackedExperts
from deepstitch.models import ops
from deepstitch.models.checkpoint import WeightSource
from deepstitch.models.moe import Qwen3MoeSparseMoeBlock

__all__ = ["Quantizer"]

_UNIT = re.compile(r"^(.*\.(?:layers|blocks|deepstack_merger_list)\.\d+)\.")
_PIECE = 1 << 26  # float32 bytes of a matrix read at a time
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

    def add_experts(self, name: str, stack: QuantizedStack) -> None:
        self.arrays |= {name + suffix: array for suffix, array in stack.arrays.items()}


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
        head = "lm_head.weight" in self._units and not self._store.has_unit("lm_head.weight")
        if self._walk is not None and (head or not all(self._store.has_unit(unit) for unit in walked)):
            self._run_walk(self._walk, list(walked), progress)
        if head:
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
                unit.add_experts(name, self._round_experts(name, progress))
                continue
            arrays = []
            for part in _in_threads(partial(self._round_rows, name), self._row_ranges(name)):
                arrays.append(part.arrays())
                progress(4 * part.numbers.numel())
            unit.arrays |= {name + key: np.concatenate([each[key] for each in arrays]) for key in arrays[0]}
        return unit.arrays

    def _round(self, name: str, weight: Tensor) -> Quantized:
        return round_to_nearest(weight, self._recipe.formats[name], search=self._method != "rtn")

    def _round_experts(self, name: str, progress: Progress) -> QuantizedStack:
        source = self._sources[name]
        stack = QuantizedStack(self._recipe.formats[name], matrix_shape(name, source.shape))

        def rounded(expert: int) -> int:
            weight = source.read_float32(expert, expert + 1)[0].T
            stack.put(expert, self._round(name, torch.from_numpy(np.ascontiguousarray(weight))))
            return 4 * weight.size

        for done in _in_threads(rounded, range(len(stack))):
            progress(done)
        return stack

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
        statistics = InputStatistics(self._sources["lm_head.weight"].shape[1])
        for hidden in self._walk.final_hidden():
            statistics.add(hidden)
        parts = []
        for rows in self._row_ranges("lm_head.weight"):
            part = self._read_rows("lm_head.weight", rows)
            parts.append(gptq(part, self._recipe.formats["lm_head.weight"], statistics).arrays())
            progress(4 * part.numel())
        return {"lm_head.weight" + key: np.concatenate([each[key] for each in parts]) for key in parts[0]}

    def _run_walk(self, walk: LayerWalk, units: Sequence[str], progress: Progress) -> None:
        """Quantize the layers in turn, and leave the walk behind the last one.

        The state in front of layer ``k + 1`` is on disk before layer ``k`` counts as finished, under a name of its
        own, and the one in front of layer ``k`` goes afterwards: stopped anywhere, the state in front of the first
        unfinished layer is there. Where it is not, because somebody removed it, the walk begins again.
        """
        first = next((index for index, unit in enumerate(units) if not self._store.has_unit(unit)), len(units))
        if first and self._store.state(first).is_file():
            walk.load(self._store.state(first))
        else:
            first = 0
            walk.start()
        for index, unit in list(enumerate(units))[first:]:
            with walk.layer(index) as layer:
                shapes = {name: self._sources[name].shape for name in self._units[unit]}
                arrays = _LayerQuantizer(self._recipe, shapes, walk, layer, f"{unit}.", progress).run()
                walk.advance(index, walk.outputs(layer))
            self._store.add_state(index + 1, walk.save)
            self._store.add_unit(unit, arrays)
            self._store.remove_states(but=index + 1)


class _LayerQuantizer:
    """One decoder layer with GPTQ: each weight sees inputs that come through the quantized ones before it."""

    def __init__(
        self,
        recipe: Recipe,
        shapes: Mapping[str, tuple[int, ...]],
        walk: LayerWalk,
        layer: nn.Module,
        prefix: str,
        progress: Progress,
    ) -> None:
        self._formats = recipe.formats
        self._shapes = shapes
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
        first, second = (self._stack(name) for name in names)

        def quantize(expert: int) -> int:
            routed = tokens[(chosen == expert).any(-1)]
            gate_up = _gptq(source.gate_up_proj[expert].T.contiguous(), self._formats[names[0]], routed)
            first.put(expert, gate_up)
            activated = ops.swiglu(routed @ gate_up.dequantized().T)
            down = _gptq(source.down_proj[expert].T.contiguous(), self._formats[names[1]], activated)
            second.put(expert, down)
            return 4 * (gate_up.numbers.numel() + down.numbers.numel())

        for done in _in_threads(quantize, range(len(first))):
            self._unit.progress(done)
        for name, stack in zip(names, (first, second), strict=True):
            self._unit.add_experts(name, stack)
        mlp.experts = StackedExperts(first, second)  # type: ignore[assignment]

    def _stack(self, name: str) -> QuantizedStack:
        """Room for all experts; packed one by one, they are the only part of the layer that is held whole."""
        return QuantizedStack(self._formats[name], matrix_shape(name, self._shapes[name]))


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
