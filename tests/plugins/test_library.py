"""The C interface as Python uses it: serialization, refusals, libraries that are none."""

from __future__ import annotations

import _ctypes
import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.plugins.build.host import build_host_library
from deepstitch.plugins.common import numerics
from deepstitch.plugins.common.case import nmse
from deepstitch.plugins.common.schema import PluginError
from deepstitch.plugins.library import DeviceLibrary, PluginLibrary
from deepstitch.plugins.registry import OPS, load


@pytest.mark.parametrize("folder", OPS)
def test_serialization_round_trips(host_library: PluginLibrary, folder: str) -> None:
    op = load(folder)
    for case in op.cases[:: max(1, len(op.cases) // 4)]:
        inputs = case.make()
        with host_library.create(op.schema.name, case.attributes) as first:
            data = first.serialize()
        with host_library.deserialize(op.schema.name, data) as second, second.prepare(inputs) as call:
            assert second.serialize() == data
            call.enqueue()
            found = call.outputs()
        for name, value in host_library.run(op.schema.name, case.attributes, inputs).items():
            assert value.tobytes() == found[name].tobytes()


@pytest.fixture(scope="module")
def serialized(host_library: PluginLibrary) -> bytes:
    with host_library.create("DeepStackAdd", {"layer": 1}) as instance:
        return instance.serialize()


def test_damaged_serializations_are_refused(host_library: PluginLibrary, serialized: bytes) -> None:
    for at in range(len(serialized)):
        damaged = serialized[:at] + bytes([serialized[at] ^ 1]) + serialized[at + 1 :]
        with pytest.raises(PluginError, match="checksum"):
            host_library.deserialize("DeepStackAdd", damaged)
    for length in range(len(serialized)):
        with pytest.raises(PluginError, match="DeepStackAdd"):
            host_library.deserialize("DeepStackAdd", serialized[:length])


def _signed(content: bytes) -> bytes:
    value = 0xCBF29CE484222325
    for byte in content:
        value = ((value ^ byte) * 0x100000001B3) % (1 << 64)
    return content + value.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("at", "byte", "text"),
    [
        (0, 0, "no serialized plugin of deepstitch"),
        (4, 9, "serialized in format 9; this library reads 1"),
        (8, 200, "cut short"),
        (12, ord("X"), "cannot read XeepStackAdd"),
    ],
)
def test_other_serializations_are_refused(
    host_library: PluginLibrary, serialized: bytes, at: int, byte: int, text: str
) -> None:
    content = bytearray(serialized[:-8])
    content[at] = byte
    with pytest.raises(PluginError, match=text):
        host_library.deserialize("DeepStackAdd", _signed(bytes(content)))
    with pytest.raises(PluginError, match="bytes too many"):
        host_library.deserialize("DeepStackAdd", _signed(serialized[:-8] + b"x"))


def test_no_cut_content_crashes(host_library: PluginLibrary, serialized: bytes) -> None:
    for length in range(1, len(serialized) - 8):
        with pytest.raises(PluginError):
            host_library.deserialize("DeepStackAdd", _signed(serialized[:length]))


def test_another_operator_is_refused(host_library: PluginLibrary, serialized: bytes) -> None:
    with pytest.raises(PluginError, match="MoEExperts version 1 cannot read DeepStackAdd version 1"):
        host_library.deserialize("MoEExperts", serialized)


def add_inputs(rows: int = 3) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "hidden_states": generator.standard_normal((rows, 8)).astype(np.float32),
        "deepstack_embeds": generator.standard_normal((4, 24)).astype(np.float32),
        "deepstack_index": np.zeros(rows, np.int32),
    }


@pytest.mark.parametrize(
    ("op_type", "attributes", "text"),
    [
        ("DeepstackAdd", {"layer": 0}, "there is no op DeepstackAdd; this library has"),
        ("DeepStackAdd", {}, "DeepStackAdd needs the attribute layer"),
        ("DeepStackAdd", {"layer": 0, "depth": 1}, "DeepStackAdd has no attribute depth"),
        ("DeepStackAdd", {"layer": "one"}, "attribute layer is of kind string; it must be of kind int"),
        ("DeepStackAdd", {"layer": [1]}, "attribute layer is of kind ints"),
        ("DeepStackAdd", {"layer": 1.5}, "attribute layer is of kind float"),
        ("DeepStackAdd", {"layer": None}, "attribute layer is None"),
    ],
)
def test_wrong_attributes_are_refused(
    host_library: PluginLibrary, op_type: str, attributes: dict[str, Any], text: str
) -> None:
    with pytest.raises(PluginError, match=text):
        host_library.run(op_type, attributes, add_inputs())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_states": np.zeros((3, 8), np.float64)}, "hidden_states is float64; it must be one of float32"),
        ({"deepstack_index": np.zeros(3, np.float32)}, "deepstack_index is float32; it must be int32"),
        ({"hidden": np.zeros(3, np.float32)}, "there is no input hidden .did you mean 'hidden_states'"),
        ({"hidden_states": None}, "got 2 inputs; these attributes need 3"),
        ({"hidden_states": np.zeros((1,) * 9, np.float32)}, "hidden_states has 9 dimensions; at most 8"),
    ],
)
def test_wrong_inputs_are_refused(host_library: PluginLibrary, change: dict[str, Any], text: str) -> None:
    inputs = {name: value for name, value in (add_inputs() | change).items() if value is not None}
    with pytest.raises(PluginError, match=text):
        host_library.run("DeepStackAdd", {"layer": 0}, inputs)


