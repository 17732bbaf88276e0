"""What can be said about a kernel on sm_61 without running it, held against what its operator promises.

``plugins/<operator>/static.py`` has ``EXPECTED``: patterns of kernel names, and for each an :class:`Expect`. Always
wanted: no spills, PTX for compute_61, no fp16 arithmetic (1/64 of the rate on these cards), no atomics on floats (their
order is not fixed).

``python -m deepstitch.plugins.build.static_checks`` prints the table and what does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from deepstitch.plugins.build import cubin, nvrtc, sass
from deepstitch.plugins.build.library import PTX
from deepstitch.plugins.build.toolchain import ToolchainError, package_root
from deepstitch.plugins.registry import OPS

__all__ = ["Expect", "Figures", "compile_and_read", "expected_of", "figures", "problems", "resident_blocks", "table"]

# Compute capability 6.1, per multiprocessor
_REGISTERS, _WARPS, _BLOCKS, _SHARED = 65536, 64, 32, 98304
_REGISTER_UNIT, _SHARED_UNIT, _WARP_UNIT = 256, 256, 4

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(")
_TARGET = re.compile(r"^\.target\s+(\w+)", re.MULTILINE)
_COUNTED = {
    "ptx_dp4a": re.compile(r"\bdp4a\."),
    "ptx_wide_loads": re.compile(r"\bld\.global(?:\.\w+)*\.(?:v4\.[usbf]32|v2\.[usbf]64)\b"),
    "ptx_double": re.compile(r"\b(?:add|sub|mul|fma|div|sqrt|cvt)(?:\.\w+)*\.f64\b"),
    "ptx_half": re.compile(r"\b(?:add|sub|mul|fma|neg|max|min)(?:\.\w+)*\.f16(?:x2)?\b"),
    "ptx_float_atomics": re.compile(r"\b(?:atom|red)(?:\.\w+)*\.f(?:16|32|64)\b"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """What an operator promises about a kernel on sm_61.

    Attributes:
        min_blocks_per_sm: blocks that fit on a multiprocessor at once.
        dynamic_shared: bytes of shared memory a launch adds, at most.
        dp4a: the machine code multiplies with IDP, inside a loop.
        wide_loads: it reads global memory 16 bytes at a time, inside a loop.
        stack_bytes: of local memory that are meant (an indexed array); spills never are.
        double: double precision is meant.
    """

    min_blocks_per_sm: int
    dynamic_shared: int = 0
    dp4a: bool = False
    wide_loads: bool = False
    stack_bytes: int = 0
    double: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One kernel on sm_61: what ptxas reports, what the machine code shows, and what its PTX shows."""

    op: str
    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    spill_bytes: int | None  # None where only the machine code is at hand
    code: sass.Counts
    ptx_target: str = ""
    ptx_dp4a: int = 0
    ptx_wide_loads: int = 0
    ptx_double: int = 0
    ptx_half: int = 0
    ptx_float_atomics: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compile_and_read(op: str) -> list[Figures]:
    """Compile an operator for sm_61 and compute_61 and look at every kernel.

    Raises:
        ToolchainError: there is no NVRTC, or it refuses the source.
    """
    source = package_root() / op / "kernel.cuh"
    code = nvrtc.compile_source(source, "sm_61")
    ptx = nvrtc.compile_source(source, f"compute_{PTX}")
    return figures(op, code.image, ptx.image, code.usage)


def figures(op: str, image: bytes, ptx: bytes = b"", usage: Mapping[str, nvrtc.Usage] | None = None) -> list[Figures]:
    """Read every kernel of a cubin for sm_61 and of the PTX that belongs to it."""
    read = cubin.read_cubin(image)
    texts = _entries(ptx.decode("utf-8", "replace"))
    target = _TARGET.search(ptx.decode("utf-8", "replace"))
    found = []
    for kernel in read.kernels:
        counts = sass.count(kernel.code, read.sm)
        if counts is None:
            raise ToolchainError(f"{op}: machine code for sm_{read.sm} is not what is checked here; sm_61 is")
        reported = (usage or {}).get(kernel.name)
        text = texts.get(kernel.name, "")
        found.append(
            Figures(
                op=op,
                kernel=kernel.name,
                registers=kernel.registers,
                stack_bytes=kernel.stack_bytes,
                shared_bytes=kernel.shared_bytes,
                threads=kernel.max_threads,
                spill_bytes=reported.spill_store_bytes + reported.spill_load_bytes if reported else None,
                code=counts,
                ptx_target=target[1] if target else "",
                **{name: len(pattern.findall(text)) for name, pattern in _COUNTED.items()},
            )
        )
    return found


def _entries(ptx: str) -> dict[str, str]:
    """The text of each kernel; a function that was not inlined counts to the kernel before it."""
    starts = list(_ENTRY.finditer(ptx))
    ends = [each.start() for each in starts] + [len(ptx)]
    return {each[1]: ptx[each.start() : end] for each, end in zip(starts, ends[1:], strict=True)}


