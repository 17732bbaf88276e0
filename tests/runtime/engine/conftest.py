"""A card that is none: the stand-in driver and the stand-in TensorRT, in child processes that run the real code."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.manifest import MANIFEST_NAME, Manifest
from deepstitch.plugins.build.host import build_host_library

from ...fake_tensorrt.installed import FOLDER as FAKE_TENSORRT
from ...fake_tensorrt.installed import variables_of
from ...fake_tensorrt.plugin_library import stand_in_library
from ..tiny_bundle import copy_bundle

FAKE_DRIVER = Path(__file__).resolve().parents[2] / "plugins" / "fake_cuda.cpp"
SCENARIOS = Path(__file__).with_name("scenarios.py")
LIMITS = ("--max-context", "256", "--prefill-chunk", "64", "--batch", "2", "--images", "2", "--image-patches", "64")
# Of the sample model nothing says "end"; so answers are as long as they may be.
NO_TOKEN = 1

Answers = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Card:
    """Runs things where a driver and a TensorRT are found, both stand-ins.

    Attributes:
        driver: folder of libcuda.so.1; None: there is none.
        version: of TensorRT; None: there is none.
    """

    driver: Path | None
    version: str | None = "8.6.1"

    def run(self, command: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments."""
        paths = [os.environ.get("LD_LIBRARY_PATH", ""), str(self.driver or "")]
        changed = {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, reversed(paths)))}
        if self.version is not None:
            paths = [str(FAKE_TENSORRT), os.environ.get("PYTHONPATH", "")]
            changed |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables_of(self.version)}
        arguments = [sys.executable, *map(str, command)]
        environ = os.environ | changed | environment
        return subprocess.run(arguments, env=environ, capture_output=True, text=True, check=False, timeout=300)

    def deepstitch(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run(["-m", "deepstitch.cli", *arguments], **environment)

    def scenario(self, name: str, *arguments: str | Path, **environment: str) -> Any:
        """Run a function of scenarios.py; what it returns."""
        finished = self.run([SCENARIOS, name, *arguments], **environment)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in ``libcuda.so.1``."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "libcuda.so.1").symlink_to(build_host_library(ops=("deepstack_add",), extra=(FAKE_DRIVER,)))
    return folder


@pytest.fixture(scope="session")
def card(driver: Path) -> Card:
    """With TensorRT 8.6.1."""
    return Card(driver)


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin library as the stand-in for TensorRT loads it."""
    return stand_in_library(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(scope="session")
def endless(sample_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``endless(target)``: a bundle of the sample model whose answers do not end by themselves."""
    made: dict[str, Path] = {}

    def make(target: str) -> Path:
        if target not in made:
            folder = copy_bundle(sample_bundle(target), tmp_path_factory.mktemp("endless") / target)
            manifest = Manifest.read(folder)
            model = dataclasses.replace(manifest.model, eos_token_ids=(NO_TOKEN,))
            (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, model=model).to_json(), "utf-8")
            made[target] = folder
        return made[target]

    return make


@pytest.fixture(scope="session")
def built(endless: Callable[[str], Path], card: Card, plugin_library: Path) -> Path:
    """Such a bundle for TensorRT 8.6, with its engines. Read only."""
    folder = endless("trt8")
    build_engines(card, folder, plugin_library)
    return folder


def build_engines(card: Card, bundle: Path, plugins: Path, **environment: str) -> None:
    """By the command line."""
    arguments = ("--target", Manifest.read(bundle).target, "--plugins", plugins, "--quiet", "--no-compare", *LIMITS)
    finished = card.deepstitch("build", bundle, *arguments, **environment)
    assert finished.returncode == 0, finished.stderr


def assert_same(found: Answers, expected: Answers) -> None:
    """The same tokens, as probable, for :func:`scenarios.answers` of two engines."""
    assert found.keys() == expected.keys()
    for name, pairs in expected.items():
        assert [token for token, _ in found[name]] == [token for token, _ in pairs], name
        probable = [value for _, value in pairs]
        np.testing.assert_allclose([value for _, value in found[name]], probable, atol=0.01, err_msg=name)
