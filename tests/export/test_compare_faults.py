"""The failures that other exporters shipped, made on purpose: the matrix has to find each, and say where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from deepstitch.cli import main
from deepstitch.export.compare.cases import select_cases
from deepstitch.export.compare.comparison import compare_bundle
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.engine import Engine
from deepstitch.runtime.preprocess import VisionBatch
from deepstitch.tensorfile import TensorFile

from ..tiny import write_tiny_checkpoint
from .comparing import edit_decoder, expected, failures, results, spoiled

Fails = Callable[..., dict[str, str]]

WITH_PICTURES = {
    "one-image",
    "two-sizes",
    "three-images",
    "batch-2",
    "video",
    "multi-turn",
    "chunked-prefill",
    "decode-32",
}


@pytest.fixture
def exported(export: Callable[..., Any], checkpoints: Callable[..., Any]) -> Callable[[str], Any]:
    """``exported(target)``: an intact bundle and its checkpoint."""
    return lambda target: export(checkpoints("qwen3_vl_moe"), target=target)


@pytest.fixture
def fails(exported: Callable[[str], Any]) -> Callable[..., dict[str, str]]:
    """``fails(bundle or target, wrap)``: the first failed stage of every failed case."""

    def run(bundle: Path | str, wrap: Callable[[Engine], Any] = lambda engine: engine) -> dict[str, str]:
        intact = exported("ort-cpu")
        folder = exported(bundle).bundle if isinstance(bundle, str) else bundle
        return failures(results(folder, expected(intact.bundle, intact.checkpoint.folder), wrap))

    return run


class SpoiledDecoder:
    """An engine whose decoder gets other inputs than the runtime wrote."""

    def __init__(self, engine: Engine, spoil: Callable[[dict[str, np.ndarray]], None]) -> None:
        self._engine, self._spoil = engine, spoil
        self.bundle, self.vision, self.decoder = engine.bundle, engine.vision, self
        self.memory, self.limits = engine.memory, engine.limits

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        copies = {name: array.copy() for name, array in inputs.items() if name.startswith("deepstack")}
        run = self._engine.decoder.bind({**inputs, **copies}, outputs)

        def spoiled_run() -> None:
            for name, array in copies.items():
                array[...] = inputs[name]
            self._spoil(copies)
            run()

        return spoiled_run


def drop_deepstack(inputs: dict[str, np.ndarray]) -> None:
    inputs["deepstack_embeds"][:] = 0


def restart_rows_per_batch_row(inputs: dict[str, np.ndarray]) -> None:
    """Row 1 counts its visual tokens from the beginning again and so adds row 0's."""
    for row in inputs["deepstack_index"]:
        visual = row > 0
        row[visual] = np.arange(1, visual.sum() + 1)


def swap_batch_rows(inputs: dict[str, np.ndarray]) -> None:
    """Row 0 takes the last rows, row 1 the first ones."""
    index, count = inputs["deepstack_index"], len(inputs["deepstack_embeds"]) - 1
    if len(index) == 2:
        shift = int((index[1] > 0).sum())
        index[index > 0] = (index[index > 0] - 1 + shift) % count + 1


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
def test_deepstack_dropped(fails: Fails, target: str) -> None:
    assert fails(target, lambda engine: SpoiledDecoder(engine, drop_deepstack)) == dict.fromkeys(
        WITH_PICTURES, "logits"
    )


@pytest.mark.parametrize("spoil", [swap_batch_rows, restart_rows_per_batch_row])
def test_deepstack_rows_swapped_in_batch_2(fails: Fails, spoil: Callable[[dict[str, np.ndarray]], None]) -> None:
    assert fails("ort-cpu", lambda engine: SpoiledDecoder(engine, spoil)) == {"batch-2": "logits"}


def gate_and_up_side_by_side(folder: Path) -> None:
    """Store the experts' first matrix as gate rows, then up rows, as the checkpoint has them."""
    file = TensorFile.open(folder / "weights.safetensors")
    with (folder / "weights.safetensors").open("r+b") as raw:
        for name, entry in file.items():
            if name.endswith("experts.gate_up_proj"):
                rows = np.array(entry.read())  # (E, 2I, H), gate and up rows alternating
                raw.seek(entry.offset)
                raw.write(np.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).tobytes())


