"""Nodes of our own domain: held against the operators' schemas, and their output shapes worked out from them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from deepstitch.errors import did_you_mean
from deepstitch.plugins.common.schema import DOMAIN, OpSchema, PluginError, TensorSpec
from deepstitch.plugins.registry import OPS

__all__ = ["PluginNode", "ShapeProblem", "Typed", "address_problems", "schema_of"]

# Attributes by which TensorRT finds the plugin; they are not given to it.
_ADDRESS = ("plugin_version", "plugin_namespace")
_KINDS = {
    "int": onnx.AttributeProto.INT,
    "float": onnx.AttributeProto.FLOAT,
    "string": onnx.AttributeProto.STRING,
    "ints": onnx.AttributeProto.INTS,
}
# Letters in the schemas' shapes that are the value of an attribute.
_LETTERS: Mapping[str, Mapping[str, str]] = {
    "MoEExperts": {"E": "num_experts", "I": "intermediate_size"},
    "QuantizedLinear": {"N": "out_features"},
    "SparseAttention": {"D": "head_dim"},
}


class ShapeProblem(Exception):
    """A node cannot have inputs of these shapes, or the shape of its output is not known before it runs."""


@dataclass(frozen=True, slots=True)
class Typed:
    """Type and sizes of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def schema_of(op_type: str) -> OpSchema:
    """The declaration of an operator of ours.

    Raises:
        PluginError: there is none of this name.
    """
    for folder, name in OPS.items():
        if name == op_type:
            schema: OpSchema = importlib.import_module(f"deepstitch.plugins.{folder}.schema").SCHEMA
            return schema
    raise PluginError(f"there is no plugin {op_type}{did_you_mean(op_type, OPS.values())}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginNode:
    """A node with its schema.

    Attributes:
        schema: of its operator.
        attributes: resolved, those of the address left out.
        inputs: tensors the attributes call for.
        outputs: likewise.
    """

    schema: OpSchema
    attributes: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, node: onnx.NodeProto) -> PluginNode:
        """Read a node.

        Raises:
            PluginError: no such operator, or it refuses the attributes.
        """
        schema = schema_of(node.op_type)
        given = {each.name: _value(each) for each in node.attribute if each.name not in _ADDRESS}
        attributes = schema.resolve(given)
        return cls(
            schema=schema, attributes=attributes, inputs=schema.inputs(attributes), outputs=schema.outputs(attributes)
        )

    def infer(self, given: Sequence[Typed]) -> list[Typed]:
        """Types and sizes of the outputs.

        Raises:
            ShapeProblem: the inputs are too few, too many, of other types, or their sizes contradict each other.
        """
        if len(given) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise ShapeProblem(f"{len(given)} inputs; these attributes need {len(self.inputs)}: {names}")
        for spec, tensor in zip(self.inputs, given, strict=True):
            if tensor.dtype not in spec.dtypes:
                raise ShapeProblem(f"{spec.name} is {tensor.dtype}; it must be {' or '.join(spec.dtypes)}")
        sizes = _Sizes(self._known())
        sizes.solve(list(zip(self.inputs, given, strict=True)))
        by_name = {spec.name: tensor for spec, tensor in zip(self.inputs, given, strict=True)}
        return [self._output(spec, sizes, by_name, given[0]) for spec in self.outputs]

    def _known(self) -> dict[str, int]:
        known = {name: value for name, value in self.attributes.items() if isinstance(value, int)}
        letters = _LETTERS.get(self.schema.name, {})
        return known | {letter: known[name] for letter, name in letters.items()}

    def _output(self, spec: TensorSpec, sizes: _Sizes, given: Mapping[str, Typed], first: Typed) -> Typed:
        dtype = spec.dtypes[0] if len(spec.dtypes) == 1 else first.dtype
        if spec.shape.startswith("as "):
            return Typed(dtype, given[spec.shape.removeprefix("as ")].shape)
        return Typed(dtype, sizes.shape(spec))


