"""The operators on an NVIDIA GPU: every case against its reference, and the time of each against what the card can do.

    python -m benchmarks.plugins_gpu --prepare gpu                # where NVRTC is; needs no GPU
    python -m benchmarks.plugins_gpu --prepared gpu               # where the GPU is; needs neither NVRTC nor g++
    python -m benchmarks.plugins_gpu                              # both

Every case of every operator runs twice on the card: the numbers are those of the reference within the case's
tolerance, and the same bits both times. Then the operators run at the shapes of 30B-A3B, 2B and vl-sm61: median GPU
time between two events with the L2 cache overwritten before each call, beside the time that the bytes and the
arithmetic the call cannot do without would take at the card's own measured copy bandwidth and arithmetic rates, and
beside PyTorch doing the same work on the same card where it is installed. The report is named by the card and written
again after every measurement: an interrupted run leaves what it has.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import write_report
from benchmarks.gpu.device import Card, ceilings_fatbin
from benchmarks.gpu.shapes import FULL, TINY, Measurement, measurements
from deepstitch.plugins.common.case import Array, nmse
from deepstitch.plugins.common.roofline import Work
from deepstitch.plugins.library import DeviceLibrary
from deepstitch.plugins.registry import OPS, load

RESULTS = Path(__file__).with_name("results")
LIBRARY, CEILINGS = "libdeepstitch_plugins.so", "ceilings.fatbin"
GOAL_BANDWIDTH, GOAL_SPARSE = 0.7, 5.0
# Of a result in float16 against ours in float32; for seeing that both did the same, not for judging either.
SAME = 1e-3


def prepare(folder: Path, sms: tuple[int, ...]) -> None:
    """Build the library and the measuring kernels."""
    from deepstitch.plugins.build.library import BuildConfig, build_library

    build_library(BuildConfig(output=folder, sms=sms))
    (folder / CEILINGS).write_bytes(ceilings_fatbin(sms))


def check_cases(library: DeviceLibrary, op: str) -> dict[str, Any]:
    """Run every case of one operator."""
    loaded = load(op)
    failed = {}
    for case in loaded.cases:
        inputs = case.make()
        try:
            first, again = (library.run(loaded.schema.name, case.attributes, inputs) for _ in range(2))
        except Exception as error:  # the others still count; a lost context makes them all fail, and says so
            failed[case.name] = str(error)
            continue
        wanted = loaded.reference(loaded.schema.resolve(case.attributes), inputs)
        errors = {name: nmse(first[name], wanted[name]) for name in wanted}
        if any(first[name].tobytes() != again[name].tobytes() for name in wanted):
            failed[case.name] = "two runs differ"
        elif max(errors.values()) > case.nmse:
            failed[case.name] = f"nmse {max(errors.values()):.2e} is over {case.nmse:.0e}"
    return {"cases": len(loaded.cases), "passed": len(loaded.cases) - len(failed), "failed": failed}


def bound_seconds(work: Work, ceilings: Mapping[str, float]) -> tuple[float, str]:
    """The least time at the card's measured rates, and what sets it."""
    memory = work.nbytes / ceilings["copy_bytes_per_second"]
    arithmetic = work.float_ops / ceilings["float_ops_per_second"]
    arithmetic += work.integer_ops / ceilings["dp4a_ops_per_second"]
    return max((memory, "memory"), (arithmetic, "arithmetic"))


def measure(
    library: DeviceLibrary, card: Card, call: Measurement, ceilings: Mapping[str, float], peers: str | None
) -> dict[str, Any]:
    """Time one call and whatever does the same."""
    arrays = call.inputs()
    work = call.work(arrays)
    with (
        library.create(OPS[call.op], call.attributes) as instance,
        instance.prepare(arrays, shared=call.shared) as prepared,
    ):
        prepared.enqueue()  # fills with NaN first: what is not written shows
        ours = next(iter(prepared.outputs().values()))
        timed = card.time(lambda: prepared.enqueue(fill=False))
        workspace = prepared.workspace_bytes
    seconds = timed["median"] / 1e3
    bound, limit = bound_seconds(work, ceilings)
    found = {
        "op": call.op,
        "name": call.name,
        **call.facts,
        "milliseconds": timed,
        "workspace_bytes": workspace,
        "bytes": work.nbytes,
        "operations": work.float_ops + work.integer_ops,
        "bytes_per_second": work.nbytes / seconds,
        "of_copy_bandwidth": work.nbytes / seconds / ceilings["copy_bytes_per_second"],
        "bound_by": limit,
        "of_bound": bound / seconds,
        "finite": bool(np.isfinite(ours).all()),
    }
    return found | (compare_with_peers(card, call, arrays, ours, seconds, peers) if peers else {})


def compare_with_peers(
    card: Card, call: Measurement, arrays: Mapping[str, Array], ours: Array, seconds: float, device: str
) -> dict[str, Any]:
    """Time PyTorch's ways and compare their results with ours."""
    from benchmarks.gpu import peers

    found = {}
    try:
        ways = peers.peers_of(call, arrays, device)
    except Exception as error:  # mostly memory: the operator's own time still counts
        return {"peers_failed": str(error)[:300]}
    for name, way in ways.items():
        try:
            result = peers.to_numpy(way()).reshape(ours.shape)
            graph = peers.captured(way) if device != "cpu" else None
            timed = card.time(graph or way)
        except Exception as error:
            found[name] = {"failed": str(error)[:300]}
            continue
        difference = nmse(ours, result)
        found[name] = {"milliseconds": timed, "graph": graph is not None, "nmse": difference, "same": difference < SAME}
    best = min((each["milliseconds"]["median"] for each in found.values() if each.get("same")), default=None)
    return {"peers": found, "times_the_best_peer": None if best is None else best / 1e3 / seconds}


