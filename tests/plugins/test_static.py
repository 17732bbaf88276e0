"""What every kernel takes on sm_61, by the compiler's report and by the machine code: see static_checks.py."""

from __future__ import annotations

import dataclasses

import pytest

from deepstitch.plugins.build import sass
from deepstitch.plugins.build.static_checks import (
    Expect,
    Figures,
    compile_and_read,
    expected_of,
    figures,
    problems,
    resident_blocks,
    table,
)
from deepstitch.plugins.build.toolchain import ToolchainError
from deepstitch.plugins.registry import OPS

from .gpu_tools import needs_nvrtc


@pytest.mark.parametrize("op", OPS)
def test_sm_61_code_is_as_promised(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    needs_nvrtc()
    found, expected = compile_and_read(op), expected_of(op)
    with capsys.disabled():
        print("", *table(found, expected), sep="\n")
    assert found and problems(found, expected) == []


@pytest.mark.parametrize("op", ["moe_experts", "quantized_linear"])
def test_integer_kernels_promise_dp4a_and_wide_loads(op: str) -> None:
    """Something is promised: an empty static.py would let everything through."""
    needs_nvrtc()
    expected = expected_of(op)
    for each in compile_and_read(op):
        if "int4" in each.kernel or "int8" in each.kernel:
            wanted = next(value for pattern, value in expected.items() if _fits(each.kernel, pattern))
            assert ("quantize" in each.kernel) or (wanted.dp4a and wanted.wide_loads), each.kernel


def test_attention_promises_wide_loads() -> None:
    needs_nvrtc()
    expected = expected_of("sparse_attention")
    for each in compile_and_read("sparse_attention"):
        if "decode" in each.kernel or "prefill" in each.kernel:
            assert next(value for pattern, value in expected.items() if _fits(each.kernel, pattern)).wide_loads


def _fits(kernel: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(kernel, pattern)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # 2048 threads
        (33, 256, 0, 6),  # 40 registers a thread: 51 warps, of which 48 come in fours
        (64, 256, 0, 4),
        (128, 128, 0, 4),
        (255, 128, 0, 2),
        (16, 32, 0, 32),  # never more than 32 blocks
        (32, 64, 49152, 2),  # 96 KB of shared memory
        (32, 64, 49153, 1),
        (40, 1024, 0, 1),
        (80, 1024, 0, 0),
    ],
)
def test_blocks_per_multiprocessor(registers: int, threads: int, shared: int, blocks: int) -> None:
    """Worked out by hand from the limits of compute capability 6.1."""
    assert resident_blocks(registers, threads, shared) == blocks


GOOD = Figures(
    op="toy", kernel="toy_sum", registers=32, stack_bytes=0, shared_bytes=0, threads=256, spill_bytes=0,
    code=sass.Counts(dp4a=4, dp4a_in_loops=4, wide_loads=2, wide_loads_in_loops=2),
    ptx_target="sm_61", ptx_dp4a=4, ptx_wide_loads=2,
)  # fmt: skip
WANTED = {"toy_*": Expect(min_blocks_per_sm=8, dp4a=True, wide_loads=True)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"stack_bytes": 16}, "takes 16 bytes of local memory"),
        ({"registers": 40}, "6 blocks fit on a multiprocessor, not 8"),
        ({"shared_bytes": 40000}, "2 blocks fit"),
        ({"code": sass.Counts(dp4a=4, wide_loads=2, wide_loads_in_loops=2)}, "no dp4a in a loop (4 IDP"),
        ({"code": sass.Counts(dp4a=4, dp4a_in_loops=4, narrow_loads=9)}, "no 128-bit load in a loop (0 in all"),
        ({"code": dataclasses.replace(GOOD.code, local=3)}, "3 loads and stores of local memory"),
        ({"ptx_dp4a": 0}, "no dp4a"),
        ({"ptx_target": "sm_75"}, "its PTX is for sm_75"),
        ({"ptx_double": 2}, "2 double precision"),
        ({"ptx_half": 2}, "2 fp16 arithmetic"),
        ({"ptx_float_atomics": 1}, "1 atomic operations on floats"),
        ({"kernel": "other"}, "static.py says nothing about it"),
    ],
)
def test_the_checks_can_fail(change: dict[str, object], text: str | None) -> None:
    said = problems([dataclasses.replace(GOOD, **change)], WANTED)
    assert text in "; ".join(said) if text else said == []


def test_a_pattern_without_a_kernel() -> None:
    said = problems([GOOD], WANTED | {"gone_*": Expect(min_blocks_per_sm=1)})
    assert said == ["gone_*: static.py speaks of it, no kernel has such a name"]


def test_code_that_is_not_for_sm_61_is_refused() -> None:
    needs_nvrtc()
    from deepstitch.plugins.build import nvrtc
    from deepstitch.plugins.build.toolchain import package_root

    image = nvrtc.compile_source(package_root() / "deepstack_add" / "kernel.cuh", "sm_75").image
    with pytest.raises(ToolchainError, match="sm_75 is not what is checked here"):
        figures("deepstack_add", image)
