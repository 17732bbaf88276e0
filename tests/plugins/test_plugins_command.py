"""``deepstitch plugins``: from the command line to a library and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deepstitch.cli import main
from deepstitch.plugins.build.host import build_host_library
from deepstitch.plugins.build.toolchain import ToolchainError
from deepstitch.plugins.registry import OPS

from .gpu_tools import needs_nvrtc

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("list", …)`` -> exit code, stdout, stderr."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = main(["plugins", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_nvrtc()
    folder = tmp_path_factory.mktemp("built")
    assert main(["plugins", "build", "--sm", "61", "--quiet", "-o", str(folder)]) == 0
    return folder / "libdeepstitch_plugins.so"


def test_build_reports(run: Run, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TENSORRT_ROOT", "TENSORRT_INCLUDE_DIR"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = run("build", "--sm", "61", "-o", tmp_path, "--quiet")
    assert code == 0 and err == ""
    assert "code for   sm_61, compute_61" in out and all(op in out for op in OPS)
    if "adapters for" not in out:
        assert "no TensorRT adapters: there are no headers; name them with --tensorrt-root" in out
    code, out, err = run("build", "--sm", "sm_61", "-o", tmp_path, "--json")
    report = json.loads(out)
    assert code == 0 and report["targets"] == ["sm_61", "compute_61"] and set(report["kernels"]) == set(OPS)
    assert Path(report["library"]).is_file()


def test_list_without_a_library(run: Run) -> None:
    code, out, _ = run("list")
    assert code == 0 and all(f"{name} (plugins/{folder}), version 1" in out for folder, name in OPS.items())
    assert "weight_format: float32, float16, int8, int4" in out


def test_list(run: Run, library: Path) -> None:
    code, out, _ = run("list", library)
    assert code == 0 and "runs on NVIDIA GPUs" in out and "code for   sm_61, compute_61" in out
    found = json.loads(run("list", library, "--json")[1])
    assert [each["folder"] for each in found["operators"]] == list(OPS)
    assert all(name.startswith(each["folder"]) for each in found["operators"] for name in each["kernels"])
    assert all(each["kernels"] for each in found["operators"])


def test_check(run: Run, library: Path) -> None:
    code, out, err = run("check", library)
    assert (code, err) == (0, ""), out
    assert "as promised" in out and "LDG.128/loop" in out
    found = json.loads(run("check", library, "--json")[1])
    assert found["problems"] == [] and set(found["figures"]) == set(OPS)


def test_check_fails_with_1(run: Run, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepstitch.plugins.build import static_checks

    promised = {"*": static_checks.Expect(min_blocks_per_sm=64)}
    monkeypatch.setattr(static_checks, "expected_of", lambda op: promised)
    code, out, _ = run("check", library)
    assert code == 1 and "FAILED  deepstack_add_f32_f32: 16 blocks fit on a multiprocessor, not 64" in out
    code, out, _ = run("check", library, "--json")
    assert code == 1 and json.loads(out)["problems"]


def test_a_library_of_another_version(run: Run, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepstitch.plugins.build import contents

    described, _ = contents._describe(library)
    assert described is not None
    other = json.loads(json.dumps(described))
    other["ops"][0]["version"] = "9"
    other["ops"][1]["attributes"][0]["required"] ^= True
    other["ops"][-1]["name"] = "Unknown"
    other["targets"] = ["sm_99"]
    monkeypatch.setattr(contents, "_describe", lambda path: (other, None))
    code, out, _ = run("check", library)
    assert code == 1
    for text in (
        "has version 9, deepstitch declares 1",
        "differs from its declaration in the attributes",
        "Unknown is unknown to this deepstitch",
        "there is no KVCacheAppend",
        "the library says ['sm_99']",
    ):
        assert text in out, text


def test_the_host_library_can_be_listed(run: Run) -> None:
    code, out, _ = run("list", build_host_library())
    assert code == 0 and "runs on the CPU, through the host shim" in out and "code for   no GPU" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("build", "--sm", "5x"), "write compute capabilities without the dot"),
        (("build", "--sm", ""), "write compute capabilities without the dot"),
        (("build", "--sm", "50"), "need dp4a, which came with compute capability 6.1"),
        (("build", "--sm", "63"), "--sm 63 is unknown to NVRTC"),
        (("build", "--sm", "61", "--tensorrt-root", "nowhere"), "there is no NvInferRuntime.h in nowhere"),
        (("check", "nowhere.so"), "nowhere.so: No such file or directory; deepstitch plugins build writes"),
        (("check", "."), "Is a directory"),
        (("list", __file__), "is no shared library"),
        (("check",), "Missing argument 'LIBRARY'"),
        (("bulid",), "No such command 'bulid'"),
    ],
)
def test_bad_input(run: Run, words: tuple[str, ...], text: str) -> None:
    needs_nvrtc()
    code, out, err = run(*words)
    assert (code, out) == (2, "") and text in err


def test_a_folder_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    needs_nvrtc()
    (tmp_path / "file").write_text("")
    code, _, err = run("build", "--sm", "61", "-o", tmp_path / "file" / "folder", "--quiet")
    assert code == 2 and "choose another folder with -o" in err


def test_without_nvrtc(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepstitch.plugins.build import nvrtc

    def missing(name: str) -> None:
        raise ToolchainError(f"{name}: pip install 'deepstitch[plugins]'")

    nvrtc.architectures.cache_clear()
    monkeypatch.setattr(nvrtc, "cuda_library", missing)
    code, _, err = run("build", "--sm", "61")
    assert code == 2 and "pip install 'deepstitch[plugins]'" in err and err.count("\n") == 1


def test_other_shared_libraries_are_refused_unopened(run: Run, tmp_path: Path) -> None:
    import _ctypes

    code, _, err = run("check", _ctypes.__file__)
    assert code == 2 and "not a plugin library: it exports no deepstitch_describe" in err


@pytest.mark.parametrize("kept", [0, 64, 5000])
def test_a_library_that_is_cut_off(run: Run, library: Path, tmp_path: Path, kept: int) -> None:
    short = tmp_path / "short.so"
    short.write_bytes(library.read_bytes()[:kept])
    code, _, err = run("check", short)
    assert code == 2 and "is no shared library" in err


def test_damaged_code_is_found(run: Run, library: Path, tmp_path: Path) -> None:
    from deepstitch.plugins.build.fatbin import MAGIC

    data = bytearray(library.read_bytes())
    at = data.find(MAGIC.to_bytes(4, "little") + b"\1\0\x10\0")
    data[at + 16 + 8 : at + 16 + 16] = (1 << 40).to_bytes(8, "little")  # the size of the first image
    damaged = tmp_path / "damaged.so"
    shutil.copy(library, damaged)
    damaged.write_bytes(data)
    code, _, err = run("check", damaged)
    assert code == 2 and "is damaged" in err and "build the library again" in err