def goals(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What was to be reached, and whether it was, for each measurement it concerns."""
    dense = {_place(each): each for each in found if each.get("pattern") == "dense"}
    for each in found:
        decodes = each["op"] in ("moe_experts", "sparse_attention") and each.get("phase") == "decode"
        if decodes and each["bound_by"] == "memory":
            reached = each["of_copy_bandwidth"]
            yield {"goal": "of the copy bandwidth", "name": each["name"], "value": reached,
                   "reached": reached >= GOAL_BANDWIDTH}  # fmt: skip
        if decodes and each.get("times_the_best_peer"):
            value = each["times_the_best_peer"]
            yield {"goal": "times the best peer", "name": each["name"], "value": value, "reached": value > 1}
        sparse = each["op"] == "sparse_attention" and each["pattern"] != "dense" and each["fraction"] == 0.1
        if sparse and each["context"] == 32768 and _place(each) in dense:
            value = dense[_place(each)]["milliseconds"]["median"] / each["milliseconds"]["median"]
            yield {"goal": "times its own dense form at 32k", "name": each["name"], "value": value,
                   "reached": value >= GOAL_SPARSE}  # fmt: skip


def _place(each: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a dense and a sparse call have in common."""
    return tuple(each.get(name) for name in ("op", "model", "phase", "tokens", "batch", "context", "format"))


def line(found: Mapping[str, Any]) -> str:
    """One measurement for the eye."""
    text = f"{found['op']:<17}{found['name']:<48}{found['milliseconds']['median'] * 1e3:>10.1f} us"
    text += f"{found['bytes_per_second'] / 1e9:>9.1f} GB/s{found['of_copy_bandwidth']:>7.0%} of copy"
    text += f"{found['of_bound']:>7.0%} of the {found['bound_by']} bound"
    times = found.get("times_the_best_peer")
    return text + (f"  {times:.2f} x the best peer" if times else "")


def peer_device() -> str | None:
    """``cuda`` where PyTorch is installed and sees a card."""
    try:
        import torch
    except ImportError:
        return None
    return "cuda" if torch.cuda.is_available() else None


def file_name(card: str) -> str:
    """Of the report."""
    return f"plugins_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check and measure everything that was asked for; the report is written as it grows."""
    library = DeviceLibrary.open(options.prepared / LIBRARY, options.device)
    card = Card(library.driver, (options.prepared / CEILINGS).read_bytes(), megabytes=options.megabytes,
                seconds=options.seconds)  # fmt: skip
    report: dict[str, Any] = {"card": card.describe(), "targets": library.describe()["targets"]}
    output = options.output or RESULTS / file_name(library.driver.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def write() -> None:
        report["seconds"] = round(time.monotonic() - began, 1)
        write_report("plugins_gpu", report, output, show=False)

    report["cases"] = {}
    for op in () if options.skip_cases else OPS:
        report["cases"][op] = check_cases(library, op)
        print(f"{op:<17}{report['cases'][op]['passed']} of {report['cases'][op]['cases']} cases", flush=True)
        for name, why in report["cases"][op]["failed"].items():
            print(f"  FAILED {name}: {why}", flush=True)
        write()
    report["ceilings"] = card.ceilings(options.rounds)
    print({name: f"{value:.3e}" for name, value in report["ceilings"].items()}, flush=True)
    peers = None if options.no_peers else options.peer_device or peer_device()
    report["peers"] = peers
    report["measurements"] = found = []
    for call in measurements(TINY if options.tiny else FULL):
        if re.search(options.only, f"{call.op} {call.name}"):
            try:
                found.append(measure(library, card, call, report["ceilings"], peers))
            except Exception as error:  # a card without the memory for this shape has it for others
                report.setdefault("not_measured", {})[f"{call.op} {call.name}"] = str(error)[:300]
                print(f"{call.op:<17}{call.name}: {error}", flush=True)
                continue
            print(line(found[-1]), flush=True)
            report["goals"] = list(goals(found))
            write()
    card.close()
    write()
    print(f"report: {output}", flush=True)
    return report


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code is 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plugins_gpu", description=str(__doc__).split("\n")[0])
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="only build the library into this folder")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="take the library from this folder")
    parser.add_argument("--sm", default="61,75,80,86,90", help="machine code to build (default: %(default)s)")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="report (default: benchmarks/results, named by the card)")
    parser.add_argument("--only", default="", metavar="REGEX", help="of operator and name of the measurements")
    parser.add_argument("--seconds", type=float, default=0.4, help="per measurement, about (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=512, help="of a bandwidth buffer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=256, help="of the arithmetic kernels (default: %(default)s)")
    parser.add_argument("--skip-cases", action="store_true", help="measure only")
    parser.add_argument("--no-peers", action="store_true", help="leave PyTorch out")
    parser.add_argument("--peer-device", help="of PyTorch (default: cuda where there is one)")
    parser.add_argument("--tiny", action="store_true", help="shapes for trying this script out")
    options = parser.parse_args(arguments)
    folder = options.prepare or options.prepared or Path("build") / "plugins_gpu"
    if options.prepared is None:
        prepare(folder, tuple(int(each) for each in options.sm.split(",")))
    if options.prepare is not None:
        return 0
    options.prepared = folder
    report = run(options)
    return 1 if any(each["failed"] for each in report["cases"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
