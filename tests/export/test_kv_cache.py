"""A KV cache of fewer bits: graphs, scales, and bundles that run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import deepstitch
from deepstitch.cli import main
from deepstitch.errors import ConfigError, InputError, UnsupportedError
from deepstitch.export import ExportConfig, QuantizationConfig, export_checkpoint
from deepstitch.export.compare.comparison import compare_bundle
from deepstitch.export.kv_functions import KV_CACHES
from deepstitch.export.quantize import kv_scales
from deepstitch.export.quantize.calibration import CalibrationSet
from deepstitch.inspection import inspect
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.models.sample.calibration import write_calibration
from deepstitch.models.sample.files import CHECKPOINT
from deepstitch.runtime.bundle import DECODER, Bundle
from deepstitch.runtime.decode import DecoderState
from deepstitch.runtime.embedding import EmbeddingTable, merge
from deepstitch.runtime.encoder_cache import VisionFeatures
from deepstitch.runtime.engine.ort import OrtEngine

from .comparing import spoiled

Arrays = dict[str, np.ndarray]
SMALL = ("fp16", "int8", "int4")
INTEGER = ("int8", "int4")
TARGETS = ("portable", "ort-cpu")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("calibration"), per_kind=2)


@pytest.fixture(scope="module")
def bundle(
    checkpoints: Callable[..., Checkpoint], export: Callable[..., Any], conversations: Path
) -> Callable[..., Path]:
    """``bundle(kind, target)`` of a tiny model."""

    def make(kind: str, target: str = "ort-cpu", family: str = "qwen3_vl_moe") -> Path:
        options = {"quantization": QuantizationConfig(calibration=conversations)} if kind in INTEGER else {}
        exported = export(checkpoints(family), target=target, kv_cache=kind, **options)
        return Path(exported.bundle)

    return make


class TestBundle:
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize(
        ("kind", "dtype", "width"), [("fp16", "float16", 32), ("int8", "int8", 32), ("int4", "uint8", 16)]
    )
    def test_contract(self, kind: str, dtype: str, width: int, target: str, bundle: Callable[..., Path]) -> None:
        opened = Bundle.open(bundle(kind, target))
        graph = onnx.load(opened.graph_path(DECODER), load_external_data=False).graph
        for specs, values in (
            (opened.graph(DECODER).inputs, graph.input),
            (opened.graph(DECODER).outputs, graph.output),
        ):
            cache = {spec.name: spec for spec in specs if spec.name.startswith(("past_key_values.", "present."))}
            assert len(cache) == 2 * opened.manifest.model.num_hidden_layers
            assert {(spec.dtype, spec.shape) for spec in cache.values()} == {(dtype, ("B", 2, "C", width))}
            found = {value.name: value.type.tensor_type for value in values if value.name in cache}
            assert {helper.tensor_dtype_to_np_dtype(each.elem_type).name for each in found.values()} == {dtype}
            assert {each.shape.dim[3].dim_value for each in found.values()} == {width}

    def test_inspect(self, bundle: Callable[..., Path]) -> None:
        found = {kind: inspect(bundle(kind)) for kind in ("fp32", *SMALL)}
        per_token = {kind: each.kv_bytes_per_token for kind, each in found.items()}
        assert per_token == {"fp32": 2048, "fp16": 1024, "int8": 512, "int4": 256}
        assert found["int4"].kv_cache_dtype == "int4"
        assert found["fp32"].memory[0].kv_cache_bytes == 8 * found["int4"].memory[0].kv_cache_bytes
        state = DecoderState(OrtEngine(Bundle.open(bundle("int4")), graphs=[DECODER]), capacity=64)
        assert state.cache_bytes == 64 * per_token["int4"]

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("kind", SMALL)
    def test_computes_what_the_model_does_with_rounded_keys(
        self, kind: str, target: str, bundle: Callable[..., Path], checkpoints: Callable[..., Checkpoint]
    ) -> None:
        """Prefill, chunks, turns, batches, decode: within 0.5 % of the PyTorch model that rounds as the cache does."""
        found = compare_bundle(
            Bundle.open(bundle(kind, target)), checkpoint=checkpoints("qwen3_vl_moe").folder, progress=False
        )
        assert found.passed

    @pytest.mark.parametrize("kind", INTEGER)
    def test_swapped_scales_show(
        self, kind: str, bundle: Callable[..., Path], checkpoints: Callable[..., Checkpoint], tmp_path: Path
    ) -> None:
        def swap(folder: Path) -> None:
            model = onnx.load(folder / "decoder.onnx", load_external_data=False)
            for node in model.graph.node:
                if node.op_type == "GroupQueryAttention":
                    node.input[12], node.input[13] = node.input[13], node.input[12]
            onnx.save(model, folder / "decoder.onnx")

        damaged = spoiled(bundle(kind), tmp_path / "bundle", swap)
        folder = checkpoints("qwen3_vl_moe").folder
        assert not compare_bundle(Bundle.open(damaged), checkpoint=folder, progress=False).passed

    @pytest.mark.parametrize("kind", INTEGER)
    def test_both_targets_answer_alike(self, kind: str, bundle: Callable[..., Path]) -> None:
        """Greedy answers, a batch of unequal prompts, and a prompt fed in chunks; in place where the target can."""
        prompts = ["Which word comes next?", "a", "What color is the circle on the left of the red square?"]
        answers = {}
        for target in TARGETS:
            pipeline = deepstitch.load(bundle(kind, target), threads=1)
            assert pipeline.manifest.model.kv_cache_in_place
            alone = [pipeline.generate(prompt, max_tokens=6, ignore_eos=True).token_ids for prompt in prompts]
            chunked = [
                pipeline.generate(prompt, max_tokens=6, ignore_eos=True, prefill_chunk=3).token_ids
                for prompt in prompts
            ]
            batch = [each.token_ids for each in pipeline.generate_batch(prompts, max_tokens=6, ignore_eos=True)]
            assert alone == chunked == batch
            answers[target] = alone
        assert answers["portable"] == answers["ort-cpu"]


class TestScales:
    def test_cover_what_the_cache_holds(
        self, bundle: Callable[..., Path], checkpoints: Callable[..., Checkpoint], conversations: Path
    ) -> None:
        """int8 scales reach a fifth beyond the float32 bundle's own cache after the same prompts."""
        engine = OrtEngine(Bundle.open(bundle("fp32")))
        prompts = CalibrationSet.open(conversations, checkpoints("qwen3_vl_moe")).prompts
        held = [cache_after(engine, prompt) for prompt in prompts]
        stored = stored_scales(bundle("int8"))
        assert len(stored) == len(held[0])
        for name, scale in stored.items():
            values = np.concatenate([cache[name] for cache in held], axis=1)  # (Hkv, tokens, D)
            if name.endswith("key"):  # a rotation keeps the length of a pair, so that no position goes beyond
                half = values.shape[-1] // 2
                values = np.tile(np.hypot(values[..., :half], values[..., half:]), 2)
            expected = 1.2 * np.abs(values).max(axis=1) / 127
            np.testing.assert_allclose(scale[0, :, 0], expected, rtol=1e-4)

    def test_int4_cuts_off_what_is_rare(self) -> None:
        rng = np.random.default_rng(0)
        found = kv_scales.torch.from_numpy(rng.standard_normal((20_000, 2, 8), dtype=np.float32))
        found[17, 1, 3] = 40.0
        largest = found.abs().amax(0)
        scale = kv_scales._scale(found, largest, KV_CACHES["int4"])[0, :, 0]
        reach = 7 * scale / largest.numpy()
        assert np.delete(reach.ravel(), 11).min() > 0.6 and reach.max() <= 1.0
        assert scale[1, 3] < 0.7 * 40 / 7

    def test_a_silent_channel(self) -> None:
        nothing = kv_scales.torch.zeros(5, 2, 8)
        for kind in INTEGER:
            scale = kv_scales._scale(nothing, nothing.amax(0), KV_CACHES[kind])
            assert np.isfinite(1 / scale).all()


