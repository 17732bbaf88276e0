"""Cards and bundles for the tests of the builder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepstitch.engine_manifest import Limits
from deepstitch.export.tensorrt import Subject, check_build
from deepstitch.export.tensorrt.builder import BuildOrder
from deepstitch.manifest import MANIFEST_NAME
from deepstitch.plugins.build.contents import read_library

LIMITS = Limits(images=2, image_patches=64, max_context=128, batch=2, prefill_chunk=16)
FLAGS = [
    "--images",
    "2",
    "--image-patches",
    "64",
    "--max-context",
    "128",
    "--batch",
    "2",
    "--prefill-chunk",
    "16",
    "--no-compare",
]
TRT8, TRT10 = "8.6.1", "10.13.3.9"


class Card:
    """What the builder asks the driver of."""

    name, capability, free = "Tesla P40", (6, 1), 24 << 30

    def call(self, function: str, free: Any, total: Any) -> None:
        assert function == "cuMemGetInfo_v2"
        free._obj.value = total._obj.value = self.free


class Ampere(Card):
    name, capability = "RTX A4000", (8, 6)


def order_of(bundle: Path, library: Path, limits: Limits = LIMITS, sm: int = 61, **changes: Any) -> BuildOrder:
    target = json.loads((bundle / MANIFEST_NAME).read_text("utf-8"))["target"]
    check = check_build(Subject.from_bundle(bundle, target), limits, sm, None)
    assert check.passed
    return BuildOrder(bundle=bundle, check=check, library=(library, read_library(library)), progress=False, **changes)


def calls(module: Any, name: str) -> list[dict[str, Any]]:
    return [arguments for called, arguments in module.calls if called == name]


def left_in(bundle: Path) -> list[str]:
    return sorted(path.name for path in (bundle / "engines").glob("*"))
