"""Interrupted quantization: where it may stop, what it goes on with, and what makes it begin again."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepstitch.errors import ConfigError
from deepstitch.export import ExportConfig, QuantizationConfig
from deepstitch.export.quantize import bit_search
from deepstitch.export.quantize import quantizer as quantizer_module
from deepstitch.export.quantize.calibration import CalibrationSet
from deepstitch.export.quantize.quantizer import Quantizer
from deepstitch.export.quantize.recipe import Recipe
from deepstitch.export.quantize.store import QuantizedStore
from deepstitch.export.quantize.walk import LayerWalk
from deepstitch.export.quantize.work import QuantizationWork, quantization_work
from deepstitch.models.checkpoint import Checkpoint

WORK = "0" * 12


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Callable[..., Checkpoint]) -> Checkpoint:
    return checkpoints("qwen3_moe", num_hidden_layers=3)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "text.jsonl"
    path.write_text('{"prompt": "What is two plus three?", "answer": "5"}\n{"prompt": "red or blue"}\n', "utf-8")
    return path


def quantize(checkpoint: Checkpoint, conversations: Path, output: Path) -> dict[str, bytes]:
    """GPTQ over the whole decoder, from where the folder left off; the bytes of every unit."""
    sources = checkpoint.sources()
    recipe = Recipe.uniform(sources, bits=4, vision_bits=None, block=32, symmetric=True)
    walk = LayerWalk(checkpoint.config, sources, CalibrationSet.open(conversations, checkpoint).prompts)
    store = QuantizedStore(output, WORK)
    Quantizer(sources, recipe, "gptq", store, walk).run(lambda _: None)
    return {path.name: path.read_bytes() for path in store.folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nobody interrupts makes."""
    return quantize(checkpoint, conversations, tmp_path_factory.mktemp("whole") / "bundle")


class Stopped(Exception):
    """As if the process had been ended here."""


def stop(monkeypatch: pytest.MonkeyPatch, method: str, on: str, *, before: bool) -> None:
    """Let ``QuantizedStore.method`` end the run when it is called for ``on``."""
    real = getattr(QuantizedStore, method)

    def stopping(self: QuantizedStore, unit: Any, *given: Any) -> None:
        if str(unit) == on and before:
            raise Stopped
        real(self, unit, *given)
        if str(unit) == on:
            raise Stopped

    monkeypatch.setattr(QuantizedStore, method, stopping)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("place", ["state not written", "state written", "unit written"])
def test_stopped_anywhere(
    layer: int,
    place: str,
    whole: dict[str, bytes],
    checkpoint: Checkpoint,
    conversations: Path,
    tmp_path: Path,
) -> None:
    """Between the three steps that finish a layer: its state, its unit, the removal of the state before."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        if place == "unit written":
            stop(patch, "add_unit", f"model.layers.{layer}", before=False)
        else:
            stop(patch, "add_state", str(layer + 1), before=place == "state not written")
        quantize(checkpoint, conversations, tmp_path / "bundle")
    assert quantize(checkpoint, conversations, tmp_path / "bundle") == whole
    states = sorted(path.name for path in QuantizedStore(tmp_path / "bundle", WORK).folder.glob("*.state"))
    left = ["hidden.2.state"] if (layer, place) == (2, "unit written") else []  # no layer was finished after it
    assert states == [*left, "hidden.3.state"], "older states are removed"


def test_stopped_before_the_head(
    whole: dict[str, bytes], checkpoint: Checkpoint, conversations: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop(patch, "add_unit", "lm_head.weight", before=True)
        quantize(checkpoint, conversations, tmp_path / "bundle")
    assert quantize(checkpoint, conversations, tmp_path / "bundle") == whole


def test_a_state_that_is_gone(
    whole: dict[str, bytes], checkpoint: Checkpoint, conversations: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop(patch, "add_unit", "model.layers.1", before=False)
        quantize(checkpoint, conversations, tmp_path / "bundle")
    for path in QuantizedStore(tmp_path / "bundle", WORK).folder.glob("*.state"):
        path.unlink()
    assert quantize(checkpoint, conversations, tmp_path / "bundle") == whole


def test_experts_are_packed_as_they_come(
    checkpoint: Checkpoint, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many experts there are, only those being rounded are held unpacked."""
    real = quantizer_module._gptq
    alive: list[weakref.ref[torch.Tensor]] = []
    most = []

    def counting(*given: Any) -> Any:
        most.append(sum(each() is not None for each in alive))
        result = real(*given)
        alive.append(weakref.ref(result.numbers))
        return result

    monkeypatch.setattr(quantizer_module, "_gptq", counting)
    monkeypatch.setattr(quantizer_module.os, "cpu_count", lambda: 1)
    quantize(checkpoint, conversations, tmp_path / "bundle")
    assert len(alive) == 3 * 2 * 6
    assert max(most) <= 2


