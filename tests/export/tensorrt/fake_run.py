"""Small helpers around the stand-in for TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Corners = Mapping[str, Sequence[tuple[int, ...]]]


def Log(module: Any) -> Any:
    """A logger that keeps the errors."""

    class Kept(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(module.ILogger.ERROR):
                self.errors.append(msg)

    return Kept()


def plan_of(module: Any, log: Any, graph: Path, profiles: Sequence[Corners]) -> Any:
    """Build a graph."""
    builder = module.Builder(log)
    network = builder.create_network(1 if module.__version__.startswith("8") else 0)
    parser = module.OnnxParser(network, log)
    assert parser.parse_from_file(str(graph)), log.errors
    config = builder.create_builder_config()
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, corners in shapes.items():
            profile.set_shape(name, *corners)
        assert config.add_optimization_profile(profile) >= 0
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.errors
    return plan


def engine_of(module: Any, log: Any, plan: Any, allocator: Any = None) -> Any:
    """Load a plan."""
    runtime = module.Runtime(log)
    if allocator is not None:
        runtime.gpu_allocator = allocator
    engine = runtime.deserialize_cuda_engine(plan)
    assert engine is not None, log.errors
    return engine


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that TensorRT takes."""
    raw = np.zeros(array.nbytes + 256, np.uint8)
    start = -raw.ctypes.data % 256
    made = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made
