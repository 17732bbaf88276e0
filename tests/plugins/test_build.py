"""Machine code and library for GPUs: the compilers, the file formats, and the library under a stand-in driver."""

from __future__ import annotations

import contextlib
import ctypes
import json
import struct
import subprocess
from pathlib import Path

import pytest

from deepstitch.plugins.build import cubin, fatbin, nvrtc, objects, sass, toolchain
from deepstitch.plugins.build.contents import read_library
from deepstitch.plugins.build.host import ops_with_kernels
from deepstitch.plugins.build.library import BuildConfig, BuildReport, build_library, check_architectures
from deepstitch.plugins.build.toolchain import ToolchainError
from deepstitch.plugins.registry import OPS

from .gpu_tools import build, fake_driver, needs_nvrtc, run_with_driver

KERNEL = """
struct Params { const int* from; int* to; int count; };
extern "C" __global__ void __launch_bounds__(128, 4) toy_sum(const Params p) {
    __shared__ int parts[96];
    int sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.count; i += 128) {
        const int4 v = __ldg(reinterpret_cast<const int4*>(p.from) + i);
        sum = __dp4a(v.x, v.y, sum);
        sum = __dp4a(v.z, v.w, sum);
    }
    parts[threadIdx.x % 96] = sum;
    __syncthreads();
    p.to[threadIdx.x] = parts[(threadIdx.x * 7) % 96] + p.from[threadIdx.x];
}
extern "C" __global__ void toy_stack(const Params p) {
    int kept[40];
    for (int i = 0; i < 40; ++i) kept[i] = p.from[i];
    for (int i = 0; i < p.count; ++i) kept[p.from[i]] += i;
    p.to[0] = kept[p.count];
}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of an operator, and an empty cache."""
    needs_nvrtc()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "toy").mkdir()
    source = tmp_path / "toy" / "kernel.cuh"
    source.write_text(KERNEL)
    return source


def test_machine_code_says_what_the_compiler_says(toy: Path) -> None:
    made = nvrtc.compile_source(toy, "sm_61")
    read = cubin.read_cubin(made.image)
    assert read.sm == 61 and [kernel.name for kernel in read.kernels] == ["toy_stack", "toy_sum"]
    for kernel in read.kernels:
        usage = made.usage[kernel.name]
        assert (kernel.registers, kernel.stack_bytes, kernel.shared_bytes) == (
            usage.registers,
            usage.stack_bytes,
            usage.shared_bytes,
        )
    stack, total = read.kernels
    assert total.shared_bytes == 384 and total.max_threads == 128 and total.stack_bytes == 0
    assert stack.stack_bytes == 160 and made.usage["toy_stack"].spill_store_bytes == 0


def test_instructions_are_counted(toy: Path) -> None:
    stack, total = cubin.read_cubin(nvrtc.compile_source(toy, "sm_61").image).kernels
    counts = sass.count(total.code, 61)
    assert counts is not None and counts.dp4a == counts.dp4a_in_loops == 2
    assert (counts.wide_loads, counts.wide_loads_in_loops, counts.narrow_loads, counts.local) == (1, 1, 1, 0)
    other = sass.count(stack.code, 61)
    assert other is not None and other.local >= 10 and other.dp4a == 0
    assert sass.count(total.code, 75) is None


def test_instructions_are_counted_as_by_nvdisasm(tmp_path: Path) -> None:
    needs_nvrtc()
    tool = toolchain.nvdisasm()
    if tool is None:
        pytest.skip("no nvdisasm of CUDA 13.0 or earlier (triton==3.3.1 has one)")
    for op in ops_with_kernels():
        image = nvrtc.compile_source(toolchain.package_root() / op / "kernel.cuh", "sm_61").image
        (tmp_path / "code.cubin").write_bytes(image)
        text = subprocess.run(
            [tool, "-c", str(tmp_path / "code.cubin")], capture_output=True, text=True, check=True
        ).stdout
        listed = dict(part.split("\n", 1) for part in text.split("//--------------------- .text.")[1:])
        for kernel in cubin.read_cubin(image).kernels:
            lines = next(value for name, value in listed.items() if name.split()[0] == kernel.name).splitlines()
            counts = sass.count(kernel.code, 61)
            assert counts is not None
            assert counts.dp4a == sum(" IDP." in line for line in lines), kernel.name
            assert counts.wide_loads == sum(" LDG." in line and ".128" in line for line in lines), kernel.name
            assert counts.narrow_loads == sum(" LDG." in line and ".128" not in line for line in lines), kernel.name
            assert counts.local == sum(" LDL" in line or " STL" in line for line in lines), kernel.name


def test_ptx_is_for_the_oldest(toy: Path) -> None:
    text = nvrtc.compile_source(toy, "compute_61").image.decode()
    assert "\n.target sm_61\n" in text and ".entry toy_sum(" in text


def test_a_source_that_does_not_compile(toy: Path) -> None:
    toy.write_text("__global__ void broken( {}")
    with pytest.raises(ToolchainError, match=r"toy/kernel\.cuh: NVRTC 12\.\d+ refuses it: (?s:.*)error"):
        nvrtc.compile_source(toy, "sm_61")


