"""The adapters in the hands of TensorRT, the kernels on the CPU: ``make test-tensorrt``.

With the headers of TensorRT 8.6 in ``TENSORRT_INCLUDE_DIR`` everything goes through the registry of a real
``libnvinfer.so.8`` (``TENSORRT_LIBRARY_DIR``); with those of TensorRT 10 or 11 a driver of ours stands in for it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.plugins.build.host import build_host_library, ops_with_kernels
from deepstitch.plugins.build.library import BuildConfig, build_library
from deepstitch.plugins.build.tensorrt import INCLUDE_VARIABLE, TensorRT, find_tensorrt
from deepstitch.plugins.build.toolchain import ToolchainError
from deepstitch.plugins.common.case import Array, Case, nmse
from deepstitch.plugins.common.schema import DOMAIN, DTYPES
from deepstitch.plugins.registry import OPS, PluginOp, load

from .gpu_tools import needs_nvrtc
from .tensorrt.driver import (
    CHAR,
    FLOAT32,
    FLOAT64,
    HALF,
    INT32,
    INT64,
    Driver,
    Plugin,
    aligned,
    aligned_copy,
    compile_driver,
    field_of,
    tensors,
)

LIBRARY_VARIABLE = "TENSORRT_LIBRARY_DIR"
FIELD_TYPES = {"int": INT32, "float": FLOAT32, "string": CHAR, "ints": INT32}
CHANNELS_BY_TWO = 1  # a format that is not linear
FLOAT8 = 6  # a data type no operator has


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    found = find_tensorrt()
    if found is None:
        pytest.skip(f"no TensorRT headers: set {INCLUDE_VARIABLE}, see `make test-tensorrt`")
    return found


@pytest.fixture(scope="module")
def libraries(tensorrt: TensorRT) -> Path | None:
    """The folder of libnvinfer.so.8; None for TensorRT 10 and later, where the driver stands in."""
    if tensorrt.generation == 3:
        return None
    for folder in (os.environ.get(LIBRARY_VARIABLE), tensorrt.include.parent / "lib"):
        if folder and (Path(folder) / "libnvinfer.so.8").is_file():
            return Path(folder).resolve()
    pytest.skip(f"no libnvinfer.so.8: set {LIBRARY_VARIABLE} to its folder, see `make test-tensorrt`")


@pytest.fixture(scope="module")
def plugin_library(compiler: str, tensorrt: TensorRT) -> Path:
    ops = ops_with_kernels()
    sources = [path for path in tensorrt.sources if path.name == "library.cpp" or path.parent.parent.name in ops]
    return build_host_library(extra=sources, compile_flags=tensorrt.compile_flags, link_flags=tensorrt.link_flags)


@pytest.fixture(scope="module")
def driver(
    compiler: str, tensorrt: TensorRT, libraries: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> Driver:
    return Driver(compile_driver(compiler, tensorrt, libraries, tmp_path_factory.mktemp("driver") / "driver.so"))


@pytest.fixture(scope="module")
def creators(driver: Driver, plugin_library: Path) -> Iterator[list[str]]:
    found = driver.open(plugin_library)
    assert found is not None
    yield found
    assert driver.close(), "creators are left behind"


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest, creators: list[str]) -> PluginOp:
    if request.param not in ops_with_kernels():
        pytest.skip("has no kernel")
    return load(request.param)


@cache
def expected(folder: str) -> list[tuple[Case, list[Array], dict[str, Array]]]:
    """Every case with its inputs and the outputs of the reference."""
    op = load(folder)
    made = []
    for case in op.cases:
        inputs = case.make()
        outputs = op.reference(op.schema.resolve(case.attributes), inputs)
        order = [spec.name for spec in op.schema.outputs(op.schema.resolve(case.attributes))]
        made.append((case, [aligned_copy(each) for each in inputs.values()], {name: outputs[name] for name in order}))
    return made


def has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def made(driver: Driver, op: PluginOp, attributes: Any) -> Plugin:
    """From all attributes, as a parser hands them on that knows the defaults."""
    plugin = driver.create(op.schema.name, op.schema.resolve(attributes))
    assert plugin is not None, driver.log()
    return plugin


def test_creators(creators: list[str], driver: Driver, tensorrt: TensorRT) -> None:
    assert (driver.version() < 10000) == (tensorrt.generation == 2)
    lines = []
    for folder in ops_with_kernels():
        schema = load(folder).schema
        fields = [
            f"{each.name}:{FIELD_TYPES[each.kind]}:{0 if each.kind == 'ints' else 1}" for each in schema.attributes
        ]
        lines.append(" ".join([schema.name, schema.version, DOMAIN, *fields]))
    assert sorted(creators) == sorted(lines)


def test_create_serialize_deserialize_clone(op: PluginOp, driver: Driver) -> None:
    for case in op.cases:
        with made(driver, op, case.attributes) as plugin:
            state = plugin.serialize()
            assert plugin.identity() == f"{op.schema.name} {op.schema.version} {DOMAIN}"
            back = driver.deserialize(op.schema.name, state)
            assert back is not None, driver.log()
            for other in (back, plugin.clone()):
                with other:
                    assert other.serialize() == state
                    assert other.identity() == plugin.identity()
                    assert other.num_outputs() == plugin.num_outputs()
    assert driver.log() == ""


def test_defaults_may_be_left_out(op: PluginOp, driver: Driver) -> None:
    for case in op.cases:
        plugin = driver.create(op.schema.name, case.attributes)
        assert plugin is not None, driver.log()
        with plugin, made(driver, op, case.attributes) as full:
            assert plugin.serialize() == full.serialize()


def test_a_clone_outlives_its_plugin(op: PluginOp, driver: Driver) -> None:
    with made(driver, op, op.cases[0].attributes) as plugin:
        state, clone = plugin.serialize(), plugin.clone()
    with clone:
        assert clone.serialize() == state


def test_output_shapes_and_types(op: PluginOp, driver: Driver) -> None:
    for case, inputs, outputs in expected(op.folder):
        with made(driver, op, case.attributes) as plugin:
            assert plugin.num_outputs() == len(outputs), case.name
            for index, output in enumerate(outputs.values()):
                assert plugin.output_shape(inputs, index) == output.shape, case.name
                assert plugin.output_dtype(inputs, index) == output.dtype.name, case.name
    assert driver.log() == ""


def test_format_combinations(op: PluginOp, driver: Driver) -> None:
    """Of every case: its own types in linear layout, at each place no other type than the declared ones, no others."""
    for case, inputs, outputs in expected(op.folder):
        attributes = op.schema.resolve(case.attributes)
        specs = op.schema.inputs(attributes)
        arrays = [*inputs, *outputs.values()]
        counts = len(inputs), len(outputs)
        with made(driver, op, case.attributes) as plugin:
            for position, array in enumerate(arrays):
                described = tensors(arrays)
                assert plugin.supports(position, described, *counts), (case.name, position)
                described[position].format = CHANNELS_BY_TWO
                assert not plugin.supports(position, described, *counts), (case.name, position)
                allowed = set(specs[position].dtypes) if position < len(inputs) else {array.dtype.name}
                allowed &= {array.dtype.name} if array.dtype.name in ("int8", "int32") else allowed
                for dtype in range(len(DTYPES)):
                    described = tensors(arrays)
                    described[position].dtype = dtype
                    if plugin.supports(position, described, *counts):
                        assert DTYPES[dtype] in allowed, (case.name, position, DTYPES[dtype])
                described[position].dtype = FLOAT8
                assert not plugin.supports(position, described, *counts)


def test_the_residual_has_the_type_of_x(creators: list[str], driver: Driver) -> None:
    norm = load("rms_norm_rope")
    x, half = np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float16)
    weight = np.ones(8, np.float32)
    with made(driver, norm, {"mode": "norm", "has_residual": 1}) as plugin:
        for first in (x, half):
            for second in (x, half):
                same = first.dtype == second.dtype
                assert plugin.supports(1, tensors([first, second, weight, first, first]), 3, 2) == same


def test_another_number_of_tensors(op: PluginOp, driver: Driver) -> None:
    case, inputs, outputs = expected(op.folder)[0]
    arrays = [*inputs, *outputs.values()]
    with made(driver, op, case.attributes) as plugin:
        for counts in ((len(inputs) - 1, len(outputs)), (len(inputs), len(outputs) + 1)):
            assert not plugin.supports(0, tensors([*arrays, arrays[0]]), *counts)
            assert f"its attributes ask for {len(inputs)} and {len(outputs)}" in driver.log()
        assert plugin.output_shape(inputs[:-1], 0) is None
        assert "its attributes ask for" in driver.log()


def test_enqueue(op: PluginOp, driver: Driver) -> None:
    for case, inputs, outputs in expected(op.folder):
        results = [aligned(output.shape, output.dtype) for output in outputs.values()]
        with made(driver, op, case.attributes) as first, first.clone() as plugin:
            assert plugin.configure(inputs, results) == 0, (case.name, driver.log())
            scratch = aligned((plugin.workspace(inputs, results),), np.uint8)
            assert plugin.enqueue(inputs, results, scratch) == 0, (case.name, driver.log())
        for (name, output), result in zip(outputs.items(), results, strict=True):
            assert nmse(result, output) <= case.nmse, (case.name, name)
            if case.max_abs is not None and output.size:
                wrong = np.abs(result.astype(np.float64) - output.astype(np.float64)).max()
                assert wrong <= case.max_abs, (case.name, name)
    assert driver.log() == ""


def test_refused(op: PluginOp, driver: Driver) -> None:
    """What an operator refuses is refused by the adapter too, with the operator's words in TensorRT's log."""
    for refused in op.refused:
        plugin = driver.create(op.schema.name, refused.attributes)
        if plugin is None:
            assert refused.text in driver.log(), refused.name
            continue
        driver.log()
        inputs = [aligned_copy(np.asarray(each)) for each in refused.inputs.values()]
        known = all(each.dtype.name in DTYPES for each in inputs)
        with plugin:
            needed = op.schema.inputs(op.schema.resolve(refused.attributes))
            if not known or list(refused.inputs) != [spec.name for spec in needed]:
                continue  # these do not reach enqueue: see the test of another number of tensors
            results = [aligned((1,), np.float32)] * plugin.num_outputs()
            assert plugin.workspace(inputs, results) == 0
            assert refused.text in driver.log(), refused.name
            plugin.configure(inputs, results)
            assert refused.text in driver.log(), refused.name
            assert plugin.enqueue(inputs, results, aligned((1024,), np.uint8)) != 0, refused.name
            assert refused.text in driver.log(), refused.name


def test_null_pointers(op: PluginOp, driver: Driver) -> None:
    case, inputs, outputs = next(each for each in expected(op.folder) if all(out.size for out in each[2].values()))
    results = [aligned(output.shape, output.dtype) for output in outputs.values()]
    with made(driver, op, case.attributes) as plugin:
        scratch = aligned((plugin.workspace(inputs, results),), np.uint8)
        for null, array in enumerate([*inputs, *results]):
            if array.size:
                assert plugin.enqueue(inputs, results, scratch, null=null) != 0
                assert "is a null pointer" in driver.log()
        if scratch.size:
            assert plugin.enqueue(inputs, results, None) != 0
            assert "the workspace is a null pointer" in driver.log()


def test_damaged_state(op: PluginOp, driver: Driver) -> None:
    with made(driver, op, op.cases[0].attributes) as plugin:
        state = plugin.serialize()
    for place in range(len(state)):
        flipped = state[:place] + bytes([state[place] ^ 0x10]) + state[place + 1 :]
        for damaged in (flipped, state[:place]):
            assert driver.deserialize(op.schema.name, damaged) is None
            assert op.schema.name in driver.log()
    assert driver.deserialize(op.schema.name, state + b"\0") is None
    other = next(name for name in (load(folder).schema.name for folder in ops_with_kernels()) if name != op.schema.name)
    assert driver.deserialize(other, state) is None
    assert "cannot read" in driver.log()


def test_other_encodings_of_a_field(creators: list[str], driver: Driver) -> None:
    """Integers of 64 bits, doubles, and texts with a final zero: what other callers than the parser pass."""
    fields = {
        "mode": (CHAR, np.frombuffer(b"norm_rope\0", np.uint8)),
        "epsilon": (FLOAT64, np.array([1e-5])),
        "num_heads": (INT64, np.array([2])),
        "mrope_section": (INT64, np.array([12, 10, 10])),
    }
    usual = {"mode": "norm_rope", "epsilon": 1e-5, "num_heads": 2, "mrope_section": [12, 10, 10]}
    wide, plain = driver.create_from("RMSNormRope", fields), driver.create("RMSNormRope", usual)
    assert wide is not None, driver.log()
    assert plain is not None, driver.log()
    with wide, plain:
        assert wide.serialize() == plain.serialize()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"epsilon": (INT32, np.array([1], np.int32))}, "attribute epsilon is of kind int; it must be of kind float"),
        ({"mode": (INT32, np.array([1], np.int32))}, "attribute mode is of kind int; it must be of kind string"),
        ({"num_heads": (INT32, np.array([1, 2], np.int32))}, "attribute num_heads is of kind ints; it must be of kind"),
        ({"num_heads": (INT32, np.array([], np.int32))}, "attribute num_heads is of kind ints; it must be of kind"),
        ({"num_heads": (CHAR, np.frombuffer(b"2", np.uint8))}, "attribute num_heads is of kind string"),
        ({"mrope_section": (FLOAT32, np.array([1, 2, 3], np.float32))}, "attribute mrope_section comes as 3 values"),
        ({"epsilon": (HALF, np.array([1], np.float16))}, "attribute epsilon comes as 1 values"),
        ({"epsilom": (FLOAT32, np.array([1e-6], np.float32))}, "RMSNormRope has no attribute epsilom"),
        ({"mode": None}, "needs the attribute mode"),
    ],
)
def test_wrong_fields(creators: list[str], driver: Driver, changed: dict[str, Any], text: str) -> None:
    fields = {"mode": field_of("norm"), "epsilon": field_of(1e-6)} | changed
    given = {name: field for name, field in fields.items() if field is not None}
    assert driver.create_from("RMSNormRope", given) is None
    assert text in driver.log()


def test_load_unload_load(driver: Driver, plugin_library: Path, creators: list[str]) -> None:
    for _ in range(3):
        assert driver.close(), "creators are left behind"
        assert driver.open(plugin_library) == creators


def test_the_library_for_gpus_loads_without_one(
    driver: Driver, plugin_library: Path, creators: list[str], tensorrt: TensorRT, tmp_path: Path
) -> None:
    """Nothing before enqueue touches CUDA; enqueue without a driver says so and returns."""
    needs_nvrtc()
    ops = ("rms_norm_rope", "deepstack_add")
    built = build_library(BuildConfig(output=tmp_path, sms=(61,), ops=ops, tensorrt=tensorrt))
    assert built.library.name == f"libdeepstitch_plugins{tensorrt.suffix}.so"
    assert driver.close()
    try:
        lines = driver.open(built.library)
        assert lines is not None
        assert sorted(lines) == sorted(line for line in creators if line.split()[0] in (OPS[folder] for folder in ops))
        for folder in ops:
            case, inputs, outputs = next(each for each in expected(folder) if all(out.size for out in each[2].values()))
            results = [aligned(output.shape, output.dtype) for output in outputs.values()]
            with made(driver, load(folder), case.attributes) as plugin, plugin.clone() as clone:
                assert clone.serialize() == plugin.serialize()
                assert clone.configure(inputs, results) == 0
                assert clone.output_shape(inputs, 0) == results[0].shape
                if not has_cuda_driver():
                    assert clone.enqueue(inputs, results, None) != 0
                    assert "libcuda" in driver.log()
    finally:
        driver.close()
        assert driver.open(plugin_library) == creators


def test_headers_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    monkeypatch.setenv(INCLUDE_VARIABLE, str(tmp_path))
    with pytest.raises(ToolchainError, match=r"TENSORRT_INCLUDE_DIR: there is no NvInferRuntime\.h"):
        find_tensorrt()
    (tmp_path / "NvInferRuntime.h").touch()
    with pytest.raises(ToolchainError, match=r"NvInferVersion\.h"):
        find_tensorrt()
    version = tmp_path / "NvInferVersion.h"
    version.write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 5 //!< m\n", "utf-8")
    with pytest.raises(ToolchainError, match="defines no NV_TENSORRT_PATCH"):
        find_tensorrt()
    version.write_text(
        "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 5\n#define NV_TENSORRT_PATCH 3\n", "utf-8"
    )
    with pytest.raises(ToolchainError, match=r"TensorRT 8\.5\.3; the adapters need 8\.6 or later"):
        find_tensorrt()


@pytest.mark.parametrize(("major", "generation", "suffix"), [(8, 2, "_trt8"), (10, 3, "_trt10"), (11, 3, "_trt11")])
def test_version_of_headers(tmp_path: Path, major: int, generation: int, suffix: str) -> None:
    """Written directly, or from TensorRT 10 on by way of another name; found in the root or in include/."""
    include = tmp_path / "include"
    include.mkdir()
    (include / "NvInferRuntime.h").touch()
    names = {"MAJOR": major, "MINOR": 6, "PATCH": 1}
    text = "".join(
        f"#define TRT_{part}_ENTERPRISE {number}\n#define NV_TENSORRT_{part} TRT_{part}_ENTERPRISE //!< x\n"
        if major >= 10
        else f"#define NV_TENSORRT_{part} {number} //!< x\n"
        for part, number in names.items()
    )
    (include / "NvInferVersion.h").write_text(text, "utf-8")
    found = find_tensorrt(tmp_path)
    assert found is not None
    assert (found.version, found.generation, found.suffix) == (f"{major}.6.1", generation, suffix)
    assert found == find_tensorrt(include)
    assert {path.name for path in found.sources} == {"library.cpp", f"v{generation}.cpp"}
    assert len(found.sources) == len(OPS) + 1
    assert all(path.is_file() for path in found.sources)
