"""``trt8`` graphs as they are, in opset 17, with our kernels behind the plugin nodes (on the CPU, by the host shim)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from deepstitch.export.compare.definition_engine import definition_session
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.plugins.build.host import build_host_library
from deepstitch.plugins.common.schema import DOMAIN
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import OPS, load
from deepstitch.runtime.bundle import Bundle

from .graphs import CALLS, Arrays, decoder_feeds, errors, vision_feeds
from .trt8_models import attributes, fitting, options

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]

GRIDS = [(1, 4, 6), (2, 2, 4)]
LIMITS = {"fp32": 1e-5, "int4": 0.03}  # a rounded input of a layer may go to the other side


@pytest.fixture(scope="module")
def library() -> PluginLibrary:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("g++ is not installed")
    return PluginLibrary.open(build_host_library())


def kernels(library: PluginLibrary) -> list[type[OpRun]]:
    """The plugins for ONNX's evaluator: attributes of the node go to the creator as TensorRT's parser passes them."""

    def operator(name: str) -> type[OpRun]:
        schema = next(schema for schema in (load(folder).schema for folder in OPS) if schema.name == name)

        def run(self: OpRun, *inputs: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
            given = attributes(self.onnx_node)
            assert (given.pop("plugin_version"), given.pop("plugin_namespace")) == (schema.version, DOMAIN)
            names = [spec.name for spec in schema.inputs(schema.resolve(given))]
            contiguous = map(np.ascontiguousarray, inputs)
            outputs = library.run(name, given, dict(zip(names, contiguous, strict=True)))
            return tuple(outputs.values())

        return type(name, (OpRun,), {"op_domain": DOMAIN, "_run": run})

    return [operator(load(folder).schema.name) for folder in OPS]


def by_kernels(path: Path, library: PluginLibrary, feeds: Arrays) -> Arrays:
    evaluator = ReferenceEvaluator(onnx.load(path), new_ops=kernels(library))
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def by_definitions(bundle: Bundle, name: str, feeds: Arrays) -> Arrays:
    session = definition_session(bundle, name, onnxruntime.SessionOptions())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_kernels_compute_what_the_definitions_do(
    weights: str, library: PluginLibrary, checkpoints: Checkpoints, export: Export
) -> None:
    checkpoint = fitting(checkpoints, "qwen3_vl_moe")
    bundle = Bundle.open(export(checkpoint, target="trt8", **options(checkpoint, weights)).bundle)
    for name, feeds in (
        ("decoder", decoder_feeds(checkpoint.config, CALLS["ragged prefill"])),
        ("decoder", decoder_feeds(checkpoint.config, CALLS["decode"])),
        ("vision_encoder", vision_feeds(checkpoint.config, GRIDS)),
    ):
        found = by_kernels(bundle.graph_path(name), library, feeds)
        expected = by_definitions(bundle, name, feeds)
        worst = errors(found, expected, feeds)
        assert {part: error for part, error in worst.items() if not error <= LIMITS[weights]} == {}, name
