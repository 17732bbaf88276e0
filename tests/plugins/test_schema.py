"""Declarations in Python and in C++ agree, and wrong attributes are refused in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepstitch.plugins.common.schema import DTYPES, Attribute, OpSchema, PluginError, TensorSpec
from deepstitch.plugins.library import PluginLibrary
from deepstitch.plugins.registry import OPS, folder_of, load

SCHEMA = OpSchema(
    name="Example",
    attributes=(
        Attribute(name="size", kind="int", required=True),
        Attribute(name="mode", kind="string", default="plain", choices=("plain", "fancy")),
        Attribute(name="epsilon", kind="float", default=1e-6),
        Attribute(name="sections", kind="ints", default=()),
    ),
    inputs=lambda attributes: (TensorSpec(name="x", dtypes=("float32",), shape="[..., K]"),),
    outputs=lambda attributes: (TensorSpec(name="y", dtypes=("float32",), shape="[..., K]"),),
    function=lambda attributes: None,  # type: ignore[arg-type,return-value]
)


def test_defaults_are_filled_in() -> None:
    resolved = SCHEMA.resolve({"size": 3, "epsilon": 1})
    assert resolved == {"size": 3, "mode": "plain", "epsilon": 1.0, "sections": ()}


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({}, "Example needs the attributes size"),
        ({"size": 1, "mod": "plain"}, r"Example has no attribute mod \(did you mean 'mode'\?\)"),
        ({"size": 1.5}, "attribute size is 1.5; it must be of kind int"),
        ({"size": True}, "attribute size is True"),
        ({"size": 1, "mode": "odd"}, "attribute mode is 'odd'; it must be one of 'plain', 'fancy'"),
        ({"size": 1, "sections": 3}, "attribute sections is 3; it must be of kind ints"),
    ],
)
def test_wrong_attributes_are_refused(attributes: dict[str, Any], text: str) -> None:
    with pytest.raises(PluginError, match=text):
        SCHEMA.resolve(attributes)


def test_unknown_operators_are_refused() -> None:
    with pytest.raises(PluginError, match=r"no operator moe_expert \(did you mean 'moe_experts'\?\)"):
        load("moe_expert")
    with pytest.raises(PluginError, match=r"no operator MoEExpert \(did you mean 'MoEExperts'\?\)"):
        folder_of("MoEExpert")


@pytest.mark.parametrize("folder", OPS)
def test_an_operator_has_all_its_parts(folder: str) -> None:
    op = load(folder)
    assert op.schema.name == OPS[folder]
    here = folder_of(op.schema.name)
    parts = ("README.md", "params.h", "kernel.cuh", "op.cpp", "tensorrt/v2.cpp", "tensorrt/v3.cpp")
    assert [part for part in parts if not (here / part).is_file()] == []
    assert len(op.cases) >= 40 and op.refused
    for table in (op.cases, op.refused):
        names = [each.name for each in table]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("folder", OPS)
def test_adapters_are_thin(folder: str) -> None:
    here = folder_of(OPS[folder]) / "tensorrt"
    assert all(path.read_text("utf-8").count("\n") <= 200 for path in here.glob("*.cpp"))


@pytest.mark.parametrize("folder", OPS)
def test_cases_have_the_inputs_of_the_schema(folder: str) -> None:
    op = load(folder)
    for case in op.cases:
        inputs, specs = case.make(), op.schema.inputs(op.schema.resolve(case.attributes))
        assert list(inputs) == [each.name for each in specs], case.name
        for spec in specs:
            assert inputs[spec.name].dtype.name in spec.dtypes, (case.name, spec.name)
        again = case.make()
        assert all(np.array_equal(inputs[name], again[name], equal_nan=True) for name in inputs), case.name


@pytest.mark.parametrize("folder", OPS)
def test_library_and_schema_declare_the_same(host_library: PluginLibrary, folder: str) -> None:
    schema = load(folder).schema
    described = {each["name"]: each for each in host_library.describe()["ops"]}[schema.name]
    assert described["version"] == schema.version
    for told, each in zip(described["attributes"], schema.attributes, strict=True):
        assert (told["name"], told["kind"], told["required"]) == (each.name, each.kind, each.required)
        if not each.required:
            default = list(each.default) if each.kind == "ints" else each.default
            assert told["default"] == default, each.name


@pytest.mark.parametrize("folder", OPS)
def test_library_and_schema_list_the_same_tensors(host_library: PluginLibrary, folder: str) -> None:
    op = load(folder)
    for case in op.cases:
        resolved = op.schema.resolve(case.attributes)
        with host_library.create(op.schema.name, case.attributes) as instance:
            for told, specs in ((instance.inputs, op.schema.inputs), (instance.outputs, op.schema.outputs)):
                wanted = [{"name": each.name, "dtypes": list(each.dtypes)} for each in specs(resolved)]
                assert told == wanted, case.name


def test_dtypes_are_those_of_the_header() -> None:
    header = Path(folder_of("MoEExperts").parent / "common" / "tensor.h").read_text("utf-8")
    names = ", ".join(f"k{name.capitalize()} = {number}" for number, name in enumerate(DTYPES))
    assert names in header
