"""What the cache gives is what would be traced, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from deepstitch.export import trace, trace_cache
from deepstitch.export.contract import DECODER, VISION_ENCODER
from deepstitch.export.exporter import ExportConfig, export_checkpoint
from deepstitch.models import ModelConfig
from deepstitch.models.checkpoint import Checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the cache, which is empty."""
    monkeypatch.setenv("DEEPSTITCH_CACHE", str(tmp_path))
    return tmp_path / "traces"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A graph of few nodes in place of every tracing, whose names are collected."""
    names: list[str] = []

    def tracer(name: str) -> Callable[[ModelConfig], ir.Model]:
        def small(config: ModelConfig) -> ir.Model:
            names.append(name)
            graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name=name)
            weight = ir.Value(name="weight", shape=ir.Shape([3, 4]), type=ir.TensorType(ir.DataType.FLOAT))
            graph.register_initializer(ir.Value(name="number", const_value=ir.tensor([1.5], name="number")))
            graph.initializers["weight"] = weight
            return ir.Model(graph, ir_version=11)

        return small

    monkeypatch.setattr(trace, "trace_decoder", tracer(DECODER))
    monkeypatch.setattr(trace, "trace_vision_encoder", tracer(VISION_ENCODER))
    return names


def test_bundles_are_the_same(checkpoints: Callable[..., Checkpoint], folder: Path, tmp_path: Path) -> None:
    """Byte for byte, whether the graphs were traced just now or long ago."""
    found = []
    for attempt in ("traced", "kept"):
        config = ExportConfig(checkpoint=checkpoints().folder, output=tmp_path / attempt, progress=False)
        found.append({path.name: path.read_bytes() for path in export_checkpoint(config).glob("*.onnx")})
    assert len(list(folder.iterdir())) == 2
    assert found[0].keys() == {"decoder.onnx", "vision_encoder.onnx"}
    assert found[0] == found[1]


def test_traced_once(checkpoints: Callable[..., Checkpoint], folder: Path, traced: list[str]) -> None:
    config = checkpoints().config
    first, second = (trace_cache.canonical_graph(DECODER, config) for _ in range(2))
    assert traced == [DECODER]
    for model in (first, second):
        weight = model.graph.initializers["weight"]
        assert weight.const_value is None and weight.dtype == ir.DataType.FLOAT and weight.shape == [3, 4]
        number = model.graph.initializers["number"].const_value
        assert number is not None and number.numpy().tolist() == [1.5]


def test_what_decides_a_graph_is_its_key(
    checkpoints: Callable[..., Checkpoint], folder: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = checkpoints().config
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, rms_norm_eps=1e-3))
    for each in (config, other):
        for name in (DECODER, VISION_ENCODER):
            trace_cache.canonical_graph(name, each)
    assert traced == [DECODER, VISION_ENCODER, DECODER]  # the vision encoder has nothing of the text
    monkeypatch.setattr(trace_cache.importlib.metadata, "version", lambda library: "0.0")
    trace_cache.canonical_graph(DECODER, config)
    assert traced[3:] == [DECODER]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:], lambda data: b""]
)
def test_a_damaged_file_is_traced_again(
    checkpoints: Callable[..., Checkpoint], folder: Path, traced: list[str], damage: Callable[[bytes], bytes]
) -> None:
    config = checkpoints().config
    trace_cache.canonical_graph(DECODER, config)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    trace_cache.canonical_graph(DECODER, config)
    assert traced == [DECODER, DECODER] and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(
    checkpoints: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEEPSTITCH_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert trace_cache.canonical_graph(DECODER, checkpoints().config).graph.name == DECODER
    assert traced == [DECODER, DECODER]


def test_the_oldest_make_room(
    checkpoints: Callable[..., Checkpoint], folder: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = checkpoints().config
    trace_cache.canonical_graph(DECODER, config)
    (first,) = folder.iterdir()
    monkeypatch.setattr(trace_cache, "_MAX_BYTES", first.stat().st_size + 10)
    trace_cache.canonical_graph(VISION_ENCODER, config)
    assert [path == first for path in folder.iterdir()] == [False]
