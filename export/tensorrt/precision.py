"""Which arithmetic an engine may use: the flags of its builder, by the version's way of typing networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

__all__ = ["Precision", "creation_flags", "pin_layers", "precision_of"]

_HALF = onnx.TensorProto.FLOAT16
# Layers whose types are what they are: nothing to choose, or none of the builder's business.
_TYPED_BY_THEMSELVES = ("CAST", "CONSTANT", "IDENTITY", "PLUGIN", "PLUGIN_V2", "PLUGIN_V3", "SHAPE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How a network is typed.

    Attributes:
        strongly_typed: every tensor has the type the graph gives it (TensorRT 10; in 11 there is nothing else).
        half: a weakly typed graph stores something in fp16, for plugins to read. They are offered it only where fp16
            is enabled, so it is, and every other layer is held to fp32, the only fast arithmetic of SM61.
    """

    strongly_typed: bool
    half: bool

    def set_flags(self, module: Any, config: Any) -> None:
        """Set the builder's flags: fp32 means all its bits, also on cards that could do with fewer (TF32)."""
        config.clear_flag(module.BuilderFlag.TF32)
        if self.half:
            config.set_flag(module.BuilderFlag.FP16)
            config.set_flag(module.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)

    def words(self) -> list[str]:
        """The same for ``trtexec``."""
        words = ["--noTF32"]
        if self.strongly_typed:
            words.append("--stronglyTyped")
        if self.half:
            words += ["--fp16", "--precisionConstraints=obey", "--layerPrecisions=*:fp32"]
        return words


def precision_of(module: Any, graph: onnx.GraphProto) -> Precision:
    """Of a graph, in the TensorRT that is to build it."""
    typed = "STRONGLY_TYPED" in _members(module.NetworkDefinitionCreationFlag)
    return Precision(strongly_typed=typed, half=not typed and _stores_half(graph))


def _stores_half(graph: onnx.GraphProto) -> bool:
    edges = (value.type.tensor_type.elem_type for value in (*graph.input, *graph.output))
    return _HALF in edges or any(tensor.data_type == _HALF for tensor in graph.initializer)


def creation_flags(module: Any) -> int:
    """What a network is created with: a batch axis like any other in 8.6, strong types from 10 on."""
    known = _members(module.NetworkDefinitionCreationFlag)
    name = "STRONGLY_TYPED" if "STRONGLY_TYPED" in known else "EXPLICIT_BATCH"
    return 1 << int(known[name])


def pin_layers(module: Any, network: Any) -> int:
    """Hold layers that compute with fp32 numbers to fp32; return how many."""
    pinned = 0
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        if layer.type.name in _TYPED_BY_THEMSELVES:
            continue
        floats = [index for index in range(layer.num_outputs) if layer.get_output(index).dtype == module.DataType.FLOAT]
        if floats:
            layer.precision = module.DataType.FLOAT
            pinned += 1
        for index in floats:
            layer.set_output_type(index, module.DataType.FLOAT)
    return pinned


def _members(kind: Any) -> Mapping[str, Any]:
    members: Mapping[str, Any] = kind.__members__
    return members
