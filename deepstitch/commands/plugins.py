"""``deepstitch plugins``: build the operators' library for GPUs, list what one holds, check it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from deepstitch.plugins.build.contents import Contents
    from deepstitch.plugins.build.library import BuildReport

__all__ = ["command"]


@click.group("plugins")
def command() -> None:
    """Build, list and check the operators' library for NVIDIA GPUs.

    \b
    deepstitch plugins build --sm 61 -o plugins
    deepstitch plugins check plugins/libdeepstitch_plugins.so
    """


def _architectures(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    words = [word.strip().lower().removeprefix("sm_") for word in value.split(",") if word.strip()]
    if not words or not all(word.isdigit() for word in words):
        raise click.BadParameter("write compute capabilities without the dot, with commas between: 61,75,86,90")
    return tuple(sorted({int(word) for word in words}))


@command.command("build")
@click.option(
    "--sm",
    "sms",
    default="61,75,86,90",
    callback=_architectures,
    help="Compute capabilities that get machine code; newer cards compile the PTX for 6.1 that is always included.",
)
@click.option(
    "--tensorrt-root",
    type=click.Path(path_type=Path),
    help="TensorRT's folder or that of its headers, for the adapters; or set TENSORRT_ROOT or TENSORRT_INCLUDE_DIR.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=".", help="Folder of the library.")
@click.option("--jobs", type=click.IntRange(min=0), default=0, help="Compilers side by side; 0: one per core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the summary.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def build(
    sms: tuple[int, ...], tensorrt_root: Path | None, output: Path, jobs: int, as_json: bool, quiet: bool
) -> None:
    """Compile every operator for GPUs into one library, with pip's NVRTC and g++.

    No CUDA toolkit and no GPU are needed. Without TensorRT's headers the library has no adapters: Python and C
    programs use it, TensorRT cannot. A report in JSON lies beside the library.

    \b
    deepstitch plugins build
    deepstitch plugins build --sm 61 --tensorrt-root TensorRT-8.6.1.6 -o plugins
    """
    from tqdm.auto import tqdm

    from deepstitch.plugins.build.library import BuildConfig, build_library, steps
    from deepstitch.plugins.build.tensorrt import find_tensorrt

    tensorrt = find_tensorrt(tensorrt_root)
    config = BuildConfig(output=output, sms=sms, tensorrt=tensorrt, jobs=jobs)
    with tqdm(total=steps(config), desc="compile", unit="file", disable=True if quiet else None) as bar:
        report = build_library(config, lambda _: bar.update())
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else "\n".join(_summary(report)))


def _summary(report: BuildReport) -> Iterator[str]:
    yield f"{report.library}: {report.size_bytes / 2**20:.2f} MiB in {report.seconds:.1f} s"
    yield f"  compilers  NVRTC {report.compilers['nvrtc']}, {report.compilers['c++']}"
    yield f"  code for   {', '.join(report.targets)}"
    for op, kernels in report.kernels.items():
        yield f"  {op:<18}{len(kernels):>3} kernels, {report.fatbin_bytes[op] / 2**10:,.0f} KiB"
    if report.tensorrt:
        yield f"  adapters for TensorRT {report.tensorrt}"
    else:
        yield "  no TensorRT adapters: there are no headers; name them with --tensorrt-root or TENSORRT_INCLUDE_DIR"


@command.command("list")
@click.argument("library", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def list_(library: Path | None, as_json: bool) -> None:
    """List operators with versions and formats, and the architectures LIBRARY has code for.

    Without LIBRARY: what this deepstitch can build.
    """
    contents = None
    if library is not None:
        from deepstitch.plugins.build.contents import read_library

        contents = read_library(library)
    found = _listing(contents)
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(_list_lines(found)))


def _listing(contents: Contents | None) -> dict[str, Any]:
    from deepstitch.plugins.build.contents import formats_of, schema_of
    from deepstitch.plugins.registry import OPS

    described = {} if contents is None else contents.described or {}
    present = {each["name"]: each["version"] for each in described.get("ops", ())}
    operators = []
    for folder, name in OPS.items():
        schema = schema_of(folder)
        if described and name not in present:
            continue
        formats = formats_of(schema)
        operators.append(
            {
                "folder": folder,
                "name": name,
                "version": present.get(name, schema.version),
                "formats": formats,
                "kernels": _kernels(contents, folder),
            }
        )
    return {"library": None if contents is None else str(contents.path), "operators": operators} | _about(contents)


def _kernels(contents: Contents | None, folder: str) -> list[str]:
    from deepstitch.plugins.build.contents import kernels_of

    return [name for code in (contents.code if contents else ()) if code.op == folder for name in kernels_of(code)]


def _about(contents: Contents | None) -> dict[str, Any]:
    if contents is None:
        return {}
    return {
        "runs_on": (contents.described or {}).get("launcher", "driver" if contents.code else None),
        "targets": list(contents.targets),
        "tensorrt": contents.tensorrt,
        "not_opened": contents.not_opened,
    }


def _list_lines(found: dict[str, Any]) -> Iterator[str]:
    if found["library"]:
        where = "the CPU, through the host shim" if found["runs_on"] == "host" else "NVIDIA GPUs"
        yield f"{found['library']}: runs on {where}"
        yield f"  code for   {', '.join(found['targets']) or 'no GPU'}"
        yield f"  TensorRT   {'has adapters' if found['tensorrt'] else 'no adapters'}"
        if found["not_opened"]:
            yield f"  could not be opened here: {found['not_opened']}"
    for each in found["operators"]:
        kernels = f", {len(each['kernels'])} kernels" if each["kernels"] else ""
        yield f"{each['name']} (plugins/{each['folder']}), version {each['version']}{kernels}"
        for name, choices in each["formats"].items():
            yield f"  {name}: {', '.join(map(str, choices))}"


@command.command("check")
@click.argument("library", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.pass_context
def check(ctx: click.Context, library: Path, as_json: bool) -> None:
    """Hold LIBRARY against what the operators declare and promise; needs no GPU.

    Attributes and versions must be those of this deepstitch. The sm_61 code must fit the occupancy the operators state,
    use dp4a and 128-bit loads where they say so, and spill nothing; a table of these figures is printed. The exit
    code is 1 if something does not hold.
    """
    from deepstitch.plugins.build.contents import failures, read_library, static_figures

    contents = read_library(library)
    found = static_figures(contents)
    said = failures(contents, found)
    if as_json:
        figures = {op: [each.to_dict() for each in rows] for op, rows in found.items()}
        click.echo(json.dumps(_listing(contents) | {"figures": figures, "problems": said}, indent=1))
    else:
        click.echo("\n".join([*_list_lines(_listing(contents)), *_figure_lines(found), *_verdict(said, contents)]))
    if said:
        ctx.exit(1)


def _figure_lines(found: dict[str, Any]) -> Iterator[str]:
    from deepstitch.plugins.build.static_checks import expected_of, table

    for op, rows in found.items():
        yield ""
        yield from table(rows, expected_of(op))


def _verdict(said: list[str], contents: Contents) -> Iterable[str]:
    yield ""
    if not said:
        what = "sm_61 code and declarations" if "sm_61" in contents.targets else "declarations (there is no sm_61 code)"
        yield f"{what}: as promised"
    yield from (f"FAILED  {each}" for each in said)
