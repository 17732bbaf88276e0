"""What keeps engines from being built, and that nothing of them is left then."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from deepstitch.cli import EXIT_INTERRUPTED, main
from deepstitch.errors import DeviceError, InputError, OutputError, UnsupportedError
from deepstitch.export.tensorrt import build_machine
from deepstitch.export.tensorrt.build_machine import BuildMachine
from deepstitch.export.tensorrt.builder import BuildOrder, build_engines
from deepstitch.export.tensorrt.plan_from_onnx import _builder_refusal
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.plugins.common.schema import PluginError
from deepstitch.runtime.engine.tensorrt.api import TensorRT

from ...fake_tensorrt.plugin_library import edited_library, stand_in_library
from ..trt8_models import WIDE, fitting
from .building import FLAGS, TRT8, TRT10, Ampere, Card, calls, left_in

Checkpoints = Callable[..., Checkpoint]
Export = Callable[..., Any]

REFUSALS = {
    "parse": "does not parse graph 'decoder' (node 0: Assertion failed",
    "shape-tensor:logit_index": "takes input logit_index of graph 'decoder' for sizes, not for values",
    "profile": "refuses the profile 'prefill' of graph 'decoder': without saying why",
    "build": "Could not find any implementation",
    "build-memory": "OutOfMemory (Requested size was 4194304 bytes.); the card's memory does not suffice for building",
    "driver": "CUDA initialization failure with error: 35",
}


@pytest.mark.parametrize("failure", REFUSALS)
def test_a_failure_leaves_nothing(
    failure: str, order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tensorrt(fail=failure):
        with pytest.raises(DeviceError) as caught:
            build_engines(order, BuildMachine.find("trt8", None))
        assert REFUSALS[failure] in str(caught.value) and "\n" not in str(caught.value)
    assert not (bundle / "engines").exists()


def test_what_was_said_of_the_timing_cache_is_no_reason(
    order: BuildOrder, tensorrt: Callable[..., Any], tmp_path: Path
) -> None:
    given = tmp_path / "cache"
    given.write_bytes(b"not a cache")
    with tensorrt(fail="build"), pytest.raises(DeviceError, match="cannot build graph") as caught:
        TensorRT.load().logger.errors.append("of an earlier step")
        build_engines(dataclasses.replace(order, timing_cache=given), BuildMachine.find("trt8", None))
    assert REFUSALS["build"] in str(caught.value)
    assert "magic tag" not in str(caught.value) and "earlier" not in str(caught.value)


@pytest.mark.parametrize("step", ["driver", "profile"])
def test_what_was_said_of_another_graph_is_no_reason(
    step: str, order: BuildOrder, tensorrt: Callable[..., Any]
) -> None:
    with tensorrt(fail=step), pytest.raises(DeviceError) as caught:
        machine = BuildMachine.find("trt8", None)
        machine.tensorrt.logger.errors.append("Error Code 2: OutOfMemory")
        build_engines(order, machine)
    assert REFUSALS[step] in str(caught.value) and "OutOfMemory" not in str(caught.value)


def test_the_last_error_is_the_reason(tensorrt: Callable[..., Any]) -> None:
    """A kernel that was passed over for want of memory is none."""
    with tensorrt():
        there = TensorRT.load()
        source: Any = SimpleNamespace(name="decoder")
        for errors, remedy in (
            (["OutOfMemory", "API Usage Error"], "please report it"),
            (["API Usage Error", "OutOfMemory"], "the card's memory does not suffice"),
            ([], "please report it"),
        ):
            there.logger.errors.extend(errors)
            assert remedy in str(_builder_refusal(there, source))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_full_disk(
    code: int, order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: Any) -> int:
        if path.name == "decoder.plan":
            write(path, bytes(data)[:100])
            raise OSError(code, os.strerror(code))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with tensorrt():
        text = "Permission denied" if code == errno.EACCES else "the disk is full; make room, nothing was kept"
        with pytest.raises(OutputError, match=text):
            build_engines(order, BuildMachine.find("trt8", None))
    assert not (bundle / "engines").exists()


def test_the_old_engines_come_back_if_the_new_ones_cannot_take_their_place(
    order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name.startswith(".building-sm61"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with tensorrt():
        machine = BuildMachine.find("trt8", None)
        first = build_engines(order, machine)
        (first.folder / "old").touch()
        monkeypatch.setattr(Path, "rename", refused)
        with pytest.raises(OutputError, match="cannot be written"):
            build_engines(order, machine)
    assert (first.folder / "old").is_file() and left_in(bundle) == [first.folder.name]


def test_too_small_a_disk_is_seen_before(
    order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with tensorrt() as module:
        with pytest.raises(OutputError, match="of the disk are free; make room"):
            build_engines(order, BuildMachine.find("trt8", None))
        assert calls(module, "Builder.__init__") == []
    assert not (bundle / "engines").exists()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As Python handles it in a program, whatever the test runner does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_the_builder(
    exported: Callable[..., Path], library: Path, tensorrt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 10 asks after each step."""
    from deepstitch.export.tensorrt.build_progress import Progress

    steps = []

    def pressed(progress: Progress) -> None:
        steps.append(progress)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "step", pressed)
    bundle = exported("trt10")
    with tensorrt(TRT10, Ampere) as module:
        words = ["build", str(bundle), "--target", "trt10", "--plugins", str(library), *FLAGS, "--quiet"]
        assert main(words) == EXIT_INTERRUPTED
        assert len(calls(module, "IBuilderConfig.progress_monitor=")) == len(steps) == 1, "it is told to stop"
    assert not (bundle / "engines").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_where_the_builder_does_not_ask(
    bundle: Path,
    library: Path,
    tensorrt: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """TensorRT 8.6 builds to the end, and its bindings drop what is raised while it says something."""
    pressed = []

    def press(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("Detected") and not pressed:
            pressed.append(record)
            signal.raise_signal(signal.SIGINT)
        return True

    monkeypatch.setattr(logging.getLogger("deepstitch.tensorrt"), "filters", [press])
    caplog.set_level(logging.DEBUG, "deepstitch.tensorrt")
    with tensorrt():
        words = ["build", str(bundle), "--target", "trt8", "--plugins", str(library), *FLAGS, "--quiet"]
        assert main(words) == EXIT_INTERRUPTED and pressed
    assert not (bundle / "engines").exists()


def test_graphs_that_tensorrt_reads_differently(
    order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    model = onnx.load(copy / "decoder.onnx", load_external_data=False)
    del model.graph.output[0]
    onnx.save(model, copy / "decoder.onnx")
    with tensorrt(), pytest.raises(DeviceError, match="other inputs or outputs than the manifest has: logits"):
        build_engines(dataclasses.replace(order, bundle=copy), BuildMachine.find("trt8", None))


def test_no_driver_and_no_tensorrt(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["build", str(bundle), "--target", "trt8", *FLAGS]
    monkeypatch.setattr(build_machine, "probe_driver", lambda: _raise(DeviceError("there is no NVIDIA driver here")))
    assert main(words) == 2
    said = capsys.readouterr()
    assert "no NVIDIA driver" in said.err and "--check needs neither" in said.err and said.err.count("\n") == 1
    monkeypatch.setattr(build_machine, "probe_driver", lambda: None)
    monkeypatch.setattr(TensorRT, "load", lambda: _raise(UnsupportedError("NVIDIA's Python package is not installed")))
    assert main(words) == 2
    assert "is not installed" in capsys.readouterr().err and not (bundle / "engines").exists()


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("version", "card", "target", "sm", "text"),
    [
        (TRT10, Card, "trt8", None, "--target trt8 is for TensorRT 8, here is 10.13.3.9; install that (pip install"),
        (TRT8, Ampere, "trt10", None, "--target trt10 is for TensorRT 10 and 11, here is 8.6.1"),
        (TRT8, Ampere, "trt8", 61, "--sm 61: the card here, RTX A4000, has 86"),
        (TRT10, Card, "trt10", None, "Tesla P40 has compute capability 61; --target trt10 is for 75, 80"),
    ],
)
def test_what_does_not_go_together(
    version: str, card: type[Card], target: str, sm: int | None, text: str, tensorrt: Callable[..., Any]
) -> None:
    with tensorrt(version, card), pytest.raises((DeviceError, UnsupportedError)) as caught:
        BuildMachine.find(target, sm)
    assert text in str(caught.value)


def test_a_card_that_fails(tensorrt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorrt(), pytest.raises(DeviceError, match="cuMemGetInfo_v2: CUDA error 999"):
        monkeypatch.setattr(Card, "call", lambda *_: _raise(PluginError("cuMemGetInfo_v2: CUDA error 999")))
        BuildMachine.find("trt8", None)


def test_plugin_libraries_that_do_not_fit(
    bundle: Path,
    library: Path,
    tensorrt: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.so"
    text.write_text("no library")
    later = edited_library(library, tmp_path / "later.so", {b"getPluginCreators": b"xxxPluginCreators"})
    bare = edited_library(later, tmp_path / "bare.so", {b"getCreators": b"xxxCreators"})
    newer = stand_in_library(tmp_path / "newer", sm=90)
    expected: dict[Path | None, tuple[int, str]] = {
        None: (2, "there is no libdeepstitch_plugins_trt8.so in this folder; build it with 'deepstitch plugins build"),
        tmp_path / "none.so": (2, "No such file"),
        text: (2, "is no shared library"),
        later: (2, "is for another TensorRT than the 8.6.1 here; build it with"),
        bare: (1, "it has no TensorRT adapters"),
        newer: (1, "it has no code for sm_61"),
    }
    with tensorrt() as module:
        for path, (code, words) in expected.items():
            flags = [] if path is None else ["--plugins", str(path)]
            assert main(["build", str(bundle), "--target", "trt8", *FLAGS, *flags]) == code, path
            captured = capsys.readouterr()
            assert words in (captured.err if code == 2 else captured.out), captured
            assert code == 1 or captured.err.count("\n") == 1
        assert calls(module, "Builder.__init__") == []
        shutil.copy(library, tmp_path / "libdeepstitch_plugins_trt8.so")
        assert main(["build", str(bundle), "--target", "trt8", *FLAGS, "--quiet"]) == 0
        said = capsys.readouterr().out
        assert "'decoder' by trtexec, with its first profile alone, to measure:" in said and "decoder.plan" in said


def test_a_library_that_tensorrt_does_not_load(
    order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"\x7fELF")
    library = (broken, order.library[1])
    with tensorrt(), pytest.raises(DeviceError, match="does not load the plugin library"):
        build_engines(dataclasses.replace(order, library=library), BuildMachine.find("trt8", None))
    assert not (bundle / "engines").exists()


def test_a_library_that_is_gone_is_not_a_bundle_that_cannot_be_written(
    order: BuildOrder, tensorrt: Callable[..., Any], bundle: Path, tmp_path: Path
) -> None:
    library = (tmp_path / "gone.so", order.library[1])
    text = r"gone\.so: the plugin library cannot be read \(No such file"
    with tensorrt(), pytest.raises(InputError, match=text):
        build_engines(dataclasses.replace(order, library=library), BuildMachine.find("trt8", None))
    assert not (bundle / "engines").exists()


def test_too_little_memory_is_refused_before_building(
    bundle: Path, library: Path, tensorrt: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Small(Card):
        name, free = "GeForce MX150", 256 << 20

    with tensorrt(card=Small) as module:
        words = ["build", str(bundle), "--target", "trt8", "--plugins", str(library), *FLAGS]
        assert main(words) == 2
        captured = capsys.readouterr()
        assert "(GeForce MX150); what helps:" in captured.err and captured.err.count("\n") == 1
        assert main([*words, "--memory", "4GB", "--quiet"]) == 0, "the user knows better"
        assert len(calls(module, "Builder.__init__")) == 2


def test_a_checkpoint_is_no_bundle(
    bundle: Path, checkpoints: Checkpoints, tensorrt: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = fitting(checkpoints, "qwen3_vl_moe", WIDE)
    with tensorrt():
        assert main(["build", str(checkpoint.folder), "--target", "trt8"]) == 2
    assert "is a checkpoint; engines are built from a bundle: 'deepstitch export" in capsys.readouterr().err
