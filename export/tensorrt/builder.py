"""From a bundle's graphs to TensorRT engines, which lie in the bundle: all of them or none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepstitch import __version__
from deepstitch.engine_manifest import (
    ENGINE_MANIFEST,
    EngineGraph,
    EngineManifest,
    EngineProfile,
    PluginRecord,
    engine_folder,
)
from deepstitch.errors import InputError, OutputError, UnsupportedError
from deepstitch.export.tensorrt.build_check import BuildCheck
from deepstitch.export.tensorrt.build_machine import BuildMachine
from deepstitch.export.tensorrt.build_progress import progress_of
from deepstitch.export.tensorrt.plan_from_onnx import GraphSource, plan_from_onnx
from deepstitch.export.tensorrt.precision import precision_of
from deepstitch.export.tensorrt.profiles import CORNERS, sizes_of
from deepstitch.export.tensorrt.timing_cache import TimingCache
from deepstitch.export.tensorrt.trtexec import trtexec_command
from deepstitch.manifest import MANIFEST_NAME, Manifest, file_sha256
from deepstitch.plugins.build.contents import Contents
from deepstitch.runtime.engine.tensorrt.api import version_of

__all__ = ["BuildOrder", "BuiltEngines", "build_engines", "engine_profiles"]

TIMING_CACHE = "timing.cache"
_BUILDING = ".building"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    """What to build.

    Attributes:
        bundle: folder of the graphs; the engines go there too.
        check: of the same bundle, passed; its memory plan says how much scratch memory the builder may use.
        library: of the plugins, and what it holds; None where no graph has any.
        timing_cache: to begin with; None: that of engines that were built before.
        command: the command line, for the record.
        progress: show bars, if stderr is a terminal.
    """

    bundle: Path
    check: BuildCheck
    library: tuple[Path, Contents] | None
    timing_cache: Path | None = None
    command: str = ""
    progress: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngines:
    """What was built.

    Attributes:
        folder: of the engines.
        manifest: as in its ``engine.json``.
        seconds: by graph.
        trtexec: the command that builds the same, by graph.
    """

    folder: Path
    manifest: EngineManifest
    seconds: Mapping[str, float]
    trtexec: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {"folder": str(self.folder), "seconds": dict(self.seconds), "trtexec": dict(self.trtexec)}
        return asdict(self.manifest) | found


def engine_profiles(check: BuildCheck, graph: str) -> tuple[EngineProfile, ...]:
    """Optimization profiles of a graph, in the order of their numbers."""
    inputs = check.subject.contracts[graph][0]
    found = []
    for profile in check.profiles:
        if profile.graph != graph:
            continue
        sizes = [sizes_of(inputs, profile.corners[corner]) for corner in CORNERS]
        shapes = {spec.name: (sizes[0][spec.name].shape, sizes[1][spec.name].shape, sizes[2][spec.name].shape)
                  for spec in inputs}  # fmt: skip
        found.append(EngineProfile(name=profile.name, shapes=shapes))
    return tuple(found)


def build_engines(order: BuildOrder, machine: BuildMachine) -> BuiltEngines:
    """Build every graph and write ``engines/<tag>/``, in the place of what was there.

    Raises:
        DeviceError: the plugin library does not load, or a graph cannot be built.
        InputError: there is no such timing cache, or the plugin library cannot be read.
        OutputError: the disk is full, or the bundle cannot be written.
    """
    target = engine_folder(order.bundle, machine.sm, machine.tensorrt.version)
    _check_disk(order, target)
    with _folder(target) as folder:
        build = _Build(order=order, machine=machine, folder=folder, target=target)
        if order.library is not None:
            build.load_plugins(order.library[0])
        graphs = {name: build.graph(name) for name in order.check.subject.graphs}
        build.cache.write(folder / TIMING_CACHE)
        manifest = build.manifest(graphs)
        manifest.write(folder / ENGINE_MANIFEST)
    return BuiltEngines(folder=target, manifest=manifest, seconds=build.seconds, trtexec=build.trtexec)


def _check_disk(order: BuildOrder, target: Path) -> None:
    plan = order.check.plan
    if plan is None:
        return
    needed = sum(item.nbytes for item in plan.items if item.name.endswith("weights"))
    free = shutil.disk_usage(order.bundle).free
    if needed > free:
        raise OutputError(
            f"{target}: the engines take at least {needed / 2**30:.1f} GB, {free / 2**30:.1f} GB of the disk are free; "
            "make room, or copy the bundle to another disk"
        )


@contextlib.contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place if all goes well, and is gone if not."""
    temporary = target.parent / f"{_BUILDING}-{target.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        _forget_dead(target.parent)
        yield temporary
        if target.exists():
            old = target.parent / f"{_BUILDING}-old-{os.getpid()}"
            target.rename(old)
            try:
                temporary.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"{target}: the disk is full; make room, nothing was kept") from None
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first build of this bundle, and it failed
            target.parent.rmdir()