def _value(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return list(value) if attribute.type == onnx.AttributeProto.INTS else value


def address_problems(node: onnx.NodeProto) -> Iterator[str]:
    """What keeps TensorRT from finding the plugin of a node, or from handing it an attribute."""
    given = {each.name: each for each in node.attribute}
    kinds = {each.name: each.kind for each in schema_of(node.op_type).attributes}
    wanted = {"plugin_version": schema_of(node.op_type).version, "plugin_namespace": DOMAIN}
    for name, value in wanted.items():
        found = _value(given[name]) if name in given else None
        if found != value:
            yield f"attribute {name} is {found!r}; the plugin is found by {value!r}"
    for name, attribute in given.items():
        if name in kinds and attribute.type != _KINDS[kinds[name]]:
            kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
            yield f"attribute {name} is {kind}; the plugin's creator takes {kinds[name]}"


@dataclass(slots=True)
class _Sizes:
    """Letters of the schemas' shapes and the numbers they stand for. Shapes are like ``[..., 2*I, K/8]``."""

    known: dict[str, int]
    leading: tuple[int, ...] | None = None
    _open: list[tuple[ast.expr, int, str]] = field(default_factory=list)

    def solve(self, tensors: Sequence[tuple[TensorSpec, Typed]]) -> None:
        """Bind letters until all sizes agree.

        Raises:
            ShapeProblem: they do not.
        """
        for spec, tensor in tensors:
            self._add(spec, tensor.shape)
        before = -1
        while len(self._open) != before:
            before = len(self._open)
            self._open = [each for each in self._open if not self._bind(*each)]

    def _add(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        axes = _axes(spec)
        if axes is None:
            return
        rest = shape
        where = f"{spec.name} has shape {list(shape)}; it must be {spec.shape}"
        if axes and axes[0] == "...":
            axes = axes[1:]
            cut = len(shape) - len(axes)
            if cut < 0 or self.leading not in (None, shape[:cut]):
                raise ShapeProblem(where if cut < 0 else f"{where} with ... = {list(self.leading or ())}")
            self.leading, rest = shape[:cut], shape[cut:]
        if len(axes) != len(rest):
            raise ShapeProblem(where)
        self._open += [
            (_parsed(axis), size, f"{where}: axis {axis} is {size}")
            for axis, size in zip(axes, rest, strict=True)
            if " " not in axis.replace(" + ", "+")  # said in words
        ]

    def _bind(self, axis: ast.expr, size: int, where: str) -> bool:
        unknown = {each.id for each in ast.walk(axis) if isinstance(each, ast.Name)} - set(self.known)
        if not unknown:
            if self._value(axis) != size:
                letters = ", ".join(f"{name} = {self.known[name]}" for name in sorted(_names(axis)))
                raise ShapeProblem(f"{where}, where {letters}")
            return True
        if len(unknown) > 1:
            return False
        self._invert(axis, size, where)
        return True

    def _value(self, axis: ast.expr) -> float:
        if isinstance(axis, ast.Constant):
            return float(axis.value)  # type: ignore[arg-type]  # the schemas hold numbers only
        if isinstance(axis, ast.Name):
            return float(self.known[axis.id])
        assert isinstance(axis, ast.BinOp)
        left, right = self._value(axis.left), self._value(axis.right)
        if isinstance(axis.op, ast.Mult):
            return left * right
        return left / right if isinstance(axis.op, ast.Div) else left + right

    def _invert(self, axis: ast.expr, size: float, where: str) -> None:
        """Bind the one unknown letter so that ``axis`` has this size."""
        if isinstance(axis, ast.Name):
            if size != int(size):
                raise ShapeProblem(f"{where}, which leaves a rest")
            self.known[axis.id] = int(size)
            return
        assert isinstance(axis, ast.BinOp)
        on_left = bool(_names(axis.left) - set(self.known))
        unknown, other = (axis.left, axis.right) if on_left else (axis.right, axis.left)
        number = self._value(other)
        if isinstance(axis.op, ast.Mult):
            self._invert(unknown, size / number if number else 0, where)
        elif isinstance(axis.op, ast.Div):
            self._invert(unknown, size * number, where)
        else:
            self._invert(unknown, size - number, where)

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Sizes of an output."""
        axes = _axes(spec) or []
        leading = self.leading or () if axes[:1] == ["..."] else ()
        rest = axes[1:] if axes[:1] == ["..."] else axes
        return (*leading, *(int(self._value(_parsed(axis))) for axis in rest))


def _axes(spec: TensorSpec) -> list[str] | None:
    """The axes of ``[a, b, c]``; None where they are said in words."""
    if " or " in spec.shape or not spec.shape.startswith("["):
        return None
    return [axis.strip() for axis in spec.shape[1:-1].split(",") if axis.strip()]


def _parsed(axis: str) -> ast.expr:
    return ast.parse(axis, mode="eval").body


def _names(axis: ast.expr) -> set[str]:
    return {each.id for each in ast.walk(axis) if isinstance(each, ast.Name)}
