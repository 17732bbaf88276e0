"""Which checkpoint tensor becomes which graph weight, in which layout and dtype: planned first, streamed afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deepstitch.errors import CheckpointError
from deepstitch.export.quantize.recipe import Recipe, matrix_shape
from deepstitch.export.quantize.store import QuantizedStore
from deepstitch.export.quantize.stored import Form, QuantizedTensor, QuantizedWeight
from deepstitch.models.checkpoint import WeightSource
from deepstitch.plugins.common.schema import DOMAIN as PLUGINS
from deepstitch.tensorfile import DTYPE_BYTES, TensorEntry

__all__ = ["AnyTensor", "PlannedTensor", "Relayout", "WeightPlan"]

_IR_DTYPE = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
_BLOCK_BYTES = 64 << 20  # float32 bytes converted at a time; bounds the memory of an export
_ROUTER = ".mlp.gate.weight"
_VISION = "model.visual."
_PACKED = ".words"


@dataclass(frozen=True, slots=True)
class Relayout:
    """Another order of a parameter's values: reshape to ``split``, transpose by ``perm``, reshape to ``merged``."""

    split: tuple[int, ...]
    perm: tuple[int, ...]
    merged: tuple[int, ...]

    @classmethod
    def transpose(cls, shape: tuple[int, ...]) -> Relayout:
        """Swap the last two axes."""
        perm = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
        return cls(shape, perm, tuple(shape[axis] for axis in perm))

    def apply(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Rearrange some rows of the first axis; all of them, unless the first axis stays first."""
        arranged = rows.reshape(-1, *self.split[1:]).transpose(self.perm)
        return np.ascontiguousarray(arranged).reshape(-1, *self.merged[1:])

    def emit(self, value: ir.Value, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """Write the same rearrangement as nodes, for weights that stay in the checkpoint's bytes."""
        if self.split != tuple(value.shape or ()):
            value = _reshape(value, self.split, graph, before)
        node = ir.node("Transpose", [value], {"perm": self.perm})
        graph.insert_before(before, node)
        value = node.outputs[0]
        arranged = tuple(self.split[axis] for axis in self.perm)
        return value if arranged == self.merged else _reshape(value, self.merged, graph, before)


def _reshape(value: ir.Value, shape: tuple[int, ...], graph: ir.Graph, before: ir.Node) -> ir.Value:
    constant = ir.node("Constant", [], {"value_ints": shape})
    node = ir.node("Reshape", [value, constant.outputs[0]])
    graph.insert_before(before, (constant, node))
    return node.outputs[0]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the bundle's weight file.

    Attributes:
        name: name in the file.
        source: where the values come from.
        dtype: safetensors dtype it is stored in.
        relayout: order of the values, None for the parameter's own.
    """

    name: str
    source: WeightSource
    dtype: str
    relayout: Relayout | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""
        return self.relayout.merged if self.relayout else self.source.shape

    @property
    def graph_dtype(self) -> ir.DataType:
        """What the graph declares it as."""
        return _IR_DTYPE[self.dtype]

    @property
    def graph_shape(self) -> tuple[int, ...]:
        """Likewise."""
        return self.shape

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def blocks(self) -> Iterator[npt.NDArray[np.float32 | np.float16]]:
        """The stored values in order, a bounded block at a time.

        Raises:
            CheckpointError: a value does not fit the stored dtype.
        """
        for block in self._float32_blocks():
            if self.dtype == "F32":
                yield block
                continue
            with np.errstate(over="ignore"):
                half = block.astype(np.float16)
            if not np.isfinite(half).all() and np.isfinite(block).all():
                raise CheckpointError(
                    f"tensor '{self.name}' reaches {np.abs(block).max():.4g}, more than fp16 holds; use --weights fp32"
                )
            yield half

    def _float32_blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        rows = self.source.shape[0]
        bytes_per_row = 4 * math.prod(self.source.shape[1:])
        step = max(1, _BLOCK_BYTES // max(bytes_per_row, 1))
        if self.relayout is None or self.relayout.perm[0] == 0:
            for start in range(0, rows, step):
                block = self.source.read_float32(start, start + step)
                yield self.relayout.apply(block) if self.relayout else block
            return
        # A transposed matrix: its rows are the columns of the source.
        columns = self.source.shape[1]
        step = max(1, _BLOCK_BYTES // (4 * rows))
        for start in range(0, columns, step):
            yield np.ascontiguousarray(self.source.read_columns_float32(start, start + step).T)


AnyTensor = PlannedTensor | QuantizedTensor


class WeightPlan:
    """Collects what the lowering passes decide about weights; the writer carries it out.

    Vectors and routers are stored as fp32 whatever was asked for: they are small, and a rounded router sends
    tokens to other experts.

    Attributes:
        tensors: what the graphs and the runtime read, in the order it was planned.
        by_reference: matrices stay in the checkpoint's files, and their layouts and casts become graph nodes.
    """

    def __init__(
        self,
        sources: Mapping[str, WeightSource],
        *,
        weights: str,
        by_reference: bool,
        tied: str | None,
        vision_weights: str | None = None,
        recipe: Recipe | None = None,
        store: QuantizedStore | None = None,
    ) -> None:
        """Start a plan.

        Args:
            sources: every model parameter.
            weights: ``"fp32"`` or ``"fp16"``, the dtype of matrices that are not in the recipe.
            by_reference: see the class.
            tied: name of the embedding that ``lm_head.weight`` shares, if it does.
            vision_weights: like ``weights``, for the vision encoder; None: the same.
            recipe: which parameters are stored as integers; None: none.
            store: where those are found when they are written.
        """
        self.tensors: dict[str, AnyTensor] = {}
        self.by_reference = by_reference
        self._sources = sources
        self._weights = weights
        self._vision_weights = vision_weights or weights
        self._tied = tied
        self._quantized = {
            name: QuantizedWeight(name=name, stored=stored, shape=matrix_shape(name, sources[name].shape), store=store)
            for name, stored in (recipe.formats.items() if recipe is not None else ())
            if store is not None
        }

    def parameter(self, name: str) -> str:
        """The parameter behind an initializer's name; a tied head is the embedding."""
        return self._tied if self._tied and name == "lm_head.weight" else name

    def is_parameter(self, value: ir.Value | None) -> bool:
        """Whether a graph value is a checkpoint weight."""
        return value is not None and value.is_initializer() and self.parameter(value.name or "") in self._sources

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """Shape of the parameter behind an initializer."""
        return self._sources[self.parameter(value.name or "")].shape

    def dtype(self, value: ir.Value) -> str:
        """Safetensors dtype that the floating-point parameter behind an initializer is, or would be, stored in."""
        name = self.parameter(value.name or "")
        return self._stored_dtype(name, self._sources[name])

    def may_move(self, value: ir.Value) -> bool:
        """Whether a weight's layout may change: not where something else reads the same bytes."""
        return self.parameter(value.name or "") != self._tied

    def quantized(self, value: ir.Value | None) -> QuantizedWeight | None:
        """The integers a weight of the graph is stored as, None for a floating-point one."""
        return self._quantized.get(self.parameter(value.name or "")) if value is not None else None

    def add_quantized(self, weight: QuantizedWeight, form: Form, graph: ir.Graph) -> list[ir.Value]:
        """Plan a quantized weight in some layout, replacing an earlier one; returns its initializers.

        A table that the head shares stays as the runtime reads it; words for a plugin are another tensor then.
        """
        values = []
        shared = f"{weight.name}{_PACKED}" if form == "plugin" and weight.name == self._tied else None
        if form == "plugin":
            self.tensors.pop(f"{weight.name}.zero_points", None)  # of the form it had; all are the middle
        for tensor in weight.tensors(form, packed_name=shared):
            self.tensors[tensor.name] = tensor
            value = graph.initializers.get(tensor.name)
            if value is None:
                value = ir.Value(name=tensor.name)
                graph.initializers[tensor.name] = value
            value.shape = ir.Shape(tensor.graph_shape)
            value.type = ir.TensorType(tensor.graph_dtype)
            values.append(value)
        return values

    def embedding(self, name: str) -> tuple[AnyTensor, QuantizedWeight | None]:
        """Plan the table that the runtime looks tokens up in."""
        weight = self._quantized.get(name)
        if weight is None:
            return self.add(name), None
        if name not in self.tensors:  # no head shares it
            self.tensors |= {tensor.name: tensor for tensor in weight.tensors("nbits")}
        return self.tensors[name], weight

    def relayout(self, value: ir.Value, relayout: Relayout, graph: ir.Graph, before: ir.Node) -> ir.Value:
        """Have a weight in another order: rewritten when streamed, or rearranged by nodes when referenced."""
        if self.is_referenced(value.name or ""):
            return relayout.emit(value, graph, before)
        self.add(value.name or "", relayout)
        value.shape = ir.Shape(relayout.merged)
        return value

    def add(self, name: str, relayout: Relayout | None = None) -> AnyTensor:
        """Plan one floating-point parameter; planning a parameter again changes nothing."""
        name = self.parameter(name)
        if name not in self.tensors:
            source = self._sources[name]
            self.tensors[name] = PlannedTensor(name, source, self._stored_dtype(name, source), relayout)
        return self.tensors[name]

    def is_referenced(self, name: str) -> bool:
        """Whether a parameter stays in the checkpoint's own bytes."""
        return self.by_reference and self._is_large(self.parameter(name))

    def _is_large(self, name: str) -> bool:
        return len(self._sources[name].shape) > 1 and not name.endswith(_ROUTER)

    def _stored_dtype(self, name: str, source: WeightSource) -> str:
        if self.is_referenced(name):
            return source.dtype
        weights = self._vision_weights if name.startswith(_VISION) else self._weights
        return "F16" if weights == "fp16" and self._is_large(name) else "F32"

    def bind(self, model: ir.Model) -> None:
        """Give every weight of a lowered graph its stored dtype, with a Cast to float32 where they differ.

        Two initializers for one parameter (a tied head) become one.
        """
        graph = model.graph
        for value in list(graph.initializers.values()):
            if not self.is_parameter(value):
                continue
            planned = self.add(value.name or "")
            if value.name != planned.name:
                value.name = planned.name
            value.shape = ir.Shape(planned.graph_shape)
            value.type = ir.TensorType(planned.graph_dtype)
            if planned.dtype in ("F16", "BF16"):
                _cast_to_float32(value, graph)

    def attach(self, model: ir.Model, places: Mapping[str, TensorEntry], location: Mapping[str, str]) -> None:
        """Point the initializers at their bytes.

        Args:
            model: a bound graph.
            places: for every planned tensor, where it was written.
            location: path of each of those files relative to the graph file, by file name.
        """
        for name, value in model.graph.initializers.items():
            if name not in self.tensors:
                continue
            entry, tensor = places[name], self.tensors[name]
            value.const_value = ir.ExternalTensor(
                location[entry.path.name],
                entry.offset,
                entry.nbytes,
                tensor.graph_dtype,
                shape=ir.Shape(tensor.graph_shape),
                name=name,
                base_dir=entry.path.parent,
            )


def _cast_to_float32(value: ir.Value, graph: ir.Graph) -> None:
    users = []
    for node, index in list(value.uses()):
        if node.domain == "" and node.op_type == "Cast" and node.attributes.get_int("to") == value.dtype:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)  # wanted as it is stored
            graph.remove(node, safe=True)
        elif node.domain != PLUGINS:  # those take it as it is stored
            users.append((node, index))
    if not users:
        return
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}/Cast")
    cast.outputs[0].name = f"{value.name}.float32"
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    cast.outputs[0].shape = value.shape
    graph.insert_before(next(iter(graph)), cast)
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])
