"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from deepstitch.errors import BundleError, InputError
from deepstitch.manifest import TensorSpec
from deepstitch.runtime.bundle import DECODER, VISION_ENCODER, Bundle
from deepstitch.runtime.engine import Array, BoundRun, EngineLimits, GraphRunner, Tensor
from deepstitch.runtime.engine.memory import HOST, Memory
from deepstitch.runtime.engine.packed import packed_graph

if TYPE_CHECKING:
    from deepstitch.runtime.preprocess import VisionBatch

__all__ = ["ORT_TARGETS", "OrtEngine", "OrtGraph", "load_failure", "tensor_specs"]

ORT_TARGETS = ("portable", "ort-cpu", "ort-cuda")
"""Export targets whose graphs ONNX Runtime runs on the CPU; those of the last are made for a card."""

_FATAL_ONLY = 4
_REASON_LENGTH = 200
_PROVIDERS = ["CPUExecutionProvider"]
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OrtGraph:
    """One inference session."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._output_names = [output.name for output in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.run`."""
        values = self._session.run(self._output_names, dict(inputs))
        return dict(zip(self._output_names, values, strict=True))

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.bind`; arrays must be C-contiguous."""
        binding = self._session.io_binding()
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
                    raise ValueError(f"{name}: only contiguous memory of the host can be bound")
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        # the pointers do not own the memory, so the arrays travel along
        return partial(_run_bound, self._session, binding, (dict(inputs), dict(outputs)))


def _run_bound(session: onnxruntime.InferenceSession, binding: Any, keep_alive: object) -> None:
    session.run_with_iobinding(binding)


class OrtEngine:
    """The graphs of a bundle as ONNX Runtime sessions; weights are memory-mapped from the bundle's files.

    Weights that ONNX Runtime rearranges for its kernels become memory of the process, unless ``packed_cache`` keeps
    them in a file too.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        graphs: Collection[str] | None = None,
        packed_cache: bool = False,
    ) -> None:
        """Load and check the graphs.

        Args:
            bundle: an opened bundle.
            threads: threads inside one operator; ``None`` takes one per physical core.
            graphs: load only these; ``None`` loads all of the bundle.
            packed_cache: map rearranged weights from a file, see :mod:`deepstitch.runtime.engine.packed`.

        Raises:
            InputError: ``threads`` below 1.
            BundleError: the bundle is for another runtime, ONNX Runtime refuses a graph, or it differs from the
                manifest.
        """
        _refuse_other_targets(bundle)
        if threads is not None and threads < 1:
            raise InputError(f"threads={threads}: use 1 or more, or leave it out for one per core")
        self.bundle = bundle
        names = list(bundle.manifest.graphs if graphs is None else graphs)
        load = partial(_load, bundle, threads=threads, packed_cache=packed_cache)
        with ThreadPoolExecutor(max(1, len(names))) as pool:  # one graph is packed by one thread, without Python's lock
            self._graphs = {name: OrtGraph(session) for name, session in zip(names, pool.map(load, names), strict=True)}

    def graph(self, name: str) -> GraphRunner:
        """One graph by its name."""
        return self._graphs[name]

    @property
    def decoder(self) -> GraphRunner:
        """The decoder graph."""
        return self._graphs[DECODER]

    @property
    def memory(self) -> Memory:
        """That of the host."""
        return HOST

    @property
    def limits(self) -> EngineLimits:
        """Those of the model."""
        return EngineLimits()

    def vision(self, batch: VisionBatch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Encode images and videos in one call.

        Returns:
            ``image_embeds (T, H)`` and ``deepstack_embeds (T, num_deepstack*H)``, float32.

        Raises:
            InputError: the model is text-only.
        """
        if VISION_ENCODER not in self._graphs:
            raise InputError(f"{self.bundle.folder}: this model takes text only; leave out images and videos")
        outputs = self._graphs[VISION_ENCODER].run(batch.graph_inputs())
        return outputs["image_embeds"], outputs["deepstack_embeds"]


def _refuse_other_targets(bundle: Bundle) -> None:
    """Graphs with TensorRT plugins are whole graphs, but not for this engine."""
    target = bundle.manifest.target
    if target not in ORT_TARGETS:
        engine = "tensorrt after 'deepstitch build'" if target.startswith("trt") else target
        raise BundleError(
            f"{bundle.folder}: exported with --target {target}, which ONNX Runtime on the CPU does not run; run it in "
            f"one process with engine {engine}, or export the checkpoint with --target ort-cpu"
        )


def _load(bundle: Bundle, name: str, *, threads: int | None, packed_cache: bool) -> onnxruntime.InferenceSession:
    path = bundle.graph_path(name)
    options = partial(_session_options, name, threads)
    try:
        if packed_cache:
            path = packed_graph(bundle, name, options)
        session = onnxruntime.InferenceSession(str(path), options(), providers=_PROVIDERS)
    except BundleError:
        raise
    except Exception as error:  # ONNX Runtime raises bare subclasses of Exception
        raise BundleError(load_failure(name, str(path), error)) from None
    bundle.check_graph(name, tensor_specs(session.get_inputs()), tensor_specs(session.get_outputs()))
    return session


def _session_options(name: str, threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY  # failures come as exceptions; the log would say them twice
    if threads is not None:
        options.intra_op_num_threads = threads
    if name == VISION_ENCODER:
        # each session has its own threads: those of the encoder must not spin while the decoder works
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def load_failure(name: str, path: str, error: Exception) -> str:
    """Why a graph was refused, and what to do."""
    reason = " ".join(str(error).split())
    remedy = "export the checkpoint again"
    if "IR version" in reason or "opset" in reason.lower():
        remedy = f"install a newer onnxruntime than {onnxruntime.__version__}, or {remedy}"
    if len(reason) > _REASON_LENGTH:  # what went wrong stands at the end, after C++ signatures
        reason = "…" + reason[-_REASON_LENGTH:]
    return f"{path}: onnxruntime cannot load graph '{name}': {reason}; {remedy}"


def tensor_specs(values: Any) -> list[TensorSpec]:
    """Inputs or outputs of a session as the manifest declares them."""
    specs = []
    for value in values:
        shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
        specs.append(TensorSpec(name=value.name, dtype=_DTYPES.get(value.type, value.type), shape=shape))
    return specs