def _forget_dead(engines: Path) -> None:
    """Remove what builds left behind that were killed."""
    for path in engines.glob(f"{_BUILDING}-*"):
        try:
            os.kill(int(path.name.rsplit("-", 1)[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError):
            continue  # of somebody else, and alive


@dataclass(slots=True, kw_only=True)
class _Build:
    """One run: what its graphs share."""

    order: BuildOrder
    machine: BuildMachine
    folder: Path
    target: Path
    cache: TimingCache = field(init=False)
    seconds: dict[str, float] = field(default_factory=dict)
    trtexec: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.order.timing_cache
        if given is not None and not given.is_file():
            raise InputError(f"--timing-cache {given}: there is no such file; leave the flag out to begin anew")
        self.cache = TimingCache(given if given is not None else self.target / TIMING_CACHE)

    def load_plugins(self, library: Path) -> None:
        """Load the library, and copy it beside the engines."""
        try:
            self.machine.tensorrt.load_plugins(library.resolve())
            data = library.read_bytes()
        except OSError as error:
            raise InputError(
                f"{library}: the plugin library cannot be read ({error.strerror or error}); name another with --plugins"
            ) from None
        (self.folder / library.name).write_bytes(data)

    def graph(self, name: str) -> EngineGraph:
        """Build one and write its plan."""
        start = time.monotonic()
        source, plan = self._source(name), self.folder / f"{name}.plan"
        with progress_of(name, shown=self.order.progress) as progress:
            plan.write_bytes(plan_from_onnx(self.machine.tensorrt, source, self.cache, progress))
        self.seconds[name] = round(time.monotonic() - start, 3)
        self.trtexec[name] = self._trtexec(source)
        digest = file_sha256(plan)
        return EngineGraph(file=plan.name, size=plan.stat().st_size, sha256=digest, profiles=source.profiles)

    def _source(self, name: str) -> GraphSource:
        bundle, check = self.order.bundle, self.order.check
        assert check.plan is not None, "what is to be built has been planned"
        return GraphSource(
            name=name,
            path=bundle / Manifest.read(bundle).graphs[name].file,
            contract=check.subject.contracts[name],
            profiles=engine_profiles(check, name),
            precision=precision_of(self.machine.tensorrt.module, check.subject.graphs[name].graph),
            workspace=next(item.nbytes for item in check.plan.items if item.name == "workspace"),
        )

    def _trtexec(self, source: GraphSource) -> str:
        files = {"saveEngine": f"{source.name}.plan", "timingCacheFile": TIMING_CACHE}
        if self.order.library is not None:
            files["dynamicPlugins"] = self.order.library[0].name
        paths = {flag: self.target / name for flag, name in files.items()}
        return trtexec_command(source, paths, version_of(self.machine.tensorrt.module))

    def manifest(self, graphs: dict[str, EngineGraph]) -> EngineManifest:
        """What ``engine.json`` says."""
        check = self.order.check
        return EngineManifest(
            target=check.subject.target,
            tensorrt=self.machine.tensorrt.version,
            sm=self.machine.sm,
            card=self.machine.card,
            created_by=self.order.command,
            deepstitch=__version__,
            bundle_sha256=file_sha256(self.order.bundle / MANIFEST_NAME),
            plugins=self._plugins(),
            limits=check.limits,
            graphs=graphs,
        )

    def _plugins(self) -> PluginRecord | None:
        if self.order.library is None:
            return None
        path, contents = self.order.library
        if contents.described is None:
            raise UnsupportedError(f"{path} cannot be opened here: {contents.not_opened}")
        return PluginRecord(
            file=path.name,
            version=", ".join(sorted({each["version"] for each in contents.described["ops"]})),
            sha256=file_sha256(self.folder / path.name),
            targets=contents.targets,
        )
