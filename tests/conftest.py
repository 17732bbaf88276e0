"""Fixtures that every folder of tests shares, and the check for imports under a bare name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Two shared cores: a test gains nothing from more threads, and loses them to its neighbours.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from .tiny import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "models" / "sample" / "checkpoint"
BARE_NAMES = ("export", "models", "plugins", "runtime")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top of the working tree."""
    return ROOT


@pytest.fixture(scope="session")
def sample_checkpoint() -> Path:
    """The trained sample model."""
    if not (SAMPLE / "config.json").is_file():
        pytest.skip("models/sample/checkpoint is not in this tree")
    return SAMPLE


@pytest.fixture
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_checkpoint(family="qwen3_vl_moe", layout="hub", **options)`` writes a fresh random checkpoint.

    Options are those of ``tests/tiny.py``: dtype, tied, shards, rope, seed, and entries of the text config.
    """

    def make(family: str = "qwen3_vl_moe", layout: str = "hub", **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(f"{family}-{layout}")
        return write_tiny_checkpoint(folder, family=family, layout=layout, **options)

    return make


@pytest.fixture(scope="session")
def sample_bundle(tmp_path_factory: pytest.TempPathFactory, sample_checkpoint: Path) -> Callable[..., Path]:
    """``sample_bundle(target="ort-cpu", weights="fp32")``: the sample model, exported once per session.

    Read only: a test that damages a bundle copies it first.
    """
    bundles: dict[tuple[str, str], Path] = {}

    def make(target: str = "ort-cpu", weights: str = "fp32") -> Path:
        if (target, weights) not in bundles:
            from deepstitch.export import ExportConfig, export_checkpoint

            folder = tmp_path_factory.mktemp("bundles") / f"sample-{target}-{weights}"
            config = ExportConfig(checkpoint=sample_checkpoint, output=folder, target=target, weights=weights)
            bundles[target, weights] = export_checkpoint(config)
        return bundles[target, weights]

    return make


@pytest.fixture(scope="session", autouse=True)
def no_bare_imports() -> Iterator[None]:
    """At the end of the run (of each xdist worker): no second copy of the package under a bare name."""
    yield
    bare = [name for name in BARE_NAMES if name in sys.modules]
    assert not bare, f"imported as {', '.join(bare)} instead of deepstitch.<name>: two copies of every class"