def test_gate_and_up_not_interleaved(exported: Callable[[str], Any], fails: Fails, tmp_path: Path) -> None:
    folder = spoiled(exported("ort-cpu").bundle, tmp_path / "bundle", gate_and_up_side_by_side)
    assert fails(folder) == dict.fromkeys({*WITH_PICTURES, "text"}, "logits")


def test_failure_on_the_command_line(
    exported: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, one line that names case and stage."""
    intact = exported("ort-cpu")
    folder = spoiled(intact.bundle, tmp_path / "bundle", gate_and_up_side_by_side)
    cases = ("--case", "text", "--case", "one-image")
    assert main(["compare", str(folder), "--checkpoint", str(intact.checkpoint.folder), *cases]) == 1
    captured = capsys.readouterr()
    assert "case text, stage logits: error" in captured.err and "case one-image, stage logits: error" in captured.err
    assert captured.err.count("\n") == 1 and "FAILED" in captured.out


def sectioned_layout(model: onnx.ModelProto) -> None:
    """Positions laid out in sections t, h, w, as in Qwen2.5-VL."""
    graph = model.graph
    (by_pair,) = (node for node in graph.node if node.op_type == "Gather" and node.input[0] == "position_ids")
    axes = [0] * 6 + [1] * 5 + [2] * 5
    graph.initializer.append(helper.make_tensor("sections", onnx.TensorProto.INT64, [16], axes))
    by_pair.input[1] = "sections"


def text_positions(model: onnx.ModelProto) -> None:
    """All three axes take the temporal position."""
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["flat_positions" if name == "position_ids" else name for name in node.input]
    graph.initializer.append(helper.make_tensor("temporal_rows", onnx.TensorProto.INT64, [3], [0, 0, 0]))
    graph.node.insert(0, helper.make_node("Gather", ["position_ids", "temporal_rows"], ["flat_positions"], axis=0))


@pytest.mark.parametrize(("target", "edit"), [("ort-cpu", sectioned_layout), ("portable", text_positions)])
def test_mrope_not_interleaved(
    exported: Callable[[str], Any],
    fails: Fails,
    tmp_path: Path,
    target: str,
    edit: Callable[[onnx.ModelProto], None],
) -> None:
    folder = spoiled(exported(target).bundle, tmp_path / "bundle", edit_decoder(edit))
    assert fails(folder) == dict.fromkeys(WITH_PICTURES, "logits")


class SpoiledVision:
    """An engine whose vision encoder gets something wrong."""

    def __init__(self, engine: Engine, spoil: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
        self._engine, self._spoil = engine, spoil
        self.bundle, self.decoder = engine.bundle, engine.decoder
        self.memory, self.limits = engine.memory, engine.limits

    def vision(self, batch: VisionBatch) -> tuple[np.ndarray, np.ndarray]:
        return self._spoil(self._engine, batch)


def attend_across_pictures(engine: Engine, batch: VisionBatch) -> tuple[np.ndarray, np.ndarray]:
    return engine.vision(dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]]))


def swap_sets(engine: Engine, batch: VisionBatch) -> tuple[np.ndarray, np.ndarray]:
    embeds, deepstack = engine.vision(batch)
    first, second, third = np.split(deepstack, 3, axis=1)
    return embeds, np.concatenate([first, third, second], axis=1)


def test_pictures_that_see_each_other(fails: Fails) -> None:
    found = fails("ort-cpu", lambda engine: SpoiledVision(engine, attend_across_pictures))
    assert found == dict.fromkeys(WITH_PICTURES - {"one-image", "decode-32"}, "vision")


def test_deepstack_sets_in_another_order(fails: Fails) -> None:
    found = fails("ort-cpu", lambda engine: SpoiledVision(engine, swap_sets))
    assert found == dict.fromkeys(WITH_PICTURES, "deepstack.1")


def test_bundle_of_another_checkpoint(exported: Callable[[str], Any], tmp_path: Path) -> None:
    """Same architecture, other weights: the first stage already differs."""
    other = write_tiny_checkpoint(tmp_path / "other", family="qwen3_vl_moe", seed=1)
    bundle = Bundle.open(exported("ort-cpu").bundle)
    found = compare_bundle(bundle, checkpoint=other, cases=select_cases(["text"]), progress=False)
    assert not found.passed and failures(found.results) == {"text": "embeddings"}
