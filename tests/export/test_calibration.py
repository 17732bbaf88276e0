"""Calibrated and mixed quantization: prompts through the layers, interruptions, and the choice of bits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepstitch.cli import main
from deepstitch.errors import InputError
from deepstitch.export import ExportConfig, QuantizationConfig, export_checkpoint
from deepstitch.export.compare.comparison import compare_bundle
from deepstitch.export.compare.quality import measure_quality
from deepstitch.export.quantize import bit_search
from deepstitch.export.quantize.allocation import allocate, parse_budget
from deepstitch.export.quantize.calibration import CalibrationSet
from deepstitch.export.quantize.quantizer import Quantizer
from deepstitch.export.quantize.recipe import Recipe, decoder_groups
from deepstitch.export.quantize.sensitivity import _rounded, load_or_measure
from deepstitch.export.quantize.store import QuantizedStore
from deepstitch.export.quantize.walk import LayerWalk
from deepstitch.manifest import Manifest
from deepstitch.models.build import load_model
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.models.sample.calibration import write_calibration
from deepstitch.runtime.bundle import Bundle


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("calibration"), per_kind=2)


def integers(**options: Any) -> dict[str, Any]:
    return {"quantization": QuantizationConfig(**options)}


class TestCalibration:
    def test_the_walk_is_the_model(self, checkpoints: Callable[..., Any], conversations: Path) -> None:
        for family in ("qwen3_vl_moe", "qwen3"):
            checkpoint: Checkpoint = checkpoints(family)
            path = conversations if family == "qwen3_vl_moe" else _text_only(conversations)
            prompts = CalibrationSet.open(path, checkpoint).prompts
            walk = LayerWalk(checkpoint.config, checkpoint.sources(), prompts)
            walk.start()
            for index in range(walk.num_layers):
                with walk.layer(index) as layer:
                    walk.advance(index, walk.outputs(layer))
            model: Any = load_model(checkpoint.folder)
            for prompt, hidden in zip(prompts, walk.final_hidden(), strict=True):
                ids = torch.from_numpy(prompt.input_ids)[None]
                positions = torch.from_numpy(prompt.position_ids)[:, None]
                vision = None
                if prompt.vision is not None:
                    arrays = prompt.vision.graph_inputs()
                    vision = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
                with torch.no_grad():
                    expected = model(ids, positions, vision) if vision else model(ids, positions)
                    actual = model.lm_head(hidden)
                torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)

    def test_an_interrupted_run_goes_on(
        self, checkpoints: Callable[..., Any], conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = checkpoints("qwen3_vl_moe")

        def config(name: str) -> ExportConfig:
            return ExportConfig(
                checkpoint=checkpoint.folder,
                output=tmp_path / name,
                weights="int4",
                progress=False,
                **integers(calibration=conversations),
            )

        add_unit = QuantizedStore.add_unit
        done: list[str] = []

        def stop_after_four(self: QuantizedStore, unit: str, arrays: Any) -> None:
            if len(done) == 4:
                raise KeyboardInterrupt
            add_unit(self, unit, arrays)
            done.append(unit)

        monkeypatch.setattr(QuantizedStore, "add_unit", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(config("bundle"))
        assert not (tmp_path / "bundle").exists(), "no half bundle"
        assert any(path.name.startswith(".bundle.quantize-") for path in tmp_path.iterdir())
        resumed: list[str] = []

        def record(self: QuantizedStore, unit: str, arrays: Any) -> None:
            resumed.append(unit)
            add_unit(self, unit, arrays)

        monkeypatch.setattr(QuantizedStore, "add_unit", record)
        export_checkpoint(config("bundle"))
        assert resumed and not set(resumed) & set(done)
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "nothing is left behind"
        export_checkpoint(config("whole"))
        weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("bundle", "whole")]
        assert weights[0] == weights[1]

    def test_calibrated_bundles(
        self, export: Callable[..., Any], checkpoints: Callable[..., Any], conversations: Path
    ) -> None:
        checkpoint = checkpoints("qwen3_vl_moe")
        divergence = {}
        for options in ({"method": "rtn"}, {"calibration": conversations}):
            exported = export(
                checkpoint, target="portable", weights="int4", vision_weights="fp32", **integers(**options)
            )
            bundle = Bundle.open(exported.bundle)
            assert compare_bundle(bundle, progress=False).passed
            assert bundle.manifest.quantization is not None
            found = measure_quality(bundle, checkpoint.folder, conversations, progress=False)
            divergence[bundle.manifest.quantization.method] = found.mean_kl
        assert divergence["gptq"] < 0.8 * divergence["rtn"], divergence

    def test_quality_of_the_same_weights_is_perfect(
        self, export: Callable[..., Any], checkpoints: Callable[..., Any], conversations: Path
    ) -> None:
        exported = export(checkpoints("qwen3_vl_moe"), target="portable")
        found = measure_quality(Bundle.open(exported.bundle), exported.checkpoint.folder, conversations, progress=False)
        assert found.mean_kl < 1e-6 and found.top1_agreement == 1.0 and found.positions > 100


def _text_only(conversations: Path) -> Path:
    path = conversations.parent / "text.jsonl"
    path.write_text('{"prompt": "What is two plus three?", "answer": "5"}\n\n{"prompt": "red"}\n', "utf-8")
    return path


class TestMixed:
    def test_the_choice_is_optimal(self) -> None:
        random = np.random.default_rng(0)
        groups = [f"g{index}" for index in range(9)]
        sizes = {
            group: {4: int(size), 8: int(2 * size)}
            for group, size in zip(groups, random.integers(5, 99, 9), strict=True)
        }
        damages = {group: {4: float(random.random()), 8: float(random.random()) / 50} for group in groups}
        budget = int(1.4 * sum(by_bits[4] for by_bits in sizes.values()))
        chosen = allocate(damages, sizes, budget)
        possible = [
            sum(damages[group][bits] for group, bits in zip(groups, choice, strict=True))
            for choice in itertools.product((4, 8), repeat=9)
            if sum(sizes[group][bits] for group, bits in zip(groups, choice, strict=True)) <= budget
        ]
        assert chosen.nbytes <= budget and chosen.damage == pytest.approx(min(possible))

    def test_budgets(self) -> None:
        sizes = {"a": {4: 500_000, 8: 900_000}}
        assert parse_budget("0.7MB", sizes, 800_000) == 700_000
        assert parse_budget("8 bits", sizes, 800_000) == 800_000
        with pytest.raises(InputError, match=r"smallest choice takes 0\.50MB \(5\.00bits"):
            parse_budget("100KB", sizes, 800_000)
        assert parse_budget("9bits", sizes, 800_000) == 900_000, "all at 8 bits is a choice too"
        with pytest.raises(InputError, match=r"give at most 0\.90MB \(9\.00bits per weight\), or .* --weights int8"):
            parse_budget("1GB", sizes, 800_000)
        uneven = {"a": {4: 500_001, 8: 899_999}}
        for text, named in (("1KB", "0.51MB"), ("1KB", "5.01bits"), ("1GB", "0.89MB"), ("1GB", "8.99bits")):
            with pytest.raises(InputError, match=named):
                parse_budget(text, uneven, 800_000)
            parse_budget(named, uneven, 800_000)  # what the message names is accepted
        with pytest.raises(InputError, match="such as 9GB"):
            parse_budget("lots", sizes, 800_000)

    @pytest.mark.parametrize("budget", ["2bits", "1KB", "20bits", "1GB"])
    def test_a_budget_out_of_reach(
        self,
        budget: str,
        checkpoints: Callable[..., Any],
        conversations: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(bit_search, "measure", _must_not_run)
        monkeypatch.setattr(Quantizer, "run", _must_not_run)
        folder = str(checkpoints("qwen3_vl_moe").folder)
        flags = ["--weights", "mixed", "--budget", budget, "--calibration", str(conversations), "--quiet"]
        assert main(["export", folder, "-o", str(tmp_path / "bundle"), *flags]) == 2
        assert f"--budget {budget}: " in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "{}", '{"a": {"4": 1}}', '{"a": {"4": 1, "8": null}}', '{"a": {"4": NaN, "8": 1}}', '{"a": 1}'],
    )
    def test_a_damaged_measurement_is_taken_again(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "cache" / "sensitivity.json"
        path.parent.mkdir()
        path.write_text(text, "utf-8")
        wanted = {"a": (4, 8)}
        assert load_or_measure(path, wanted, lambda: {"a": {4: 0.5, 8: 0.25}}) == {"a": {4: 0.5, 8: 0.25}}
        assert load_or_measure(path, wanted, _must_not_run) == {"a": {4: 0.5, 8: 0.25}}  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", ["attention.out", "experts"])
    def test_a_failed_measurement_leaves_the_weights(self, kind: str, checkpoints: Callable[..., Any]) -> None:
        checkpoint = checkpoints("qwen3_moe")
        sources = checkpoint.sources()
        group = next(each for each in decoder_groups(sources) if each.name == f"layers.1.{kind}")
        formats = Recipe.uniform(sources, bits=4, vision_bits=None, block=32, symmetric=True).formats
        walk = LayerWalk(checkpoint.config, sources, ())
        with walk.layer(1) as layer:

            def weights() -> list[torch.Tensor]:
                mlp: Any = layer.mlp
                return [*(each.detach().clone() for each in layer.parameters()), mlp.experts.down_proj[0]]

            before = weights()
            with pytest.raises(MemoryError), _rounded(layer, walk.layer_prefix(1), group, formats):
                assert any(not torch.equal(a, b) for a, b in zip(weights(), before, strict=True))
                raise MemoryError
            assert all(torch.equal(a, b) for a, b in zip(weights(), before, strict=True))

    def test_a_mixed_bundle(
        self, checkpoints: Callable[..., Any], conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        checkpoint = checkpoints("qwen3_vl_moe")

        def export(name: str, budget: str) -> Manifest:
            asked = integers(calibration=conversations, budget=budget)
            config = ExportConfig(
                checkpoint=checkpoint.folder, output=tmp_path / name, weights="mixed", progress=False, **asked
            )
            export_checkpoint(config)
            return Manifest.read(tmp_path / name)

        first = export("first", "7bits")
        assert first.quantization is not None and first.quantization.bits_per_weight <= 7
        assert {text[:4] for text in first.quantization.formats.values()} == {"int4", "int8"}
        assert {"quantization.json", "quantization.html"} <= set(first.files)
        report = json.loads((tmp_path / "first" / "quantization.json").read_text())
        damages = {group["name"]: group["damage"] for group in report["groups"]}
        assert all(0 < each["8"] < each["4"] for each in damages.values())
        assert compare_bundle(Bundle.open(tmp_path / "first"), progress=False).passed
        monkeypatch.setattr(bit_search, "measure", _must_not_run)
        second = export("second", "6bits")
        assert second.quantization is not None and second.quantization.bits_per_weight <= 6


def _must_not_run(*_: object) -> None:
    raise AssertionError("measured again")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no conversation"),
        ("{", "line 1"),
        ('{"prompt": "a"}\n{"promt": "a"}', "line 2: unknown entry 'promt' .did you mean 'prompt'"),
        ('{"prompt": "a", "images": ["missing.png"]}', "missing.png"),
        ("[]", "not a JSON object"),
    ],
)
def test_refused_calibration(
    text: str,
    message: str,
    checkpoints: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Quantizer, "run", _must_not_run)
    path = tmp_path / "calibration.jsonl"
    path.write_text(text, "utf-8")
    arguments = ["export", str(checkpoints("qwen3_vl_moe").folder), "--weights", "int4", "-o", str(tmp_path / "b")]
    assert main([*arguments, "--calibration", str(path), "--quiet"]) == 2
    assert message.replace(" .", " (") in capsys.readouterr().err.replace("(did", "(did")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["calibration.jsonl"]
