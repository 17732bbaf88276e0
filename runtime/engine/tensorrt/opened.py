"""The engines of a bundle: found for this card and this TensorRT, and checked before TensorRT sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepstitch.engine_manifest import (
    ENGINE_MANIFEST,
    EngineFacts,
    EngineGraph,
    EngineManifest,
    built_engines,
    engine_folder,
)
from deepstitch.errors import BundleError
from deepstitch.manifest import MANIFEST_NAME, FileRecord, file_sha256
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine.cuda import Card
from deepstitch.runtime.verify import verify_level, verify_records

__all__ = ["TARGETS", "OpenedEngines", "check_bundle", "open_engines"]

TARGETS = ("trt8", "trt10")
"""Export targets whose graphs become TensorRT engines."""

_AGAIN = "build the engines again with 'deepstitch build'"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedEngines:
    """A folder of engines that fit."""

    folder: Path
    manifest: EngineManifest

    @property
    def plugin_library(self) -> Path | None:
        """The library the engines were built with; None where no graph needs one."""
        plugins = self.manifest.plugins
        return None if plugins is None else self.folder / plugins.file

    def plan(self, graph: str) -> Path:
        """The serialized engine of a graph."""
        return self.folder / self.manifest.graphs[graph].file

    def graph(self, graph: str) -> EngineGraph:
        """Its profiles."""
        return self.manifest.graphs[graph]


def check_bundle(bundle: Bundle) -> None:
    """Refuse a bundle that no TensorRT runs on any card.

    Raises:
        BundleError: it was exported for something else, or has no engines.
    """
    target = bundle.manifest.target
    if target not in TARGETS:
        raise BundleError(
            f"{bundle.folder}: exported with --target {target}, which engine tensorrt does not run; leave --engine "
            "out, or export the checkpoint with --target trt8 (compute capability 6.1 to 9.0) or trt10 (7.5 and newer)"
        )
    if not built_engines(bundle.folder):
        raise BundleError(
            f"{bundle.folder}: there are no engines yet; build them on the machine of the card: {_command(bundle)}"
        )


def open_engines(bundle: Bundle, *, version: str, card: Card) -> OpenedEngines:
    """The engines for this card and TensorRT, their files whole.

    Raises:
        BundleError: there are none, they were built from, with or for something else, or a file is not what was built.
    """
    facts = EngineFacts(
        target=bundle.manifest.target,
        tensorrt=version,
        sm=card.sm,
        card=card.name,
        bundle_sha256=file_sha256(bundle.folder / MANIFEST_NAME),
    )
    folder = engine_folder(bundle.folder, card.sm, version)
    if not (folder / ENGINE_MANIFEST).is_file():
        raise BundleError(_none_fit(bundle, facts))
    manifest = EngineManifest.read(folder / ENGINE_MANIFEST)
    if differences := manifest.differences(facts):
        raise BundleError(f"{folder}: the engines do not fit: {'; '.join(differences)}; {_AGAIN}")
    missing = set(bundle.manifest.graphs) - set(manifest.graphs)
    if missing:
        raise BundleError(f"{folder / ENGINE_MANIFEST}: there is no engine of graph '{min(missing)}'; {_AGAIN}")
    level = verify_level(None)
    records = {each.file: FileRecord(sha256=each.sha256, size=each.size) for each in manifest.graphs.values()}
    verify_records(folder, records, level, progress=True, remedy=_AGAIN)
    if manifest.plugins is not None:
        _check_library(folder / manifest.plugins.file, manifest.plugins.sha256)
    return OpenedEngines(folder=folder, manifest=manifest)


def _check_library(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing; the engines need the plugin library they were built with: {_AGAIN}")
    if file_sha256(path) != sha256:
        raise BundleError(f"{path}: not the plugin library the engines were built with; {_AGAIN}")


def _none_fit(bundle: Bundle, facts: EngineFacts) -> str:
    """Why, for each set of engines there is."""
    said = []
    for folder in built_engines(bundle.folder):
        reasons = EngineManifest.read(folder / ENGINE_MANIFEST).differences(facts)
        said.append(f"{folder.name}: {', '.join(reasons) or 'renamed since it was built'}")
    return f"{bundle.folder}: none of the engines fit here; {'; '.join(said)}; build others: {_command(bundle)}"


def _command(bundle: Bundle) -> str:
    return f"deepstitch build {bundle.folder} --target {bundle.manifest.target}"
