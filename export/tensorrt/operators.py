"""What a TensorRT parser takes: its operators with types and restrictions, read from a table beside this file."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from deepstitch.errors import did_you_mean

__all__ = ["BUILT_IN_DOMAINS", "Node", "OperatorRule", "ParserTable"]

BUILT_IN_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRule:
    """What the parser asks of one operator.

    Attributes:
        types: the data may have, as numpy names.
        typed: inputs that are data; the others are indices, shapes, conditions.
        typed_outputs: the outputs are data too.
        constants: inputs that must be known when the graph is parsed, by index: name for the message.
        zeros: likewise, and every value must be zero.
        ignored: attributes the parser passes over, with the value that changes nothing; None: they must be absent.
        refused: attributes the parser does not take, whatever their value.
        values: attributes of which only some values are implemented.
        outputs: how many may be asked for.
        note: what is not checked.
    """

    types: tuple[str, ...]
    typed: tuple[int, ...] = (0,)
    typed_outputs: bool = False
    constants: Mapping[str, str] = field(default_factory=dict)
    zeros: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    outputs: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node, and what is known of its tensors.

    Attributes:
        proto: the node.
        dtypes: numpy name of a tensor, None where it is not known.
        constants: value of a small tensor that does not change from call to call, else None.
        is_constant: whether a tensor does not change from call to call.
    """

    proto: onnx.NodeProto
    dtypes: Callable[[str], str | None]
    constants: Callable[[str], np.ndarray[Any, Any] | None]
    is_constant: Callable[[str], bool]

    @property
    def attributes(self) -> dict[str, Any]:
        """Plain values by name; tensors and graphs as they are."""
        return {each.name: _plain(onnx.helper.get_attribute_value(each)) for each in self.proto.attribute}

    def input(self, index: int) -> str:
        """Name of an input, empty where it is left out."""
        return self.proto.input[index] if index < len(self.proto.input) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserTable:
    """One version of the parser.

    Attributes:
        parser: its name and version.
        source: where the operators and their types are listed.
        max_opset: newest ONNX opset it knows.
        narrowed: types it converts on the way in.
        stored: types that initializers may have.
        not_stored: what becomes of initializers of some other types.
        operators: rules by op type.
        unsupported: operators that are listed as missing.
        later: those of them that a later version has, and which.
    """

    parser: str
    source: str
    max_opset: int
    narrowed: Mapping[str, str]
    stored: frozenset[str]
    not_stored: Mapping[str, str]
    operators: Mapping[str, OperatorRule]
    unsupported: frozenset[str]
    later: Mapping[str, str]

    @classmethod
    @functools.cache
    def load(cls, version: str = "8.6") -> ParserTable:
        """Read the table of a parser version."""
        name = f"operators_{version.replace('.', '_')}.json"
        raw = json.loads(importlib.resources.files(__package__).joinpath(name).read_text("utf-8"))
        return cls(
            parser=raw["parser"],
            source=raw["source"],
            max_opset=raw["max_opset"],
            narrowed=raw["narrowed"],
            operators={op: _rule(entry) for op, entry in raw["operators"].items()},
            stored=frozenset(raw["stored"]),
            not_stored=raw["not_stored"],
            unsupported=frozenset(raw["unsupported"]),
            later=raw.get("later", {}),
        )

    def problems(self, node: Node) -> Iterator[str]:
        """What the parser does not do for a node of the standard domain."""
        op = node.proto.op_type
        if op in self.unsupported or op not in self.operators:
            hint = f"; {self.later[op]} has" if op in self.later else did_you_mean(op, self.operators)
            yield f"{self.parser} has no {op}{hint}"
            return
        rule = self.operators[op]
        yield from self._type_problems(rule, node)
        yield from _input_problems(rule, node)
        yield from _attribute_problems(rule, node)

    def _type_problems(self, rule: OperatorRule, node: Node) -> Iterator[str]:
        data = [(f"input {index}", node.input(index)) for index in rule.typed]
        if rule.typed_outputs:
            data += [(f"output {index}", name) for index, name in enumerate(node.proto.output)]
        for place, name in data:
            dtype = node.dtypes(name) if name else None
            seen = self.narrowed.get(dtype, dtype) if dtype is not None else None
            if seen is not None and seen not in rule.types:
                yield f"{place} is {dtype}; {node.proto.op_type} takes {', '.join(rule.types)}"


def _rule(entry: dict[str, Any]) -> OperatorRule:
    values = {name: tuple(allowed) for name, allowed in entry.get("values", {}).items()}
    given: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in entry.items()}
    return OperatorRule(**{**given, "values": values})


def _input_problems(rule: OperatorRule, node: Node) -> Iterator[str]:
    for index, name in {**rule.constants, **rule.zeros}.items():
        tensor = node.input(int(index))
        if tensor and not node.is_constant(tensor):
            yield f"input {index} ({name}) must be an initializer or a Constant"
    for index, name in rule.zeros.items():
        value = node.constants(node.input(int(index)))
        if value is not None and value.any():
            yield f"input {index} ({name}) must be zero"
    if rule.outputs is not None and len([name for name in node.proto.output if name]) > rule.outputs:
        yield f"{len(node.proto.output)} outputs are asked for; the parser gives {rule.outputs}"


def _attribute_problems(rule: OperatorRule, node: Node) -> Iterator[str]:
    for name, value in node.attributes.items():
        if name in rule.ignored and (rule.ignored[name] is None or value != rule.ignored[name]):
            yield f"attribute {name} is passed over by the parser: the result would be another"
        if name in rule.refused:
            yield f"attribute {name} is refused by the parser"
        if name in rule.values and value not in rule.values[name]:
            yield f"attribute {name} is {value!r}; the parser knows {', '.join(map(str, rule.values[name]))}"
