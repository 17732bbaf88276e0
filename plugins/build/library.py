"""The plugin library for GPUs: every operator's machine code and host code in one shared object.

Per operator NVRTC makes a cubin for each architecture and PTX for the oldest, and nvFatbin puts them into one fatbin.
The fatbins become sections of the library (``.deepstitch.<operator>``), beside the host code that g++ compiled. Nothing
is linked against CUDA: the driver is opened at the first launch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepstitch.errors import OutputError
from deepstitch.plugins.build import fatbin, nvrtc, objects
from deepstitch.plugins.build.tensorrt import TensorRT
from deepstitch.plugins.build.toolchain import ToolchainError, package_root
from deepstitch.plugins.registry import OPS

__all__ = ["SECTION", "BuildConfig", "BuildReport", "build_library", "check_architectures", "steps"]

SECTION = ".deepstitch."  # and the operator's folder: the sections that hold fatbins, see common/embedded.cpp
PTX = 61  # what newer cards compile for themselves, with a driver for CUDA 12.9 or later


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """What to build.

    Attributes:
        output: folder of the library.
        sms: compute capabilities that get machine code; 61 is 6.1.
        ops: folders of the operators; fewer than all of them for tests.
        tensorrt: headers to compile the adapters against; None leaves the adapters out.
        jobs: compilers that run side by side; 0 takes one per core.
    """

    output: Path
    sms: tuple[int, ...] = (61, 75, 86, 90)
    ops: tuple[str, ...] = tuple(OPS)
    tensorrt: TensorRT | None = None
    jobs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What was built; ``kernels`` holds ptxas' figures by operator, kernel and architecture."""

    library: Path
    sha256: str
    size_bytes: int
    targets: tuple[str, ...]
    compilers: dict[str, str]
    tensorrt: str | None
    seconds: float
    fatbin_bytes: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, dict[str, dict[str, dict[str, int]]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"library": str(self.library)}


Progress = Callable[[str], None]  # called with what was finished


def check_architectures(sms: Sequence[int]) -> None:
    """Refuse architectures that NVRTC does not compile for.

    Raises:
        ToolchainError: with those that it does, or with what to install.
    """
    known = nvrtc.architectures()
    for sm in sms:
        if sm not in known:
            usable = ", ".join(str(each) for each in known if each >= PTX)
            hint = " (write 61 for compute capability 6.1)" if sm < 10 else ""
            older = "; dp4a, which the kernels need, came with 61" if sm < PTX else ""
            raise ToolchainError(
                f"--sm {sm} is unknown to NVRTC {_dotted(nvrtc.version())}{hint}; it has {usable}{older}"
            )
        if sm < PTX:
            raise ToolchainError(f"--sm {sm}: the kernels need dp4a, which came with compute capability 6.1 (--sm 61)")


def steps(config: BuildConfig) -> int:
    """How often :func:`build_library` reports progress."""
    return len(config.ops) * len(_targets(config.sms)) + len(_units(config, Path()))


def build_library(config: BuildConfig, progress: Progress = lambda _: None) -> BuildReport:
    """Compile every operator and write the library and, beside it, the report as JSON.

    Raises:
        ToolchainError: a compiler is missing or fails.
        OutputError: the folder cannot be written.
    """
    start = time.monotonic()
    check_architectures(config.sms)
    name = f"libdeepstitch_plugins{config.tensorrt.suffix if config.tensorrt else ''}.so"
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=config.output) as folder:
            compiled = _compile_kernels(config, progress)
            sizes = _write_fatbins(Path(folder), compiled)
            made = objects.compile_all(_units(config, Path(folder)), Path(folder), config.jobs, progress)
            built = Path(folder) / name
            objects.link(made, built, config.tensorrt.link_flags if config.tensorrt else ())
            report = _report(config, config.output / name, built, compiled, sizes, time.monotonic() - start)
            note = Path(folder) / "report.json"
            note.write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
            built.replace(report.library)
            note.replace(report.library.with_suffix(".json"))
    except OSError as error:
        raise OutputError(f"{config.output}: {error.strerror or error}; choose another folder with -o") from error
    return report


