"""The stand-in for TensorRT has what the real bindings have, version by version, and refuses the rest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ...fake_tensorrt import read_api
from ...fake_tensorrt.installed import FOLDER, VERSIONS, installed
from .fake_run import Log, aligned, engine_of, plan_of

WHEELS = "TENSORRT_BINDINGS_WHEELS"
GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
toy (float[B, S, 4] x, int64[B] i) => (float[B, S, 4] y, int64[B] j) {
    y = Add (x, x)
    j = Add (i, i)
}"""
SHAPES = {"x": ((1, 1, 4), (1, 5, 4), (2, 5, 4)), "i": ((1,), (1,), (2,))}
ONE_TOKEN = {"x": ((1, 1, 4), (1, 1, 4), (2, 1, 4)), "i": ((1,), (1,), (2,))}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "toy.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    return path


@pytest.fixture(params=VERSIONS)
def tensorrt(request: pytest.FixtureRequest) -> Iterator[Any]:
    with installed(request.param) as module:
        yield module


def test_it_has_all_of_its_version_and_nothing_else(tensorrt: Any) -> None:
    from tensorrt._api import TABLE, of_version

    assert tensorrt.__version__ in VERSIONS
    for name, entry in TABLE["classes"].items():
        assert hasattr(tensorrt, name) == (tensorrt.__version__ in entry["versions"].split()), name
        if not hasattr(tensorrt, name):
            continue
        kind = getattr(tensorrt, name)
        expected = {member for member, each in entry["members"].items() if of_version(each) is not None}
        assert {member for member in expected if not hasattr(kind, member)} == set(), name
        own = {member for member in vars(kind) if not member.startswith("_")}
        assert own - expected - {"Severity", *tensorrt.ILogger.Severity.__members__} == set(), name
    for name, entry in TABLE["enums"].items():
        values = {member: of_version(each) for member, each in entry["members"].items()}
        known = {member: value for member, value in values.items() if value is not None}
        found = getattr(tensorrt, name, None)
        assert known == ({} if found is None else {member: int(each) for member, each in found.__members__.items()})