def test_results_are_kept_until_a_file_changes(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "common").mkdir()
    header = tmp_path / "common" / "deep.cuh"
    header.write_text("#define FACTOR 1\n")
    (toy.parent / "near.cuh").write_text('#include "../common/deep.cuh"\n')
    toy.write_text('#include "near.cuh"\n' + KERNEL)
    first = nvrtc.compile_source(toy, "sm_61")
    compiled: list[Path] = []
    real = nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", lambda *words: compiled.append(words[0]) or real(*words))
    assert nvrtc.compile_source(toy, "sm_61") == first and compiled == []
    header.write_text("#define FACTOR 2\n")
    nvrtc.compile_source(toy, "sm_61")
    assert compiled == [toy]
    for image in (tmp_path / "cache").rglob("*.image"):
        image.write_bytes(b"damaged")
    assert nvrtc.compile_source(toy, "sm_61").image == first.image and compiled == [toy, toy]


def test_a_fatbin_and_back(toy: Path) -> None:
    code = {sm: nvrtc.compile_source(toy, f"sm_{sm}").image for sm in (61, 75)}
    ptx = nvrtc.compile_source(toy, "compute_61").image
    data = fatbin.pack("toy", code, {61: ptx})
    found = fatbin.unpack(data)
    assert [(each.kind, each.sm) for each in found] == [("cubin", 61), ("cubin", 75), ("ptx", 61)]
    assert [cubin.read_cubin(each.data or b"").sm for each in found[:2]] == [61, 75]
    without_layout = [text.translate(None, b"\0\n\t ") for text in (found[2].data or b"", ptx)]
    assert without_layout[0].endswith(without_layout[1][-400:]) and b".target sm_61" in (found[2].data or b"")
    for broken in (b"", data[:15], b"\0" * 64, data[:-1]):
        with pytest.raises(ToolchainError, match="fatbin"):
            fatbin.unpack(broken)
    longer = bytearray(data)
    struct.pack_into("<Q", longer, 16 + 8, len(data))
    with pytest.raises(ToolchainError, match="the entry at byte 16"):
        fatbin.unpack(bytes(longer))


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\xff" * 90, b"MZ" * 100])
def test_what_is_no_elf_file(data: bytes) -> None:
    with pytest.raises(ToolchainError, match="ELF"):
        cubin.sections(data)


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain.cuda_library.cache_clear()
    monkeypatch.setitem(toolchain._LIBRARIES, "nvrtc", ("nvidia-cuda-nvrtc-cu12==12.9.86", "nowhere", "libnowhere.so"))
    with pytest.raises(ToolchainError, match=r"pip install 'deepstitch\[plugins\]'"):
        toolchain.cuda_library("nvrtc")
    toolchain.cuda_library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolchainError, match="no-such-compiler is not on the PATH"):
        toolchain.cxx()


@pytest.mark.parametrize(("sm", "text"), [(60, "dp4a"), (62, ""), (7, "write 61"), (999, "it has 61, 62, 70")])
def test_architectures(sm: int, text: str) -> None:
    needs_nvrtc()
    if not text:
        check_architectures([sm])
        return
    with pytest.raises(ToolchainError, match=text):
        check_architectures([sm])


# The library


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_driver(tmp_path_factory.mktemp("driver"))


def test_every_operator_is_in_it(report: BuildReport) -> None:
    assert list(report.kernels) == list(OPS)
    contents = read_library(report.library)
    assert [code.op for code in contents.code] == list(OPS) and contents.not_opened is None
    assert contents.targets == report.targets == ("sm_61", "compute_61")
    assert contents.described is not None and contents.described["targets"] == list(report.targets)
    note = json.loads(report.library.with_suffix(".json").read_text("utf-8"))
    assert note == json.loads(json.dumps(report.to_dict()))
    assert {path.name for path in report.library.parent.iterdir()} == {
        report.library.name,
        "libdeepstitch_plugins.json",
    }


def test_it_shows_its_interface_and_nothing_else(report: BuildReport) -> None:
    data = report.library.read_bytes()
    sections = cubin.sections(data)
    names = {name.decode() for name in sections[".dynstr"].split(b"\0")}
    assert "deepstitch_enqueue" in names and not any("cuda" in name.lower() for name in names)
    listed = subprocess.run(["readelf", "-dW", "--dyn-syms", str(report.library)], capture_output=True, text=True,
                            check=True).stdout  # fmt: skip
    shown = {line.split()[-1] for line in listed.splitlines() if " GLOBAL DEFAULT " in line and " UND " not in line}
    assert shown and all(name.startswith("deepstitch_") for name in shown)
    assert "libcuda" not in listed
    assert str(toolchain.package_root()).encode() not in data, "a path of this machine is in the library"


