"""Small graphs with nodes that a TensorRT parser takes, and ones that it does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from deepstitch.export.tensorrt import build_machine
from deepstitch.export.tensorrt.builder import BuildOrder
from deepstitch.export.tensorrt.check import GraphCheck, check_graph
from deepstitch.export.tensorrt.operators import ParserTable
from deepstitch.export.tensorrt.profiles import Profile
from deepstitch.manifest import TensorSpec
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.plugins.build.host import build_host_library
from deepstitch.plugins.library import PluginLibrary
from deepstitch.runtime.engine.tensorrt.api import TensorRT

from ...fake_tensorrt.installed import installed
from ...fake_tensorrt.plugin_library import stand_in_library
from ..trt8_models import WIDE, fitting
from .building import TRT8, Card, order_of

HEADER = '<ir_version: 8, opset_import: ["" : 17, "deepstitch.plugins" : 1]>'
ADDRESS = 'plugin_version = "1", plugin_namespace = "deepstitch.plugins"'
DTYPES = {"float": "float32", "int32": "int32", "int64": "int64", "float16": "float16", "bool": "bool"}


def model(graph: str, header: str = HEADER) -> onnx.ModelProto:
    """From ONNX's own text form; nodes get the name of their first output, what has no value is a weight elsewhere."""
    made = onnx.parser.parse_model(f"{header}\n{graph}")
    for value in made.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        weight = onnx.TensorProto(name=value.name, data_type=value.type.tensor_type.elem_type, dims=shape)
        weight.data_location = onnx.TensorProto.EXTERNAL
        made.graph.initializer.append(weight)
    for node in made.graph.node:
        node.name = node.name or node.output[0]
    return made


def contract_of(made: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What the graph itself declares; axes without a size keep their names."""
    sides = []
    for values in (made.graph.input, made.graph.output):
        specs = []
        for value in values:
            tensor = value.type.tensor_type
            shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
            dtype = DTYPES[onnx.TensorProto.DataType.Name(tensor.elem_type).lower()]
            specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
        sides.append(tuple(specs))
    return sides[0], sides[1]


def profile(**axes: int) -> Profile:
    """Of a graph ``decoder``, at one size."""
    return Profile(name="only", graph="decoder", corners=dict.fromkeys(("min", "opt", "max"), axes))


@pytest.fixture
def check() -> Callable[..., GraphCheck]:
    """``check(graph, header=…, parser=…, S=…)``: the graph in text form, with sizes of its named axes."""

    def checked(graph: str, header: str = HEADER, parser: str = "8.6", **axes: int) -> GraphCheck:
        made = model(graph, header)
        return check_graph("decoder", made, contract_of(made), [profile(**axes)], ParserTable.load(parser))

    return checked


@pytest.fixture(scope="session")
def host_library() -> PluginLibrary:
    """Every operator, on the CPU through the host shim."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return PluginLibrary.open(build_host_library())


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """``with tensorrt("8.6.1", card=Card) as module``: that version, and a card."""

    @contextmanager
    def there(version: str = TRT8, card: type[Card] = Card, **settings: str) -> Iterator[Any]:
        monkeypatch.setattr(build_machine, "probe_driver", lambda: None)
        monkeypatch.setattr(build_machine, "CudaDriver", card)
        sm = str(card.capability[0] * 10 + card.capability[1])
        TensorRT.load.cache_clear()
        with installed(version, sm=sm, **settings) as module:
            yield module
        TensorRT.load.cache_clear()

    yield there
    TensorRT.load.cache_clear()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("g++ is not installed")
    return stand_in_library(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(scope="session")
def exported(checkpoints: Callable[..., Checkpoint], export: Callable[..., Any]) -> Callable[..., Path]:
    """A bundle, exported once for all tests; without its engines."""

    def made(target: str = "trt8", **flags: Any) -> Path:
        checkpoint = fitting(checkpoints, "qwen3_vl_moe", WIDE)
        bundle: Path = export(checkpoint, target=target, **flags).bundle
        shutil.rmtree(bundle / "engines", ignore_errors=True)
        return bundle

    return made


@pytest.fixture
def bundle(exported: Callable[..., Path]) -> Path:
    return exported()


@pytest.fixture(scope="session")
def order(exported: Callable[..., Path], library: Path) -> BuildOrder:
    return order_of(exported(), library)
