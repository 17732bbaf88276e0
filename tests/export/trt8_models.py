"""Tiny checkpoints whose sizes the plugins take, their bundles, and integer weights as the floats they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from deepstitch.export.compare import definition_engine
from deepstitch.export.compare.candidate import Candidate
from deepstitch.export.compare.cases import CASES
from deepstitch.export.compare.comparison import make_inputs, measure
from deepstitch.export.compare.definition_engine import DefinitionEngine
from deepstitch.export.compare.metrics import StageResult
from deepstitch.export.compare.stages import Stages
from deepstitch.export.compare.tolerance import Tolerance
from deepstitch.export.exporter import QuantizationConfig
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.plugins.common.schema import DOMAIN
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import open_engine
from deepstitch.runtime.engine.ort import ORT_TARGETS

from .. import tiny

WIDE = 64  # heads that SparseAttention has a kernel for
NARROW = 32  # and others
INTEGERS = {"int8": 8, "int4": 4}
_MATRICES = {"QuantizedLinear": (1,), "MoEExperts": (2, 4)}  # inputs, each followed by its scales


def fitting(checkpoints: Callable[..., Checkpoint], family: str, head_dim: int = WIDE, **text: Any) -> Checkpoint:
    """A tiny checkpoint with inner widths of whole groups."""
    text = {"head_dim": head_dim, "moe_intermediate_size" if "moe" in family else "intermediate_size": 96, **text}
    if "vl" in family:
        section = [12, 10, 10] if head_dim == WIDE else [6, 5, 5]
        text["rope_parameters"] = {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "mrope_section": section,
            "mrope_interleaved": True,
        }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.VISION, "hidden_size", 2 * head_dim)
        patch.setitem(tiny.VISION, "intermediate_size", 96)
        return checkpoints(family, **text)


def options(checkpoint: Checkpoint, weights: str) -> dict[str, Any]:
    """Flags of an export: integers in both graphs, rounded to nearest."""
    if weights not in INTEGERS:
        return {"weights": weights}
    vision = {"vision_weights": "int8"} if checkpoint.config.vision is not None else {}
    return {"weights": weights, "quantization": QuantizationConfig(method="rtn"), **vision}


def stages(folder: Path) -> Iterator[tuple[str, Stages]]:
    """What a bundle makes of every case that applies; stored weights are multiplied as floats."""
    bundle = Bundle.open(folder)
    if bundle.manifest.target not in ORT_TARGETS:
        original = definition_engine.with_definitions
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(definition_engine, "with_definitions", lambda model: original(floats(model, folder)))
            candidate = Candidate(DefinitionEngine(bundle, threads=1))
    else:
        candidate = Candidate(open_engine("ort", bundle, threads=1))
    for inputs in make_inputs(bundle, CASES)[0]:
        yield inputs.case.name, candidate.run(inputs)


def held_against(portable: Path, bundle: Path, tolerance: Tolerance) -> list[StageResult]:
    """All stages of all cases of a bundle, measured by those of a portable one."""
    expected = dict(stages(portable))
    measured = [each for case, found in stages(bundle) for each in measure(case, found, expected[case], tolerance)]
    assert len({result.case for result in measured}) == len(expected) >= 5
    return measured


def graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in sorted(folder.glob("*.onnx"))}


def plugins(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """By name; texts as text."""
    found = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def floats(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph over float32 weights: integers times their scales, and no layer's inputs or outputs are rounded."""
    _widen(model)
    stored = {each.name: each for each in model.graph.initializer}
    made: dict[str, onnx.TensorProto] = {}
    for node in plugins(model):
        bits = INTEGERS.get(attributes(node).get("weight_format", ""))
        if bits is None:
            continue
        inputs = list(node.input)
        for index in _MATRICES[node.op_type]:
            name, scales = inputs[index : index + 2]
            words, steps = (_array(stored[each], folder) for each in (name, scales))
            made[name] = numpy_helper.from_array(decoded(words, steps, bits), f"{name}.floats")
            inputs[index : index + 2] = [made[name].name, ""]
        del node.input[:]
        node.input.extend(each for each in inputs if each)
        for each in node.attribute:
            if each.name == "weight_format":
                each.s = b"float32"
            if each.name == "block_size":
                each.i = 0
    model.graph.initializer.extend(made.values())
    return model


def _widen(model: onnx.ModelProto) -> None:
    """What is rounded to fp16 and cast back is left as it is; weights and caches of fp16 stay."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in model.graph.node:
        halves = node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT16
        if halves and all(reader.op_type == "Cast" for reader in readers[node.output[0]]):
            node.attribute[0].i = TensorProto.FLOAT


def decoded(words: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """``[..., N, K]`` float32 from INT32 words ``[..., N, K * bits / 32]``."""
    assert words.dtype == np.int32
    if bits == 8:
        numbers = np.ascontiguousarray(words).view(np.int8).astype(np.float32)
    else:
        shifts = np.arange(0, 32, 4, dtype=np.uint32)
        nibbles = words.view(np.uint32)[..., None] >> shifts & np.uint32(15)
        numbers = nibbles.reshape(*words.shape[:-1], -1).astype(np.float32) - 8
    block = numbers.shape[-1] // scales.shape[-1]
    return numbers * np.repeat(scales, block, axis=-1)


def _array(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    return numpy_helper.to_array(tensor, base_dir=str(folder))