def test_it_refuses_what_its_version_does_not_have(tensorrt: Any) -> None:
    new, newest = tensorrt.__version__.startswith("1"), tensorrt.__version__.startswith("11")
    builder = tensorrt.Builder(Log(tensorrt))
    config = builder.create_builder_config()
    assert hasattr(config, "progress_monitor") is new
    assert hasattr(config, "max_workspace_size") is not new
    assert hasattr(builder, "platform_has_fast_fp16") is not newest
    assert hasattr(tensorrt.BuilderFlag, "FP16") is not newest
    assert hasattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") is new
    with pytest.raises(AttributeError):
        config.workspace = 1
    with pytest.raises(TypeError, match="No constructor"):
        tensorrt.IBuilderConfig()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_network(flag=1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        builder.create_network(next(iter(tensorrt.NetworkDefinitionCreationFlag)))  # shifted, it would be a number
    parser = tensorrt.OnnxParser(builder.create_network(1 if not new else 0), Log(tensorrt))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        parser.parse_from_file(Path("a path is no text"))


def test_a_python_class_must_call_the_base(tensorrt: Any) -> None:
    class Forgetful(tensorrt.ILogger):
        def __init__(self) -> None: ...

    with pytest.raises(TypeError, match="must be called when overriding __init__"):
        Forgetful()


def test_an_engine_computes(tensorrt: Any, graph: Path) -> None:
    log = Log(tensorrt)
    engine = engine_of(tensorrt, log, plan_of(tensorrt, log, graph, [SHAPES, ONE_TOKEN]))
    narrow = tensorrt.__version__.startswith("8")
    assert engine.get_tensor_dtype("i") == (tensorrt.DataType.INT32 if narrow else tensorrt.DataType.INT64)
    assert engine.get_tensor_profile_shape("x", 1) == list(ONE_TOKEN["x"])
    context = engine.create_execution_context()
    assert not context.set_input_shape("x", (3, 1, 4))
    assert "not in the range" in log.errors[-1]
    assert context.set_input_shape("x", (2, 3, 4)) and context.set_input_shape("i", (2,))
    assert tuple(context.get_tensor_shape("y")) == (2, 3, 4)
    assert not context.execute_async_v3(0)
    assert "Address is not set" in log.errors[-1]
    tensors = {
        "x": aligned(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
        "i": aligned(np.array([3, 4], np.int32 if narrow else np.int64)),
        "y": aligned(np.zeros((2, 3, 4), np.float32)),
        "j": aligned(np.zeros(2, np.int32 if narrow else np.int64)),
    }
    for name, array in tensors.items():
        assert context.set_tensor_address(name, array.ctypes.data)
    assert not context.set_tensor_address("x", tensors["x"].ctypes.data + 4)
    assert context.execute_async_v3(0)
    assert np.array_equal(tensors["y"], 2 * tensors["x"]) and list(tensors["j"]) == [6, 8]
    assert context.set_optimization_profile_async(1, 0)
    assert not context.execute_async_v3(0), "the sizes are to be given again"


def test_plans_of_others_are_refused(tensorrt: Any, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tensorrt)
    plan = bytes(plan_of(tensorrt, log, graph, [SHAPES]))
    runtime = tensorrt.Runtime(log)
    assert runtime.deserialize_cuda_engine(plan) is not None
    damaged = {
        b"ftrt" + plan[4:]: "Serialization",
        plan[:-1]: "Serialization",
        plan[:9]: "Serialization",
        plan.replace(
            tensorrt.__version__.encode(), b"9" * len(tensorrt.__version__)
        ): "not compatible with this version",
    }
    for data, text in damaged.items():
        assert runtime.deserialize_cuda_engine(data) is None and text in log.errors[-1]
    monkeypatch.setenv("FAKE_TENSORRT_SM", "86")
    assert runtime.deserialize_cuda_engine(plan) is None and "compute 8.6 got compute 6.1" in log.errors[-1]


def test_memory_comes_from_the_allocator(tensorrt: Any, graph: Path) -> None:
    log, taken = Log(tensorrt), []
    plan = plan_of(tensorrt, log, graph, [SHAPES])

    class Pool(tensorrt.IGpuAllocator):
        def __init__(self, address: int) -> None:
            tensorrt.IGpuAllocator.__init__(self)
            self.address = address

        def allocate(self, size: int, alignment: int, flags: int) -> int:
            taken.append(size)
            return self.address

        def deallocate(self, memory: int) -> bool:
            taken.remove(taken[-1])
            return True

    engine = engine_of(tensorrt, log, plan, Pool(4096))
    context = engine.create_execution_context()
    assert len(taken) == 1  # a toy has no weights
    del context
    assert taken == []
    engine = engine_of(tensorrt, log, plan, Pool(0))
    assert engine.create_execution_context() is None and "OutOfMemory" in log.errors[-1]


def column(version: str) -> dict[str, Any]:
    """What the table says about one version."""
    table = json.loads((FOLDER / "tensorrt" / "api.json").read_text("utf-8"))

    def chosen(entries: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, by_versions in entries.items()
            for versions, value in by_versions.items()
            if version in versions.split()
        }

    parts = {
        part: {
            name: chosen(each["members"]) for name, each in table[part].items() if version in each["versions"].split()
        }
        for part in ("classes", "enums")
    }
    return {"version": version, **parts, "functions": chosen(table["functions"])}


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The real ones, unpacked; they need neither a GPU nor TensorRT's libraries to be imported."""
    folder = os.environ.get(WHEELS)
    if not folder:
        pytest.skip(f"no bindings: set {WHEELS} to a folder of their wheels, see `make test-tensorrt`")
    if shutil.which("gcc") is None or shutil.which("readelf") is None:
        pytest.skip("gcc and readelf are not installed")
    unpacked = tmp_path_factory.mktemp("bindings")
    return [read_api.unpacked(wheel, unpacked / wheel.stem) for wheel in Path(folder).glob("*.whl")]


def test_the_table_is_that_of_the_real_bindings(bindings: list[Path]) -> None:
    found = [read_api.api_of(folder) for folder in bindings]
    assert {each["version"] for each in found} <= set(VERSIONS) and found
    for each in found:
        assert each == column(each["version"])


OURS = """
from deepstitch.export.tensorrt.build_progress import Progress, _monitor
from deepstitch.export.tensorrt.precision import Precision, creation_flags
from deepstitch.runtime.engine.tensorrt.allocator import gpu_allocator
from deepstitch.runtime.engine.tensorrt.api import TensorRT
from tqdm import tqdm
import os

class Flags(list):
    set_flag = clear_flag = list.append

tensorrt = TensorRT.load()
module, set_flags = tensorrt.module, Flags()
assert module.__name__ == "tensorrt_bindings"
typed = hasattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
Precision(strongly_typed=typed, half=not typed).set_flags(module, set_flags)
tensorrt.logger.log(module.ILogger.ERROR, "an error")
assert list(tensorrt.logger.errors) == ["an error"]
assert isinstance(gpu_allocator(module, None), module.IGpuAllocator)
if hasattr(module, "IProgressMonitor"):
    monitor = _monitor(module, Progress(tqdm(file=open(os.devnull, "w"))))
    monitor.phase_start("phase", None, 2)
    assert monitor.step_complete("phase", 0)
print(tensorrt.version, creation_flags(module), [each.name for each in set_flags])
"""


def test_our_classes_derive_from_the_real_ones(bindings: list[Path]) -> None:
    said = []
    for folder in bindings:
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-c", OURS]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        said.append(finished.stdout.strip())
    expected = {
        "8.6.1 1 ['TF32', 'FP16', 'OBEY_PRECISION_CONSTRAINTS']",
        "10.0.1 2 ['TF32']",
        "10.13.3.9 2 ['TF32']",
        "11.1.0.106 1 ['TF32']",
    }
    assert set(said) <= expected and said
