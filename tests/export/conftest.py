"""Traced graphs and exported bundles, made once per session: tracing is what a tiny export costs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from deepstitch.export import exporter, trace
from deepstitch.models import ModelConfig
from deepstitch.models.checkpoint import Checkpoint

from ..tiny import write_tiny_checkpoint

Trace = Callable[[ModelConfig], ir.Model]


def _remembering(function: Trace, key: Callable[[ModelConfig], object]) -> Trace:
    traced: dict[object, ir.Model] = {}

    def traced_once(config: ModelConfig) -> ir.Model:
        if key(config) not in traced:
            traced[key(config)] = function(config)
        return traced[key(config)].clone()

    return traced_once


@pytest.fixture(scope="session")
def traced_decoder() -> Trace:
    """``trace_decoder`` that traces a config once and hands out copies."""
    return _remembering(trace.trace_decoder, lambda config: config)


@pytest.fixture(scope="session")
def traced_vision_encoder() -> Trace:
    return _remembering(trace.trace_vision_encoder, lambda config: config.vision)


@pytest.fixture(scope="session", autouse=True)
def exports_trace_once(traced_decoder: Trace, traced_vision_encoder: Trace) -> Iterator[None]:
    logging.getLogger("torch.__trace").propagate = False  # thousands of records in the report of every failure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "trace_decoder", traced_decoder)
        patch.setattr(exporter, "trace_vision_encoder", traced_vision_encoder)
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """A bundle and the checkpoint it came from."""

    bundle: Path
    checkpoint: Checkpoint
    config: exporter.ExportConfig


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """``checkpoints(family, layout, **options)``: one of each per session, read only."""
    made: dict[str, Checkpoint] = {}

    def make(family: str = "qwen3_vl_moe", layout: str = "hub", **options: Any) -> Checkpoint:
        key = repr((family, layout, sorted(options.items())))
        if key not in made:
            folder = write_tiny_checkpoint(
                tmp_path_factory.mktemp("checkpoint"), family=family, layout=layout, **options
            )
            made[key] = Checkpoint.open(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """``export(checkpoint, target=…, …)``: one bundle of each per session, read only."""
    made: dict[str, Exported] = {}

    def make(checkpoint: Checkpoint, **options: Any) -> Exported:
        key = repr((checkpoint.folder, sorted(options.items())))
        if key not in made:
            output = tmp_path_factory.mktemp("bundles") / "bundle"
            config = exporter.ExportConfig(checkpoint=checkpoint.folder, output=output, progress=False, **options)
            exporter.export_checkpoint(config)
            made[key] = Exported(bundle=output, checkpoint=checkpoint, config=config)
        return made[key]

    return make