CREATE_ALL = """
import sys
from pathlib import Path
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import OPS, load
library = PluginLibrary.open(Path(sys.argv[1]))
for folder in OPS:
    op = load(folder)
    for case in op.cases:
        with library.create(op.schema.name, case.attributes) as instance:
            data = instance.serialize()
        with library.deserialize(op.schema.name, data) as again:
            assert again.serialize() == data
            assert [each["name"] for each in again.inputs] == list(case.make())
    print(folder, len(op.cases))
"""


def test_nothing_touches_the_driver_before_a_launch(report: BuildReport, driver: Path, tmp_path: Path) -> None:
    """With a driver that writes every call down, and with none at all."""
    log = tmp_path / "calls"
    finished = run_with_driver(driver, CREATE_ALL, report.library, log=log)
    assert finished.returncode == 0 and len(finished.stdout.splitlines()) == len(OPS), finished.stderr
    assert not log.exists(), log.read_text()
    assert run_with_driver(tmp_path, CREATE_ALL, report.library).returncode == 0


RUN_CASES = """
import sys
from pathlib import Path
from deepstitch.plugins.common.case import nmse
from deepstitch.plugins.library import DeviceLibrary
from deepstitch.plugins.registry import load
library = DeviceLibrary.open(Path(sys.argv[1]))
op = load(sys.argv[2])
for case in op.cases:
    inputs = case.make()
    found = library.run(op.schema.name, case.attributes, inputs)
    for name, wanted in op.reference(op.schema.resolve(case.attributes), inputs).items():
        assert nmse(found[name], wanted) <= case.nmse, (case.name, name)
    print(case.name)
"""


@pytest.mark.parametrize("op", OPS)
def test_cases_through_the_driver(op: str, report: BuildReport, driver: Path, tmp_path: Path) -> None:
    """Every case: each kernel is found in the embedded code, takes its parameters, and no host code follows a
    device pointer. The kernels themselves run through the host shim, not on a GPU."""
    log = tmp_path / "calls"
    finished = run_with_driver(driver, RUN_CASES, report.library, op, log=log)
    assert finished.returncode == 0, finished.stderr
    calls = [line.split() for line in log.read_text().splitlines()]
    launched = {words[1] for words in calls if words[0] == "cuLaunchKernel"}
    assert launched and launched <= set(report.kernels[op])
    assert sum(words[0] == "cuModuleLoadData" for words in calls) == 1, "the code is loaded once"
    looked_up = [words[1] for words in calls if words[0] == "cuModuleGetFunction"]
    assert sorted(looked_up) == sorted(launched), "each kernel is looked up once"


RUN_ONE = """
import sys, numpy as np
from pathlib import Path
from deepstitch.plugins.common.schema import PluginError
from deepstitch.plugins.library import PluginLibrary
case = {"hidden_states": np.zeros((2, 8), np.float32), "deepstack_embeds": np.zeros((3, 8), np.float32),
        "deepstack_index": np.zeros(2, np.int32)}
try:
    PluginLibrary.open(Path(sys.argv[1])).run("DeepStackAdd", {"layer": 0}, case)
except PluginError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"FAKE_CUDA_NO_CONTEXT": "1"}, "no CUDA context is current on this thread"),
        ({"FAKE_CUDA_FAIL": "cuCtxGetCurrent=3"}, "asking for the current CUDA context: CUDA_ERROR_FAKE (3:"),
        ({"FAKE_CUDA_FAIL": "cuModuleLoadData=209"}, "is for sm_61, compute_61; this device is sm_61 and its driver"),
        ({"FAKE_CUDA_FAIL": "cuModuleLoadData=222"}, "or install a driver for CUDA 12.9"),
        ({"FAKE_CUDA_FAIL": "cuModuleLoadData=2"}, "loading the code of deepstack_add: CUDA_ERROR_OUT_OF_MEMORY (2:"),
        ({"FAKE_CUDA_FAIL": "cuModuleGetFunction=500"}, "finding the kernel deepstack_add_f32_f32: CUDA_ERROR_NOT_F"),
        (
            {"FAKE_CUDA_FAIL": "cuLaunchKernel=1"},
            "launching deepstack_add_f32_f32 with grid 2x1x1, block 128x1x1 and 0",
        ),
    ],
)
def test_what_a_driver_refuses_is_said(
    report: BuildReport, driver: Path, environment: dict[str, str], text: str
) -> None:
    finished = run_with_driver(driver, RUN_ONE, report.library, **environment)
    assert finished.returncode == 0 and text in finished.stdout, finished.stdout + finished.stderr


def test_no_driver_is_said(report: BuildReport, tmp_path: Path) -> None:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a driver")
    finished = run_with_driver(tmp_path, RUN_ONE, report.library)
    assert "the driver's libcuda.so.1 cannot be opened" in finished.stdout, finished.stderr


def test_a_failed_build_leaves_the_old_library(
    report: BuildReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "libdeepstitch_plugins.so"
    old.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise ToolchainError("refused")

    monkeypatch.setattr(objects, "link", refuse)
    with pytest.raises(ToolchainError, match="refused"):
        build_library(BuildConfig(output=tmp_path, sms=(61,)))
    assert [path.name for path in tmp_path.iterdir()] == [old.name] and old.read_bytes() == b"old"
