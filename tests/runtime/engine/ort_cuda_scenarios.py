"""Scenarios with the stand-in for ONNX Runtime's CUDA kernels: ``python ort_cuda_scenarios.py NAME ARGUMENT…``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / "fake_onnxruntime"), str(Path(__file__).parent)]

import fake_ort_cuda  # noqa: E402
import scenarios  # noqa: E402

from deepstitch.manifest import Quantization  # noqa: E402
from deepstitch.runtime.bundle import Bundle  # noqa: E402
from deepstitch.runtime.engine import open_engine  # noqa: E402


def answers(bundle: str) -> dict[str, Any]:
    """See :func:`scenarios.answers`."""
    return scenarios.answers(bundle, "ort-cuda")


def sequences(bundle: str) -> list[list[float]]:
    """See :func:`scenarios.sequences`."""
    return scenarios.sequences(bundle, "ort-cuda")


def command(*arguments: str) -> dict[str, Any]:
    """The command line: what it prints, how it ends, and what ONNX Runtime was asked for."""
    from deepstitch.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(list(arguments))
    return {"out": out.getvalue(), "error": error.getvalue(), "code": code, "calls": fake_ort_cuda.calls}


def refusals(bundle: str, other: str) -> dict[str, str]:
    """What is said where the card, the package or the memory do not allow it."""
    said: dict[str, str] = {}

    def opening(name: str, folder: str = bundle, **variables: str) -> None:
        with scenarios.environment(**variables):
            fake_ort_cuda.install()
            said[name] = scenarios.refusal(lambda: open_engine("ort-cuda", Bundle.open(folder)))

    opening("another target", other)
    opening("too new for Pascal", FAKE_ORT_VERSION="1.23.2")
    opening("not too new for Turing", FAKE_ORT_VERSION="1.31.1", FAKE_CUDA_SM="75")
    opening("CUDA left out", FAKE_ORT_LOSES_CUDA="1")
    failures = {
        "no code": "CUDA failure 209: no kernel image is available for execution",
        "no memory": "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9",
        "a node on the CPU": "… but fallback to CPU EP has been explicitly disabled by the user.",
        "damaged": "Protobuf parsing failed.",
    }
    for name, failure in failures.items():
        opening(name, FAKE_ORT_FAILS_TO_LOAD=failure)
    opened = Bundle.open(bundle)
    integers = Quantization(method="rtn", calibration_tokens=0, bits_per_weight=9.0, formats={"a.weight": "int8/32"})
    manifest = dataclasses.replace(opened.manifest, quantization=integers)
    for version in ("1.20.2", "1.22.0"):
        with scenarios.environment(FAKE_ORT_VERSION=version):
            fake_ort_cuda.install()
            eight_bits = dataclasses.replace(opened, manifest=manifest)
            said[f"int8 in {version}"] = scenarios.refusal(partial(open_engine, "ort-cuda", eight_bits))
    with without_cuda():
        said["no CUDA"] = scenarios.refusal(lambda: open_engine("ort-cuda", Bundle.open(bundle)))
    fake_ort_cuda.install()
    pipeline = scenarios.Pipeline.open(bundle, engine="ort-cuda")
    for name, failure in {"runs out": "CUBLAS_STATUS_ALLOC_FAILED", "fails": "CUDNN_STATUS_EXECUTION_FAILED"}.items():
        with scenarios.environment(FAKE_ORT_FAILS_TO_RUN=failure):
            said[name] = scenarios.refusal(lambda: pipeline.generate("Hello", max_tokens=1))
    return said


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """The package for CPUs."""
    import onnxruntime

    onnxruntime.get_available_providers = lambda: ["CPUExecutionProvider"]
    yield


if __name__ == "__main__":
    fake_ort_cuda.install()
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
