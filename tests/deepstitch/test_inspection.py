"""``deepstitch inspect``: its numbers against the model itself, and its report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from deepstitch.cli import cli
from deepstitch.engine_manifest import engine_folder
from deepstitch.errors import CheckpointError, InputError
from deepstitch.inspection import inspect
from deepstitch.manifest import MANIFEST_NAME, file_sha256
from deepstitch.memory_estimate import DecoderShape, Workload

from .test_engine_manifest import MANIFEST

FAMILIES = ("qwen3_vl_moe", "qwen3_vl", "qwen3_moe", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tiny_checkpoint: Callable[..., Path], family: str, tied: bool) -> None:
    from deepstitch.models import load_model

    folder = tiny_checkpoint(family, tied=tied, shards=2, dtype="BF16")
    found = inspect(folder)
    model = load_model(folder)
    parameters = dict(model.named_parameters())  # a shared tensor is listed once
    assert found.parameters == sum(parameter.numel() for parameter in parameters.values())
    experts = sum(parameter.numel() for name, parameter in parameters.items() if ".mlp.experts." in name)
    assert found.active_parameters == found.parameters - experts * 4 // 6  # two of six experts see a token
    assert "other" not in {module.name for module in found.modules}
    assert sum(module.num_bytes for module in found.modules) == 2 * found.parameters


def test_modules_of_the_first_family(tiny_checkpoint: Callable[..., Path]) -> None:
    modules = {module.name: module for module in inspect(tiny_checkpoint("qwen3_vl_moe")).modules}
    assert modules["experts"].parameters == 4 * 6 * 3 * 64 * 48
    assert modules["experts"].bytes_by_dtype == {"F32": 4 * modules["experts"].parameters}
    assert modules["routers"].parameters == 4 * 6 * 64
    assert modules["token embedding"].parameters == modules["lm_head"].parameters
    assert modules["vision blocks"].tensors == 4 * 12
    assert modules["DeepStack mergers"].tensors == 3 * 6
    assert modules["vision merger"].tensors == 6


def test_cache_and_memory_of_qwen3_vl_30b() -> None:
    shape = DecoderShape(
        hidden_size=2048,
        vocab_size=151936,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        mlp_width=8 * 768,
    )
    assert shape.kv_bytes_per_token("float16") == 98304  # 96 KiB, as the published configuration gives
    assert shape.kv_bytes_per_token("float32") == 2 * 98304
    load = Workload(context=4096, batch=2, prefill_chunk=512)
    streams = 3 * 1024 * 2048
    attention = 1024 * (64 + 8) * 128
    assert shape.activation_bytes(load) == 4 * (streams + max(attention, 3 * 1024 * 8 * 768))
    storing = replace(shape, stores_scores=True)
    assert storing.activation_bytes(load) == 4 * (streams + attention + 2 * 32 * 512 * 4096)
    at_once = Workload(context=512, batch=2)
    assert storing.activation_bytes(at_once) == 4 * (streams + attention + 2 * 32 * 512 * 512)


def test_memory_grows_with_the_request(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    small, large = (inspect(folder, context=128, batch=batch).memory[0] for batch in (1, 3))
    assert large.kv_cache_bytes == 3 * small.kv_cache_bytes == 3 * 128 * 2 * 4 * 2 * 32 * 4
    assert large.weight_bytes == small.weight_bytes == 4 * inspect(folder).parameters
    assert large.total_bytes > small.total_bytes
    with pytest.raises(InputError, match="more than the 4096 tokens"):
        inspect(folder, context=5000)


def test_only_headers_are_needed(tiny_checkpoint: Callable[..., Path]) -> None:
    """No tensor data (zeros in a sparse file do), no torch, no transformers, no onnx."""
    folder = tiny_checkpoint()
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    with weights.open("r+b") as file:
        file.truncate(header)
        file.truncate(size)
    script = (
        "import sys; from deepstitch.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, "inspect", str(folder), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["parameters"] == inspect(folder).parameters


def test_missing_shard(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing: model-00002"):
        inspect(folder)


def test_report_and_json_agree(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = str(tiny_checkpoint())
    text = CliRunner().invoke(cli, ["inspect", folder, "--context", "1000"])
    raw = CliRunner().invoke(cli, ["inspect", folder, "--context", "1000", "--json"])
    assert text.exit_code == raw.exit_code == 0
    facts = json.loads(raw.stdout)
    assert f"{facts['parameters']:,} parameters, {facts['active_parameters']:,} active" in text.stdout
    assert "context 1,000, batch 1" in text.stdout
    assert "DeepStack taps      [0, 2, 3]" in text.stdout
    for module in facts["modules"]:
        assert f"{module['name']} " in text.stdout and module["bytes"] == 4 * module["parameters"]
    assert all(len(line) <= 110 for line in text.stdout.splitlines() if not line.startswith(("checkpoint", "Est")))


def test_bundle(sample_bundle: Callable[..., Path], sample_checkpoint: Path) -> None:
    found = inspect(sample_bundle("ort-cpu"))
    source = inspect(sample_checkpoint)
    assert found.kind == "bundle" and found.intact
    assert (found.parameters, found.active_parameters) == (source.parameters, source.active_parameters)
    assert found.kv_bytes_per_token == source.kv_bytes_per_token
    assert "other" not in {module.name for module in found.modules}
    assert set(found.graphs) == {"decoder", "vision_encoder"}
    assert len(found.memory) == 1 and found.memory[0].weights == "fp32"


def test_engines_of_a_bundle(sample_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(sample_bundle("portable"), tmp_path / "bundle")
    assert inspect(bundle).engines == ()
    folder = engine_folder(bundle, 61, "8.6.1")
    folder.mkdir(parents=True)
    (folder / "decoder.plan").write_bytes(b"7 bytes")
    digest = file_sha256(bundle / MANIFEST_NAME)
    built = replace(MANIFEST, target="portable", bundle_sha256=digest)
    built.write(folder / "engine.json")
    (found,) = inspect(bundle).engines
    assert (found.name, found.status, found.card, found.size) == (folder.name, "ok", "Tesla P40", 7)
    said = CliRunner().invoke(cli, ["inspect", str(bundle)]).output
    assert "sm61-tensorrt8.6.1" in said and "Tesla P40" in said and "2,048 tokens, 1 rows" in said
    (folder / "decoder.plan").write_bytes(b"8 bytes!")
    MANIFEST.write(folder / "engine.json")
    (found,) = inspect(bundle).engines
    for text in (
        "they are of target trt8",
        "is not the one they were built from",
        "decoder.plan is missing, or not as",
    ):
        assert text in found.status
    (folder / "engine.json").write_text("{", "utf-8")
    (found,) = inspect(bundle).engines
    assert "not valid JSON" in found.status
    assert (
        json.loads(CliRunner().invoke(cli, ["inspect", str(bundle), "--json"]).output)["engines"][0]["limits"] is None
    )


def test_damaged_bundle_is_reported(sample_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(sample_bundle("ort-cpu"), folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vision_encoder.onnx").unlink()
    run = CliRunner().invoke(cli, ["inspect", str(folder), "--json"])
    assert run.exit_code == 1
    facts = json.loads(run.stdout)
    status = {file["name"]: file["status"] for file in facts["files"]}
    assert not facts["intact"]
    assert "the manifest says" in status["tokenizer.json"]
    assert "missing" in status["vision_encoder.onnx"]
    assert status["decoder.onnx"] == status["weights.safetensors"] == "ok"
