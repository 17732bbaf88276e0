"""ONNX Runtime with CUDA, where there is none: sessions on the CPU, in the order of the stand-in's streams.

Memory is that of the stand-in libcuda, which only work in a stream may touch. What the real package refuses, this
refuses: providers and options it does not know, tensors bound to another device, a run in which something is not bound.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

_STREAM = Path(__file__).parents[1] / "fake_tensorrt" / "tensorrt" / "_stream.py"
_spec = importlib.util.spec_from_file_location("stand_in_streams", _STREAM)
assert _spec is not None and _spec.loader is not None
streams = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(streams)

PROVIDER = "CUDAExecutionProvider"
calls: list[tuple[Any, ...]] = []
_OPTIONS = {"device_id", "user_compute_stream", "arena_extend_strategy", "use_tf32", "gpu_mem_limit"}
_session = onnxruntime.InferenceSession


def install() -> None:
    """Put the stand-in where the runtime looks; FAKE_ORT_VERSION is its version."""
    onnxruntime.__version__ = os.environ.get("FAKE_ORT_VERSION", "1.20.2")
    onnxruntime.get_available_providers = lambda: [PROVIDER, "CPUExecutionProvider"]
    onnxruntime.InferenceSession = _open
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls = lambda: calls.append(("preload_dlls",))


def _open(path: Any, *arguments: Any, providers: Sequence[Any] = (), **options: Any) -> Any:
    """A session for the card, or the package's own for the CPU."""
    for_card = any(PROVIDER in each for each in providers if isinstance(each, tuple))
    return (CudaSession if for_card else _session)(path, *arguments, providers=providers, **options)


class CudaSession:
    """What of ``onnxruntime.InferenceSession`` the engine uses."""

    def __init__(
        self,
        path: str,
        sess_options: onnxruntime.SessionOptions,
        *,
        providers: Sequence[tuple[str, dict[str, str]]],
        enable_fallback: bool,
    ) -> None:
        ((name, options),) = providers
        if name != PROVIDER or options.keys() - _OPTIONS or enable_fallback:
            raise ValueError(f"not for a card: {providers}")
        if sess_options.get_session_config_entry("session.disable_cpu_ep_fallback") != "1":
            raise ValueError("nodes may fall back to the CPU")
        failure = os.environ.get("FAKE_ORT_FAILS_TO_LOAD")
        if failure:
            raise RuntimeError(failure)
        self.options = options
        self._session = _session(path, _cpu_options(), providers=["CPUExecutionProvider"])
        calls.append(("session", Path(path).name, dict(options)))

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if os.environ.get("FAKE_ORT_LOSES_CUDA") else [PROVIDER, "CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def io_binding(self) -> Binding:
        return Binding()

    def run(self, names: Sequence[str], inputs: dict[str, Any]) -> list[Any]:
        return self._session.run(names, inputs)

    def run_with_iobinding(self, binding: Binding, run_options: onnxruntime.RunOptions) -> None:
        missing = {each.name for each in self.get_inputs()} - binding.inputs.keys()
        missing |= {each.name for each in self.get_outputs()} - binding.outputs.keys()
        if missing:
            raise RuntimeError(f"Missing Input: {sorted(missing)}")
        failure = os.environ.get("FAKE_ORT_FAILS_TO_RUN")
        if failure:
            raise RuntimeError(failure)
        waits = run_options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
        calls.append(("run", {name: tensor[2] for name, tensor in binding.inputs.items()}, waits))
        if streams.enqueue(int(self.options["user_compute_stream"]), lambda: self._compute(binding)):
            raise RuntimeError("the stand-in libcuda took no work")

    def _compute(self, binding: Binding) -> None:
        inputs = {name: _array(*tensor).copy() for name, tensor in binding.inputs.items()}
        results = self._session.run(list(binding.outputs), inputs)
        for tensor, result in zip(binding.outputs.values(), results, strict=True):
            target = _array(*tensor)
            if target.shape != result.shape or target.dtype != result.dtype:
                raise RuntimeError(f"bound {target.dtype}{target.shape}, computed {result.dtype}{result.shape}")
            target[...] = result


class Binding:
    """What of ``IOBinding`` the engine uses."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, tuple[Any, ...]] = {}

    def bind_input(self, name: str, device: str, ordinal: int, kind: type, shape: Sequence[int], pointer: int) -> None:
        self._bind(self.inputs, name, device, ordinal, kind, shape, pointer)

    def bind_output(self, name: str, device: str, ordinal: int, kind: type, shape: Sequence[int], pointer: int) -> None:
        self._bind(self.outputs, name, device, ordinal, kind, shape, pointer)

    def _bind(self, place: dict[str, Any], name: str, device: str, ordinal: int, *tensor: Any) -> None:
        if (device, ordinal) != ("cuda", 0) or not isinstance(tensor[2], int):
            raise ValueError(f"{name}: bound to {device} {ordinal}")
        place[name] = tensor


def _cpu_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return options


def _array(kind: Any, shape: Sequence[int], pointer: int) -> np.ndarray:
    dtype = np.dtype(kind)
    count = math.prod(shape)
    if not count:
        return np.zeros(shape, dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(memory, dtype).reshape(shape)
