"""The hand-made bundle in both cache modes, built once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepstitch.runtime.pipeline import Pipeline

from .tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="session", params=["two buffers", "in place"])
def tiny_bundle(request, tmp_path_factory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle", in_place=request.param == "in place")


@pytest.fixture(scope="session")
def plain_bundle(tmp_path_factory) -> Path:
    """One of the two, for what does not depend on the cache."""
    return write_tiny_bundle(tmp_path_factory.mktemp("plain") / "bundle")


@pytest.fixture
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    """Four pictures of different contents and sizes."""
    random = np.random.default_rng(3)
    sizes = [(64, 64), (64, 96), (96, 64), (128, 64)]
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