def resident_blocks(registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks of one kernel that an sm_61 multiprocessor holds at once."""
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // per_warp // _WARP_UNIT * _WARP_UNIT // warps
    taken = -(-shared_bytes // _SHARED_UNIT) * _SHARED_UNIT
    by_shared = _SHARED // taken if taken else _BLOCKS
    return min(_BLOCKS, _WARPS // warps, by_registers, by_shared)


def expected_of(op: str) -> Mapping[str, Expect]:
    """``EXPECTED`` of an operator's ``static.py``."""
    expected: Mapping[str, Expect] = importlib.import_module(f"deepstitch.plugins.{op}.static").EXPECTED
    return expected


def expectation(kernel: str, expected: Mapping[str, Expect]) -> Expect | None:
    """The first entry whose pattern fits."""
    return next((each for pattern, each in expected.items() if fnmatchcase(kernel, pattern)), None)


def problems(found: Sequence[Figures], expected: Mapping[str, Expect]) -> list[str]:
    """What does not hold, one sentence each; empty where everything does."""
    said = []
    for each in found:
        wanted = expectation(each.kernel, expected)
        said += [f"{each.kernel}: {text}" for text in _forbidden(each)]
        if wanted is None:
            said.append(f"{each.kernel}: static.py says nothing about it")
        else:
            said += [f"{each.kernel}: {text}" for text in _missing(each, wanted)]
    for pattern in expected:
        if not any(expectation(each.kernel, expected) is expected[pattern] for each in found):
            said.append(f"{pattern}: static.py speaks of it, no kernel has such a name")
    return said


def _forbidden(each: Figures) -> list[str]:
    said = []
    if each.spill_bytes:
        said.append(f"spills {each.spill_bytes} bytes of registers")
    if each.ptx_target and each.ptx_target != f"sm_{PTX}":
        said.append(f"its PTX is for {each.ptx_target}, not sm_{PTX}")
    for count, what in (
        (each.ptx_half, "fp16 arithmetic instructions (1/64 of the rate)"),
        (each.ptx_float_atomics, "atomic operations on floats (their order is not fixed)"),
    ):
        if count:
            said.append(f"has {count} {what}")
    return said


def _missing(each: Figures, wanted: Expect) -> list[str]:
    said = []
    if each.stack_bytes > wanted.stack_bytes:
        said.append(f"takes {each.stack_bytes} bytes of local memory per thread, {wanted.stack_bytes} are meant")
    if each.ptx_double and not wanted.double:
        said.append(f"has {each.ptx_double} double precision instructions (1/32 of the rate)")
    if each.code.local and not wanted.stack_bytes:
        said.append(f"has {each.code.local} loads and stores of local memory")
    blocks = resident_blocks(each.registers, each.threads, each.shared_bytes + wanted.dynamic_shared)
    if blocks < wanted.min_blocks_per_sm:
        said.append(
            f"{blocks} blocks fit on a multiprocessor, not {wanted.min_blocks_per_sm} ({each.registers} registers, "
            f"{each.threads} threads, {each.shared_bytes} + {wanted.dynamic_shared} bytes of shared memory)"
        )
    if wanted.dp4a and not (each.code.dp4a_in_loops and each.ptx_dp4a):
        said.append(f"no dp4a in a loop ({each.code.dp4a} IDP in all, {each.ptx_dp4a} dp4a in the PTX)")
    if wanted.wide_loads and not (each.code.wide_loads_in_loops and each.ptx_wide_loads):
        said.append(f"no 128-bit load in a loop ({each.code.wide_loads} in all, {each.ptx_wide_loads} in the PTX)")
    return said


_COLUMNS = ["kernel", "regs", "spill", "stack", "shared", "threads", "blocks/SM", "occupancy"]
_COLUMNS += ["IDP/loop", "LDG.128/loop"]


def table(found: Sequence[Figures], expected: Mapping[str, Expect] | None = None) -> list[str]:
    """The figures as aligned lines, shared memory with what a launch adds."""
    rows = [_COLUMNS]
    for each in found:
        wanted = expectation(each.kernel, expected or {})
        shared = each.shared_bytes + (wanted.dynamic_shared if wanted else 0)
        blocks = resident_blocks(each.registers, each.threads, shared)
        rows.append(
            [
                each.kernel,
                str(each.registers),
                "?" if each.spill_bytes is None else str(each.spill_bytes),
                str(each.stack_bytes),
                str(shared),
                str(each.threads),
                str(blocks),
                f"{100 * blocks * -(-each.threads // 32) // _WARPS} %",
                f"{each.code.dp4a}/{each.code.dp4a_in_loops}",
                f"{each.code.wide_loads}/{each.code.wide_loads_in_loops}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    widths[0] = -widths[0]  # the name to the left, numbers to the right
    return [
        "  ".join(
            cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in zip(row, widths, strict=True)
        )
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: print the table of each operator, and what does not hold."""
    parser = argparse.ArgumentParser(prog="python -m deepstitch.plugins.build.static_checks", description=main.__doc__)
    parser.add_argument("ops", nargs="*", metavar="FOLDER", help="default: all operators")
    said = []
    for op in parser.parse_args(arguments).ops or OPS:
        found, expected = compile_and_read(op), expected_of(op)
        print("\n".join(table(found, expected)), end="\n\n")
        said += problems(found, expected)
    print("\n".join(said) or "as promised")
    return 1 if said else 0


if __name__ == "__main__":
    raise SystemExit(main())