def cache_after(engine: OrtEngine, prompt: Any) -> Arrays:
    """Keys and values ``(Hkv, tokens, D)`` by layer and part, after a prompt."""
    model = engine.bundle.manifest.model
    features = []
    if prompt.vision is not None:
        embeds, deepstack = engine.vision(prompt.vision)
        cuts = np.cumsum(prompt.vision.tokens_per_item)[:-1]
        pairs = zip(np.split(embeds, cuts), np.split(deepstack, cuts), strict=True)
        features = [VisionFeatures(*pair) for pair in pairs]
    row = merge(
        EmbeddingTable.open(engine.bundle),
        prompt,
        features,
        visual_ids=[model.image_token_id, model.video_token_id],
        deepstack_width=model.num_deepstack * model.hidden_size,
    )
    state = DecoderState(engine, capacity=len(row))
    state.prefill([row])
    ((past, _),) = state._cache.bindings(range(1))
    return {name: array[0, :, : len(row)] for name, array in past.items()}


def stored_scales(folder: Path) -> Arrays:
    """Scales in a bundle's decoder by cache tensor."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    return {
        each.name.removesuffix(".scale"): onnx.numpy_helper.to_array(each)
        for each in graph.initializer
        if each.name.startswith("past_key_values.")
    }


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "quantization", "message"),
        [
            ({"kv_cache": "int3"}, {}, "--kv-cache int3: must be one of fp32, fp16, int8, int4"),
            ({"kv_cache": "int8"}, {}, "--calibration FILE"),
            ({"kv_cache": "int4", "weights": "int8"}, {}, "--calibration FILE"),
            ({"kv_cache": "fp16"}, {"calibration": Path("a.jsonl")}, "--calibration and --budget are for"),
            ({"kv_cache": "fp16", "weights": "int8"}, {"calibration": Path("a.jsonl"), "method": "rtn"}, "takes no"),
            ({"kv_cache": "int8"}, {"calibration": Path("a.jsonl"), "block": 64}, "--block"),
        ],
    )
    def test_flags(self, options: dict[str, str], quantization: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises((ConfigError, InputError, UnsupportedError), match=message):
            ExportConfig(
                checkpoint=tmp_path,
                output=tmp_path / "bundle",
                quantization=QuantizationConfig(**quantization),
                **options,
            )

    def test_rounding_weights_with_a_calibrated_cache(self, tmp_path: Path) -> None:
        """The calibration set is for the cache then."""
        quantization = QuantizationConfig(calibration=Path("a.jsonl"), method="rtn")
        ExportConfig(checkpoint=tmp_path, output=tmp_path, weights="int8", kv_cache="int8", quantization=quantization)

    @pytest.mark.parametrize("kind", SMALL)
    def test_narrow_heads(self, kind: str) -> None:
        KV_CACHES[kind].check(80)
        with pytest.raises(UnsupportedError, match=f"--kv-cache {kind}: heads of this model are 20 wide"):
            KV_CACHES[kind].check(20)

    def test_on_the_command_line(
        self, checkpoints: Callable[..., Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["export", str(checkpoints("qwen3").folder), "-o", str(tmp_path / "bundle"), "--quiet"]
        assert main([*arguments, "--kv-cache", "int8"]) == 2
        assert "pass conversations with --calibration" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_command_line(
    checkpoints: Callable[..., Checkpoint], conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Integer weights and an integer cache of a text model, compared after the export."""
    output = tmp_path / "bundle"
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(4)), "utf-8")
    arguments = ["export", str(checkpoints("qwen3_moe").folder), "-o", str(output), "--quiet", "--weights", "int8"]
    assert main([*arguments, "--kv-cache", "int8", "--method", "rtn", "--calibration", str(lines), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["comparison"]["passed"]
    command = Bundle.open(output).manifest.command
    assert "--kv-cache int8" in command and "--calibration text.jsonl" in command


@pytest.mark.slow
@pytest.mark.parametrize("kind", INTEGER)
def test_the_sample_model_still_answers(kind: str, tmp_path: Path) -> None:
    from deepstitch.models.sample.generator import HELD_OUT, make_episode

    conversations = write_calibration(tmp_path / "calibration")
    config = ExportConfig(
        checkpoint=CHECKPOINT,
        output=tmp_path / "bundle",
        kv_cache=kind,
        quantization=QuantizationConfig(calibration=conversations),
        progress=False,
    )
    pipeline = deepstitch.load(export_checkpoint(config))
    asked = right = 0
    for index in range(10):
        episode = make_episode(HELD_OUT, "one", index)
        for question in episode.questions:
            result = pipeline.generate(question.text, images=episode.pixels(), max_tokens=24)
            asked += 1
            right += result.text.strip() == question.answer
    assert right / asked >= (0.95 if kind == "int8" else 0.85)
