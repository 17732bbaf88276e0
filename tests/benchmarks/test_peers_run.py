"""Choosing settings, running children, and the table and plot of the results."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.figures import select
from benchmarks.peers.peers import PEERS, Candidate, own_variant
from benchmarks.peers.report import markdown
from benchmarks.peers.tuning import Job, choose, jobs

psutil = pytest.importorskip("psutil")

from benchmarks.peers.runner import run_child  # noqa: E402  needs psutil
from benchmarks.peers.session import without_folders  # noqa: E402  needs psutil


def variant(peer: str, name: str) -> Any:
    return next(each for each in PEERS[peer].variants if each.name == name)


def llama(figures: list[str], values: dict[str, Any]) -> tuple[dict[str, Candidate], list[Job]]:
    """Choose for llama.cpp where ``values[figure](open, settings)`` is what a run gives, or None if it fails."""
    executed: list[Job] = []

    def execute(wanted: list[Job]) -> Iterator[tuple[str, Candidate, float]]:
        executed.extend(wanted)
        for job in wanted:
            for name, settings in job.runs:
                value = values[name](job.open, settings)
                if value is not None:
                    yield name, Candidate(open=job.open, settings=settings), value

    q8 = variant("llama.cpp", "Q8_0")
    chosen, _ = choose("llama.cpp", q8, select(figures), execute, quick=False, experts=True)
    return chosen, executed


def speed(opened: dict[str, Any], settings: dict[str, Any]) -> float:
    return (0 if opened["repack"] else 10) + (1 if settings == {"flash": "off", "kv": "bf16"} else 0)


def test_the_fastest_settings_win() -> None:
    encode = {("bf16", "off"): 0.1}
    chosen, _ = llama(
        ["prefill", "image", "first_token", "quality", "load"],
        {
            "prefill_512": speed,
            "image_512x512": lambda _, s: encode.get((s["mmproj"], s["vision_flash"]), 1.0),
            "load": lambda opened, _: 2.0 if opened["repack"] else 1.0,
        },
    )
    best = Candidate(open={"repack": False}, settings={"flash": "off", "kv": "bf16"})
    assert chosen["prefill_128"] == chosen["prefill_512"] == chosen["prefill_2048"] == chosen["quality"] == best
    assert chosen["image_1024x768"].settings == {"mmproj": "bf16", "vision_flash": "off"}
    assert chosen["first_token"].settings == {**best.settings, "mmproj": "bf16", "vision_flash": "off"}
    assert chosen["load"].open == {"repack": False}


def test_only_finalists_decode_at_the_longest_context() -> None:
    tried: list[dict[str, Any]] = []

    def longest(opened: dict[str, Any], settings: dict[str, Any]) -> float:
        tried.append(settings)
        return 5.0 if settings["kv"] == "f16" else 1.0

    def shorter(opened: dict[str, Any], settings: dict[str, Any]) -> float | None:
        if settings["kv"] == "q8_0":
            return None  # refused
        return {"f16": 1.0, "bf16": 3.0, "f32": 2.0}[settings["kv"]] + opened["repack"]

    chosen, _ = llama(["decode_2048", "decode_8192"], {"decode_2048": shorter, "decode_8192": longest})
    assert len(tried) == 3
    assert chosen["decode_2048"].settings["kv"] == "bf16"
    assert chosen["decode_8192"].settings["kv"] != "q8_0"


def test_settings_that_open_the_model_alike_share_a_process() -> None:
    chosen = {
        "prefill_128": Candidate(open={"repack": False}),
        "decode_64": Candidate(open={"repack": True}, settings={"kv": "f16"}),
        "decode_2048": Candidate(open={"repack": True}, settings={"kv": "bf16"}),
        "load": Candidate(open={"repack": True}),
    }
    found = jobs(chosen)
    assert [(job.group, len(job.runs), job.parts) for job in found] == [
        ("text", 1, ["text"]),
        ("text", 2, ["text"]),
        ("load", 1, ["text", "vision"]),
    ]


def test_variants_of_ones_own_are_compared_by_their_weights() -> None:
    assert own_variant("a", ("--weights", "int8", "--kv-cache", "fp16")).bits == 8
    assert own_variant("b", ("--weights", "mixed", "--budget", "5bits")).bits == 4
    assert own_variant("int8", ("--block", "128")).bits == 8


def interpreter(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_child_that_does_not_end_is_ended(tmp_path: Path) -> None:
    request = {"threads": 1, "scratch": str(tmp_path)}
    done = run_child(interpreter(tmp_path, "sleep 60"), "ours", request, limit_seconds=0.3)
    assert done.error == "no end within 0 s"
    assert done.seconds < 30
    assert done.result == {"runs": []}


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    request = {"threads": 1, "scratch": str(tmp_path)}
    done = run_child(interpreter(tmp_path, "echo no such kernel >&2; exit 3"), "ours", request, limit_seconds=30)
    assert done.error == "exit code 3: no such kernel"


def test_errors_do_not_name_folders() -> None:
    text = "FileError: |srv|data|mid|model.onnx: src|core.cpp:84, N|A".replace("|", "/")
    assert without_folders(text) == "FileError: model.onnx: src/core.cpp:84, N/A"


def report() -> dict[str, Any]:
    def figure(value: float, **more: Any) -> dict[str, Any]:
        return {"median": value, "min": value / 2, "max": value * 2, "rounds": 3, "noisy": False, **more}

    def case(peer: str, variant: str, bits: int, **more: Any) -> dict[str, Any]:
        case = {"shape": "mid", "peer": peer, "variant": variant, "bits": bits, "always": False, "version": "1.0"}
        return {**case, "error": None, "errors": {}, "figures": {}, "settings": {}, "tried": {}, **more}

    ours = {
        "prefill_128": figure(400.0),
        "decode_64": figure(20.0, noisy=True, bytes_per_step=2**20, bandwidth_share=0.75, outside_engine_share=0.02),
        "quality": figure(1e-5, top1=0.97),
    }
    theirs = {"prefill_128": figure(100.0)}
    return {
        "machine": {"cpu": "CPU", "avx512_vnni": False, "memory_gib": 16, "python": "3.11", "versions": {"numpy": "2"}},
        "threads": 2,
        "memory_bandwidth_bytes_per_second": 3e10,
        "rounds": 3,
        "noise_limit": 0.04,
        "figures": {"prefill_128": "tok/s", "decode_64": "tok/s", "quality": "nats"},
        "cases": [
            case("deepstitch", "int8", 8, figures=ours, file_bytes=2**30),
            case("llama.cpp", "Q8_0", 8, figures=theirs, errors={"decode_64": "out | of luck"}),
            case("onnxruntime-genai", "int8", 8, error="NotImplementedError: not this model"),
        ],
        "ratios": [
            {
                "shape": "mid",
                "variant": "int8",
                "peer": "llama.cpp",
                "figures": {"prefill_128": {"ratio": 4.0, "against": "Q8_0"}},
            }
        ],
    }


def test_table() -> None:
    lines = markdown(report()).splitlines()
    ours = next(line for line in lines if line.startswith("| deepstitch | int8 | 4"))
    assert ours == "| deepstitch | int8 | 400 (200–800) | 20 (10–40)* | 1.0e-05, top-1 0.97 | 1024 |"
    assert "| llama.cpp | Q8_0 | 100 (50–200) | failed | – | – |" in lines
    assert "| onnxruntime-genai | int8 | failed | failed | failed | – |" in lines
    assert "| int8 : llama.cpp | 4.00 (Q8_0) | – | – |" in lines
    assert any("75% of the bandwidth, outside the engine 2.0%" in line for line in lines)
    assert "| llama.cpp | Q8_0 | decode_64 | out \\| of luck |" in lines
    assert "| onnxruntime-genai | int8 | all | NotImplementedError: not this model |" in lines


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.peers.plot import bars, draw, labels

    assert labels(report(), "mid") == ["deepstitch int8", "llama.cpp Q8_0"]
    assert bars(report(), "mid", "decode_64") == [("deepstitch", 20.0, 10.0, 20.0), ("llama.cpp", 0.0, 0.0, 0.0)]
    draw(report(), tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 1000