def work_of(folder: Path, output: Path, **quantization: Any) -> QuantizationWork:
    checkpoint = Checkpoint.open(folder)
    asked = QuantizationConfig(**quantization)
    config = ExportConfig(checkpoint=folder, output=output, weights="int4", quantization=asked, progress=True)
    found = quantization_work(config, checkpoint, checkpoint.sources())
    assert found is not None
    return found


class TestIdentity:
    """An edited checkpoint is other work: neither its units nor its sensitivities are used again."""

    @pytest.mark.parametrize(
        "name",
        ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"],
    )
    def test_files_that_count(self, name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
        folder = shutil.copytree(checkpoint.folder, tmp_path / "checkpoint")
        before = work_of(folder, tmp_path / "bundle").store.folder
        assert work_of(folder, tmp_path / "bundle").store.folder == before
        path = folder / name
        if name == "config.json":
            path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"num_experts_per_tok": 3}), "utf-8")
        else:
            path.write_text(path.read_text("utf-8") + "\n", "utf-8")
        assert work_of(folder, tmp_path / "bundle").store.folder != before

    def test_how_answers_are_sampled_does_not(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        folder = shutil.copytree(checkpoint.folder, tmp_path / "checkpoint")
        before = work_of(folder, tmp_path / "bundle").store.folder
        (folder / "generation_config.json").write_text('{"temperature": 0.5}', "utf-8")
        assert work_of(folder, tmp_path / "bundle").store.folder == before


def test_a_cached_measurement_is_of_the_same_files(
    checkpoint: Checkpoint, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``mixed`` keeps in the user's cache folder goes by the same identity."""
    monkeypatch.setenv("DEEPSTITCH_CACHE", str(tmp_path / "cache"))
    kept: list[Path] = []

    def stop_at(path: Path, *_: object) -> None:
        kept.append(path)
        raise Stopped

    monkeypatch.setattr(bit_search, "load_or_measure", stop_at)
    folder = shutil.copytree(checkpoint.folder, tmp_path / "checkpoint")
    asked = QuantizationConfig(calibration=conversations, budget="6bits")
    config = ExportConfig(checkpoint=folder, output=tmp_path / "b", weights="mixed", quantization=asked)
    for _ in range(3):
        opened = Checkpoint.open(folder)
        with pytest.raises(Stopped):
            quantization_work(config, opened, opened.sources())
        if len(kept) == 2:
            template = folder / "chat_template.jinja"
            template.write_text(template.read_text("utf-8") + "\n", "utf-8")
    assert kept[0] == kept[1] != kept[2]
    assert {path.parent for path in kept} == {tmp_path / "cache"}


def test_work_left_by_other_flags_is_named(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Quantizer, "run", lambda self, progress: None)
    left = tmp_path / ".bundle.quantize-0123456789ab"
    left.mkdir()
    (left / "model.layers.0.safetensors").write_bytes(bytes(1_500_000))
    (tmp_path / ".bundle2.quantize-0123456789ab").mkdir()
    work = work_of(checkpoint.folder, tmp_path / "bundle")
    work.run()
    message = capsys.readouterr().err
    assert f"{left}: an interrupted export with other flags left 1.5 MB there; remove the folder" in message
    assert "bundle2" not in message
    work.store.folder.mkdir()
    work.run()
    assert str(left) not in capsys.readouterr().err, "said once, when the work is begun"


def test_a_vision_encoder_that_is_not_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = ExportConfig(checkpoint=checkpoint.folder, output=tmp_path / "b", vision_weights="int8")
    with pytest.raises(ConfigError, match="--vision-weights int8: this model has no vision encoder"):
        quantization_work(config, checkpoint, checkpoint.sources())
