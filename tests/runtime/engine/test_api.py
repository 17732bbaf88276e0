"""NVIDIA's package as the runtime opens it: versions, log, plugin libraries."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from deepstitch.errors import DeviceError, UnsupportedError
from deepstitch.runtime.engine.tensorrt.api import TensorRT, version_of

from ...fake_tensorrt.installed import installed


@pytest.mark.parametrize(
    ("version", "strategy", "size", "sized"),
    [
        ("8.6.1", False, "device_memory_size", False),
        ("10.0.1", True, "device_memory_size", False),
        ("10.13.3.9", True, "device_memory_size_v2", True),
        ("11.1.0.106", True, "device_memory_size_v2", True),
    ],
)
def test_what_differs_by_version(version: str, strategy: bool, size: str, sized: bool) -> None:
    with installed(version) as module:
        rules = TensorRT().rules
        assert (rules.strategy, rules.size, rules.sized) == (strategy, size, sized)
        assert hasattr(module.ICudaEngine, size) and hasattr(module.IExecutionContext, "set_device_memory") == sized


def test_a_version_in_numbers() -> None:
    class Module:
        __version__ = "10.0.1b6"

    assert version_of(Module) == (10, 0)


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed() as module:
        monkeypatch.setattr(module, "__version__", "8.5.3")
        with pytest.raises(UnsupportedError, match=r"TensorRT 8\.5\.3 is too old; 8\.6 is the first"):
            TensorRT()


def test_a_package_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.8: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UnsupportedError, match=r"does not load \(tensorrt: libnvinfer\.so\.8: cannot open"):
        TensorRT()


def test_what_it_says(caplog: pytest.LogCaptureFixture) -> None:
    """Warnings go to the log; the last errors into our message, once."""
    caplog.set_level(logging.DEBUG, logger="deepstitch.tensorrt")
    with installed() as module:
        tensorrt = TensorRT()
        severity = module.ILogger.Severity
        tensorrt.logger.log(severity.WARNING, "a warning")
        for number in range(5):
            tensorrt.logger.log(severity.ERROR, f"error {number}\n of several lines")
        said = str(tensorrt.failure("does not run", "do this"))
        assert said == (
            "TensorRT 8.6.1 does not run: error 2 of several lines; error 3 of several lines; error 4 of several "
            "lines; do this"
        )
        assert "without saying why; do this" in str(tensorrt.failure("does not run", "do this"))
    assert [record.levelname for record in caplog.records if record.message == "a warning"] == ["WARNING"]


def test_a_plugin_library_is_loaded_once(plugin_library: Path, tmp_path: Path) -> None:
    other, broken = tmp_path / "other.so", tmp_path / "broken.so"
    other.write_bytes(plugin_library.read_bytes() + b"x")
    broken.write_bytes(b"nothing")
    with installed() as module:
        tensorrt = TensorRT()
        with pytest.raises(DeviceError, match=r"does not load the plugin library .*broken\.so: .*plugins build"):
            tensorrt.load_plugins(broken)
        tensorrt.load_plugins(plugin_library)
        tensorrt.load_plugins(plugin_library)
        calls = [name for name, _ in module.calls]
        assert calls.count("IPluginRegistry.load_library") == 2
        with pytest.raises(DeviceError, match=r"other\.so: this program has loaded another plugin library"):
            tensorrt.load_plugins(other)