def test_bad_pointers_are_refused(host_library: PluginLibrary) -> None:
    with (
        host_library.create("DeepStackAdd", {"layer": 0}) as instance,
        instance.prepare(add_inputs()) as call,
    ):
        tensor = call._inputs[0]
        for pointer, text in ((None, "hidden_states is a null pointer"), (tensor.data + 4, "not aligned to 16 bytes")):
            kept, tensor.data = tensor.data, pointer
            with pytest.raises(PluginError, match=text):
                call.enqueue()
            tensor.data = kept
        call._outputs[0].dims[0] += 1
        with pytest.raises(PluginError, match=r"float32 \[4, 8\]; it must be float32 \[3, 8\]"):
            call.enqueue(fill=False)
        call._outputs[0].dims[0] -= 1
        call.enqueue()


def test_a_call_can_be_repeated(host_library: PluginLibrary) -> None:
    inputs = add_inputs()
    inputs["deepstack_index"][:] = (0, 3, 1)
    expected = inputs["hidden_states"] + np.where([[0], [1], [1]], inputs["deepstack_embeds"][[0, 3, 1], 8:16], 0)
    with host_library.create("DeepStackAdd", {"layer": 1}) as instance, instance.prepare(inputs) as call:
        for _ in range(2):
            call.enqueue()
            assert nmse(next(iter(call.outputs().values())), expected) < 1e-14


def test_describe(host_library: PluginLibrary) -> None:
    described = host_library.describe()
    assert (described["abi"], described["launcher"], described["targets"]) == (1, "host", [])
    assert described["namespace"] == "deepstitch.plugins"
    assert [each["name"] for each in described["ops"]] == list(OPS.values())


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "libtext.so"
    text.write_text("not a library")
    for path in (text, tmp_path / "absent.so", Path(_ctypes.__file__)):
        with pytest.raises(PluginError, match="is not a library of deepstitch operators"):
            PluginLibrary.open(path)


def test_a_machine_without_a_driver_says_so(host_library: PluginLibrary) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(PluginError, match="no NVIDIA driver"):
            DeviceLibrary.open(host_library.path)
    else:
        pytest.skip("this machine has a driver")


def test_a_build_names_what_is_wrong(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="plugins/nothing has no"):
        build_host_library(tmp_path, ops=("nothing",))
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    with pytest.raises(PluginError, match=r"compiling .*broken\.cpp failed"):
        build_host_library(ops=(), extra=(broken,))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PluginError, match="compiler no-such-compiler is not installed"):
        build_host_library(tmp_path)


def test_a_second_build_is_the_first(compiler: str) -> None:
    library = build_host_library(ops=())
    inode = library.stat().st_ino
    assert build_host_library(ops=()) == library and library.stat().st_ino == inode
    assert build_host_library(ops=(), link_flags=("-lm",)) != library


@pytest.mark.parametrize("block", [32, 64, 128])
def test_activation_quantization(block: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    x[1] = 0
    numbers, scales = numerics.quantize_activations(x, block)
    assert numbers.dtype == np.int8 and scales.shape == (3, 256 // block)
    np.testing.assert_array_equal(np.abs(numbers.reshape(3, -1, block)).max(-1), [[127] * (256 // block) * 1] * 1 + [
        [0] * (256 // block)] + [[127] * (256 // block)])  # fmt: skip
    error = np.abs(numbers.reshape(3, -1, block) * scales[..., None] - x.reshape(3, -1, block))
    assert (error <= scales[..., None] * 0.5001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights(bits: int) -> None:
    generator = np.random.default_rng(2)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    numbers = generator.integers(low, high, (2, 3, 64)).astype(np.int8)
    words = (numerics.pack_int4 if bits == 4 else numerics.pack_int8)(numbers)
    assert words.dtype == np.int32 and words.shape == (2, 3, 64 * bits // 32)
    np.testing.assert_array_equal(numerics.unpack_weights(words, f"int{bits}"), numbers)
    first = int(words[0, 0, 0]) & ((1 << bits) - 1)
    assert first == (int(numbers[0, 0, 0]) + (8 if bits == 4 else 0)) % (1 << bits)
    w = generator.standard_normal((2, 3, 64)).astype(np.float32)
    packed, scales = numerics.quantize_weights(w, bits, 32)
    error = np.abs(numerics.dequantize_weights(packed, scales, f"int{bits}") - w)
    assert (error <= np.repeat(scales, 32, axis=-1) * 0.5001).all()
