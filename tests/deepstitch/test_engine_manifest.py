"""engine.json: written, read, refused; and what engines say about the place they are to be opened in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepstitch.engine_manifest import (
    EngineFacts,
    EngineGraph,
    EngineManifest,
    EngineProfile,
    Limits,
    PluginRecord,
    built_engines,
    engine_folder,
)
from deepstitch.errors import BundleError

MANIFEST = EngineManifest(
    target="trt8",
    tensorrt="8.6.1",
    sm=61,
    card="Tesla P40",
    created_by="deepstitch build b --target trt8",
    deepstitch="0.1.0",
    bundle_sha256="ab" * 32,
    plugins=PluginRecord(file="lib.so", version="1", sha256="cd" * 32, targets=("sm_61", "compute_61")),
    limits=Limits(max_context=2048),
    graphs={
        "decoder": EngineGraph(
            file="decoder.plan",
            size=7,
            sha256="ef" * 32,
            profiles=(EngineProfile(name="prefill", shapes={"x": ((1, 1), (1, 512), (1, 512))}),),
        )
    },
)
HERE = EngineFacts(target="trt8", tensorrt="8.6.1", sm=61, card="Tesla P40", bundle_sha256="ab" * 32)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    for manifest in (MANIFEST, dataclasses.replace(MANIFEST, plugins=None)):
        manifest.write(path)
        assert EngineManifest.read(path) == manifest


def test_where_engines_lie(tmp_path: Path) -> None:
    folder = engine_folder(tmp_path, 61, "8.6.1")
    assert folder == tmp_path / "engines" / "sm61-tensorrt8.6.1" and folder.name == MANIFEST.tag
    assert built_engines(tmp_path) == []
    for name in (folder.name, ".building-sm61-tensorrt8.6.1-7", "sm75-tensorrt10.13.3.9"):
        (tmp_path / "engines" / name).mkdir(parents=True)
        MANIFEST.write(tmp_path / "engines" / name / "engine.json")
    (tmp_path / "engines" / "something else").mkdir()
    assert built_engines(tmp_path) == [folder, tmp_path / "engines" / "sm75-tensorrt10.13.3.9"]


def _edited(edit: Callable[[dict[str, Any]], object]) -> str:
    raw = json.loads(json.dumps(dataclasses.asdict(MANIFEST)))
    edit(raw)
    return json.dumps(raw)


DAMAGED = {
    "unknown entry 'card_name'": _edited(lambda raw: raw.update(card_name="x")),
    "entry 'sm' is missing": _edited(lambda raw: raw.pop("sm")),
    "engine.json.sm: expected int, found '61'": _edited(lambda raw: raw.update(sm="61")),
    "engine.json.limits: unknown entry 'image'": _edited(lambda raw: raw["limits"].update(image=2)),
    "expected 3 entries, found 2": _edited(lambda raw: raw["graphs"]["decoder"]["profiles"][0]["shapes"]["x"].pop()),
    "schema_version is 2, this deepstitch reads 1": _edited(lambda raw: raw.update(schema_version=2)),
    "schema_version is None": "[]",
    "not valid JSON": _edited(lambda _: None)[:-9],
}


@pytest.mark.parametrize("text", DAMAGED)
def test_what_is_not_intact_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(DAMAGED[text], "utf-8")
    with pytest.raises(BundleError) as caught:
        EngineManifest.read(path)
    assert text in str(caught.value) and "build the engines again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file or directory; build engines with 'deepstitch build'"):
        EngineManifest.read(tmp_path / "engine.json")
    (tmp_path / "engine.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="not valid JSON"):
        EngineManifest.read(tmp_path / "engine.json")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (HERE, []),
        (EngineFacts(), []),
        (dataclasses.replace(HERE, tensorrt="8.6.0"), ["they were built with TensorRT 8.6.1, here is 8.6.0"]),
        (
            dataclasses.replace(HERE, sm=75, card="RTX 2080"),
            ["they were built for sm_61 (Tesla P40), the card here has sm_75 (RTX 2080)"],
        ),
        (
            EngineFacts(target="trt10", bundle_sha256="00"),
            [
                "they are of target trt8, the bundle is of trt10",
                "the bundle's manifest.json is not the one they were built from",
            ],
        ),
    ],
)
def test_differences(there: EngineFacts, said: list[str]) -> None:
    assert MANIFEST.differences(there) == said