Compiled = dict[str, dict[str, nvrtc.Compiled]]  # by operator and architecture


def _compile_kernels(config: BuildConfig, progress: Progress) -> Compiled:
    def one(task: tuple[str, str]) -> nvrtc.Compiled:
        result = nvrtc.compile_source(package_root() / task[0] / "kernel.cuh", task[1])
        progress(f"{task[0]} {task[1]}")
        return result

    tasks = [(folder, target) for folder in config.ops for target in _targets(config.sms)]
    with ThreadPoolExecutor(config.jobs or os.cpu_count()) as pool:
        results = list(pool.map(one, tasks))
    compiled: Compiled = {folder: {} for folder in config.ops}
    for (folder, target), result in zip(tasks, results, strict=True):
        compiled[folder][target] = result
    return compiled


def _targets(sms: Sequence[int]) -> tuple[str, ...]:
    return (*(f"sm_{sm}" for sm in sorted(set(sms))), f"compute_{PTX}")


def _write_fatbins(folder: Path, compiled: Compiled) -> dict[str, int]:
    """Write ``<operator>.fatbin``; return their sizes."""
    sizes = {}
    for op, images in compiled.items():
        cubins = {int(name[3:]): each.image for name, each in images.items() if name.startswith("sm_")}
        ptx = {int(name[8:]): each.image for name, each in images.items() if name.startswith("compute_")}
        data = fatbin.pack(op, cubins, ptx)
        (folder / f"{op}.fatbin").write_bytes(data)
        sizes[op] = len(data)
    return sizes


def _units(config: BuildConfig, folder: Path) -> list[objects.Unit]:
    """Every source of the library and its flags: what all operators share, one ``op.cpp`` each, the adapters."""
    chosen = f"-DDEEPSTITCH_OPS={' '.join(f'DEEPSTITCH_OP({op})' for op in config.ops)}"
    targets = " ".join(_targets(config.sms))
    embedded = (chosen, f'-DDEEPSTITCH_FATBINS="{folder.resolve()}"', f'-DDEEPSTITCH_TARGETS="{targets}"')
    units = []
    for source in sorted((package_root() / "common").glob("*.cpp")):
        if source.name == "embedded.cpp":
            units.append(objects.Unit(source=source, flags=embedded, cached=False))
        elif source.name != "launcher_host.cpp":
            units.append(objects.Unit(source=source, flags=(chosen,) if source.name == "registry.cpp" else ()))
    units += [objects.Unit(source=package_root() / op / "op.cpp") for op in config.ops]
    if config.tensorrt:
        flags = (chosen, *config.tensorrt.compile_flags)
        for source in config.tensorrt.sources:
            if source.parent.parent.name in {"common", *config.ops}:
                units.append(objects.Unit(source=source, flags=flags, cached=False))
    return units


def _report(
    config: BuildConfig, library: Path, built: Path, compiled: Compiled, sizes: dict[str, int], seconds: float
) -> BuildReport:
    data = built.read_bytes()
    return BuildReport(
        library=library,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        targets=_targets(config.sms),
        compilers={"nvrtc": _dotted(nvrtc.version()), "c++": objects.compiler_version()},
        tensorrt=config.tensorrt.version if config.tensorrt else None,
        seconds=round(seconds, 1),
        fatbin_bytes=sizes,
        kernels={op: _usage(images) for op, images in compiled.items()},
    )


def _usage(images: Mapping[str, nvrtc.Compiled]) -> dict[str, dict[str, dict[str, int]]]:
    found: dict[str, dict[str, dict[str, int]]] = {}
    for target, image in images.items():
        for kernel, usage in image.usage.items():
            found.setdefault(kernel, {})[target] = asdict(usage)
    return found


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
