"""Canonical graphs, and bundles exported once per session."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from deepstitch.export import exporter
from deepstitch.export.contract import DECODER, VISION_ENCODER
from deepstitch.export.trace_cache import canonical_graph
from deepstitch.models import ModelConfig
from deepstitch.models.checkpoint import Checkpoint

from ..tiny import write_tiny_checkpoint

Trace = Callable[[ModelConfig], ir.Model]


@pytest.fixture(scope="session")
def traced_decoder() -> Trace:
    """The canonical decoder of a config, from the cache if it is there."""
    return functools.partial(canonical_graph, DECODER)


@pytest.fixture(scope="session")
def traced_vision_encoder() -> Trace:
    return functools.partial(canonical_graph, VISION_ENCODER)


@pytest.fixture(scope="session", autouse=True)
def quiet_torch() -> None:
    import torch  # makes its loggers

    del torch
    logging.getLogger("torch.__trace").propagate = False  # thousands of records in the report of every failure


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
