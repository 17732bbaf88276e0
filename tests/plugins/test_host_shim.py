"""The host shim does what a GPU would, and finds the mistakes it promises to find."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import shim as shim_module
from .shim import Shim

SEEDS = (0, 1, 2, 3)


def random(count: int) -> Any:
    return np.random.default_rng(5).standard_normal(count).astype(np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_thread_of_every_block_runs_once(shim: Shim, seed: int) -> None:
    _, places = shim.launch("shim_indices", o=5 * 2 * 3 * 4 * 9 * 2, grid=(5, 2, 3), block=(4, 9, 2), seed=seed)
    expected = np.arange(30)[:, None] * 10000 + np.arange(72)
    np.testing.assert_array_equal(places.reshape(30, 72), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 5, 16, 31])
def test_warp_operations(shim: Shim, n: int, seed: int) -> None:
    values = np.random.default_rng(n).integers(-1000, 1000, 96).astype(np.int32)
    x = random(96)
    sums, found = shim.launch("shim_warp", x=x, i=values, y=96, o=9 * 96, n=n, block=(96, 1, 1), seed=seed)
    lane, warps = np.arange(32), values.reshape(3, 32)
    votes = (((warps & 1) << lane).sum(axis=1)).astype(np.uint32).view(np.int32)
    expected = [
        warps[:, lane ^ n],
        np.repeat(warps[:, n : n + 1], 32, axis=1),
        np.where(lane < n, warps, warps[:, (lane - n) % 32]),
        np.where(lane + n > 31, warps, warps[:, (lane + n) % 32]),
        *(np.repeat(each[:, None], 32, axis=1) for each in (
            votes, (warps > 100).any(axis=1), (warps > 100).all(axis=1), warps.sum(axis=1), warps.max(axis=1)
        )),
    ]  # fmt: skip
    np.testing.assert_array_equal(found.reshape(9, 3, 32), expected)
    total = x.reshape(3, 32)
    for distance in (16, 8, 4, 2, 1):
        total = total + total[:, lane ^ distance]
    np.testing.assert_array_equal(sums.reshape(3, 32), total)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_partial_warp_has_the_lanes_that_exist(shim: Shim, seed: int) -> None:
    x = random(43)
    third, votes = shim.launch("shim_partial_warp", x=x, y=43, o=43, block=(43, 1, 1), seed=seed)
    np.testing.assert_array_equal(votes.view(np.uint32), [0xFFFFFFFF] * 32 + [(1 << 11) - 1] * 11)
    np.testing.assert_array_equal(third, [x[3]] * 32 + [x[35]] * 11)
    with pytest.raises(RuntimeError, match="a shuffle reads from a lane that does not exist"):
        shim.launch("shim_missing_lane", x=x, y=43, block=(43, 1, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_block_sum_and_max(shim: Shim, seed: int) -> None:
    x = random(256)
    found, _ = shim.launch("shim_block", x=x, y=512, block=(256, 1, 1), seed=seed)
    assert len(set(found[:256].tolist())) == 1 and set(found[256:].tolist()) == {float(x.max())}
    np.testing.assert_allclose(found[0], x.sum(dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 31, 32, 33, 100, 256])
@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_order_what_threads_exchange(shim: Shim, threads: int, seed: int) -> None:
    x = random(3 * threads)
    turned, _ = shim.launch(
        "shim_rotate", x=x, y=3 * threads, n=5, grid=(3, 1, 1), block=(threads, 1, 1), shared=4 * threads, seed=seed
    )
    np.testing.assert_array_equal(turned.reshape(3, threads), np.roll(x.reshape(3, threads), -5, axis=1))


def test_shared_memory_starts_as_nan_in_every_block(shim: Shim) -> None:
    found, _ = shim.launch("shim_uninitialised", y=3 * 64, grid=(3, 1, 1), shared=128)
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    ("kernel", "n", "text"),
    [
        ("shim_divergent_barrier", 16, "__syncthreads is reached by 16 of 64 threads"),
        ("shim_divergent_barrier", 32, "__syncthreads is reached by 32 of 64 threads"),
        ("shim_early_return", 63, "__syncthreads is reached by 63 of 64 threads"),
        ("shim_divergent_shuffle", 7, "__shfl_xor_sync is "),
        ("shim_divergent_shuffle", 33, "__shfl_xor_sync is "),
        ("shim_shuffle_and_barrier", 0, "__syncwarp is "),
        ("shim_shuffle_and_barrier", 1, "__syncwarp is "),
        ("shim_two_operations", 0, "another lane is at another operation"),
        ("shim_partial_mask", 0, "__syncwarp with a partial mask"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_divergence_is_found(shim: Shim, kernel: str, n: int, text: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=text) as raised:
        shim.launch(kernel, x=random(64), y=64, n=n, grid=(2, 1, 1), block=(64, 1, 1), seed=seed)
    assert f"kernel {kernel}, block (" in str(raised.value)
    test_block_sum_and_max(shim, 0)  # the next launch is not harmed


def test_uniform_branches_are_no_divergence(shim: Shim) -> None:
    shim.launch("shim_divergent_barrier", n=64, block=(64, 1, 1))
    shim.launch("shim_divergent_barrier", n=0, block=(64, 1, 1))
    shim.launch("shim_divergent_shuffle", x=random(64), y=64, n=32, block=(64, 1, 1))


def test_order_shows_a_race_between_blocks(shim: Shim) -> None:
    found = {shim.launch("shim_race_between_blocks", o=1, grid=(9, 1, 1), seed=seed)[1][0] for seed in SEEDS}
    assert len(found) > 1
    again = [shim.launch("shim_race_between_blocks", o=1, grid=(9, 1, 1), seed=3)[1][0] for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_shows(shim: Shim, seed: int) -> None:
    found, _ = shim.launch("shim_race_in_a_block", x=random(256), y=256, block=(256, 1, 1), seed=seed)
    assert np.isnan(found).any()


@pytest.mark.parametrize(
    ("kernel", "options", "text"),
    [
        ("shim_nothing", {}, "there is no kernel shim_nothing"),
        ("shim_block", {"block": (257, 1, 1)}, "257 threads in a block; it is compiled for at most 256"),
        ("shim_block", {"block": (0, 1, 1)}, "0 threads in a block"),
        ("shim_block", {"grid": (1, 0, 1)}, "an empty grid"),
        ("shim_block", {"grid": (1, 65536, 1)}, "a grid over the limits"),
        ("shim_block", {"nbytes": 8}, "got 8 bytes of parameters, not 40"),
        ("shim_block", {"shared": 49153}, "49153 bytes of dynamic shared memory; at most 49152"),
        ("shim_much_shared", {"shared": 16388}, r"32768 \+ 16388 bytes of shared memory; at most 49152"),
        ("shim_misaligned", {"i": range(8), "o": 32, "n": 1}, "load16 from an address that is no multiple of 16"),
    ],
)
def test_launches_that_a_gpu_refuses(shim: Shim, kernel: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        shim.launch(kernel, **options)


def test_integer_instructions(shim: Shim) -> None:
    n = 999
    generator = np.random.default_rng(2)
    pairs = generator.integers(-(2**31), 2**31, (n, 2)).astype(np.int32)
    x = np.concatenate([generator.standard_normal(n - 9) * 1000, [0.5, 1.5, -2.5, 3e9, -3e9, np.nan, -0.5, 2.5, -1e30]])
    _, found = shim.launch("shim_integers", x=x, i=pairs, o=3 * n, n=n, block=(256, 1, 1))
    dots, permuted, rounded = found.reshape(3, n)
    signed = pairs.view(np.int8).reshape(n, 2, 4).astype(np.int32)
    np.testing.assert_array_equal(dots, (signed[:, 0] * signed[:, 1]).sum(axis=1) + 7)
    eight = pairs.view(np.uint8).reshape(n, 8)
    np.testing.assert_array_equal(permuted, np.ascontiguousarray(eight[:, [3, 6, 2, 7]]).view(np.int32)[:, 0])
    saturated = np.clip(np.rint(np.nan_to_num(x.astype(np.float32)).astype(np.float64)), -(2**31), 2**31 - 1)
    np.testing.assert_array_equal(rounded, saturated.astype(np.int32))


def test_half_precision_is_that_of_numpy(shim: Shim) -> None:
    n = 1 << 16
    halves = np.arange(n, dtype=np.uint16).view(np.float16)
    generator = np.random.default_rng(3)
    x = (generator.standard_normal(n) * 10.0 ** generator.uniform(-9, 6, n)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        middles = (halves[:-1].astype(np.float32) + halves[1:].astype(np.float32)) / 2  # ties
        x[: n // 2] = np.where(np.isfinite(middles[: n // 2]), middles[: n // 2], 65520)
        expected = x.astype(np.float16).view(np.uint16)
    values, bits = shim.launch("shim_halves", x=x, y=n, o=n, n=n, block=(256, 1, 1))
    np.testing.assert_array_equal(values, halves.astype(np.float32))
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize(
    ("kernel", "options", "text"),
    [
        ("shim_static_overflow", {"n": 1, "y": 32}, "index 32 out of bounds"),
        ("shim_dynamic_overflow", {"n": 1, "y": 32, "shared": 128}, "heap-buffer-overflow"),
        ("shim_dynamic_overflow", {"n": -1, "y": 32, "shared": 128}, "heap-buffer-overflow"),
        ("shim_global_overflow", {"n": 1, "y": 32}, "heap-buffer-overflow"),
        ("shim_integer_overflow", {"n": 1, "i": [2**31 - 1], "o": 1}, "signed integer overflow"),
        ("shim_static_overflow", {"n": 0, "y": 32}, None),
        ("shim_dynamic_overflow", {"n": 0, "y": 32, "shared": 128}, None),
    ],
)
def test_sanitizers_see_into_kernels(
    sanitized_shim: Path,
    run_sanitized: Callable[..., subprocess.CompletedProcess[str]],
    kernel: str,
    options: dict[str, Any],
    text: str | None,
) -> None:
    program = str(Path(shim_module.__file__).resolve())
    finished = run_sanitized([sys.executable, program, str(sanitized_shim), kernel, json.dumps(options)])
    if text is None:
        assert finished.returncode == 0 and finished.stdout == "finished\n", finished.stderr
    else:
        assert finished.returncode != 0 and text in finished.stderr
        assert f"{kernel}_body" in finished.stderr
