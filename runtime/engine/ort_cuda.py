"""ONNX Runtime's CUDA kernels: all of a graph on one card, on one stream, with the KV cache in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from deepstitch.errors import BundleError, InputError
from deepstitch.runtime.bundle import DECODER, VISION_ENCODER, Bundle
from deepstitch.runtime.engine import Array, BoundRun, EngineLimits, GraphRunner, Tensor
from deepstitch.runtime.engine.cuda import Cuda
from deepstitch.runtime.engine.device_memory import DeviceMemory
from deepstitch.runtime.engine.memory import DeviceArray, Memory
from deepstitch.runtime.engine.ort_cuda_session import open_session, run_failure

if TYPE_CHECKING:
    from deepstitch.runtime.preprocess import VisionBatch

__all__ = ["ORT_CUDA_TARGETS", "OrtCudaEngine", "OrtCudaGraph"]

ORT_CUDA_TARGETS = ("ort-cuda",)
"""Export targets whose every node has a CUDA kernel."""

# Attention over a cache of fp32 holds the scores of a whole call: new tokens times capacity, for every head.
_CHUNK = 512


class OrtCudaGraph:
    """One inference session on a card."""

    def __init__(self, session: onnxruntime.InferenceSession, memory: DeviceMemory) -> None:
        self._session = session
        self._memory = memory
        self._names = [output.name for output in session.get_outputs()]
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4  # failures come as exceptions
        # all work is on our stream, which is waited for where something is read
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.run`; ONNX Runtime moves the arrays."""
        self._memory.cuda.make_current()
        try:
            values = self._session.run(self._names, dict(inputs))
        except Exception as error:  # ONNX Runtime raises bare subclasses of Exception
            raise run_failure(error, self._memory.cuda) from None
        return dict(zip(self._names, values, strict=True))

    def bind(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> BoundRun:
        """See :meth:`deepstitch.runtime.engine.GraphRunner.bind`; arrays must be C-contiguous."""
        binding = self._session.io_binding()
        uploads: list[tuple[DeviceArray, Array]] = []
        downloads: list[tuple[DeviceArray, Array]] = []
        for name, tensor in inputs.items():
            self._place(binding.bind_input, name, self._on_card(name, tensor, uploads))
        for name, tensor in outputs.items():
            self._place(binding.bind_output, name, self._on_card(name, tensor, downloads))
        # addresses do not own memory, so the arrays travel along
        return partial(self._run_bound, binding, uploads, downloads, (dict(inputs), dict(outputs)))

    def _place(self, bind: Any, name: str, array: DeviceArray) -> None:
        bind(name, "cuda", self._memory.cuda.card.ordinal, array.dtype.type, array.shape, array.pointer)

    def _on_card(self, name: str, tensor: Tensor, moved: list[tuple[DeviceArray, Array]]) -> DeviceArray:
        """The tensor itself, or its place on the card, which it is moved to or from in every run."""
        if isinstance(tensor, DeviceArray):
            return tensor
        if not tensor.flags.c_contiguous:
            raise ValueError(f"{name}: only contiguous memory can be moved")
        place = self._memory.empty(tensor.shape, tensor.dtype)
        moved.append((place, tensor))
        return place

    def _run_bound(
        self,
        binding: Any,
        uploads: list[tuple[DeviceArray, Array]],
        downloads: list[tuple[DeviceArray, Array]],
        keep_alive: object,
    ) -> None:
        cuda = self._memory.cuda
        cuda.make_current()
        for place, array in uploads:
            cuda.upload(place.pointer, array.ctypes.data, array.nbytes)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # as above
            raise run_failure(error, cuda) from None
        for place, array in downloads:
            cuda.download(array.ctypes.data, place.pointer, array.nbytes)
        if downloads:
            cuda.synchronize()


class OrtCudaEngine:
    """The graphs of a bundle as ONNX Runtime sessions on one card."""

    def __init__(self, bundle: Bundle, *, graphs: Collection[str] | None = None) -> None:
        """Load and check the graphs.

        Args:
            bundle: an opened bundle, exported with ``--target ort-cuda``.
            graphs: load only these; ``None`` loads all of the bundle.

        Raises:
            BundleError: the bundle is for another engine, or ONNX Runtime refuses a graph.
            DeviceError: there is no driver or card, this onnxruntime has no kernels for it, or its memory is too small.
            MissingDependency: cuda-bindings is not installed.
        """
        target = bundle.manifest.target
        if target not in ORT_CUDA_TARGETS:
            raise BundleError(
                f"{bundle.folder}: exported with --target {target}, of which some nodes have no CUDA kernel; export "
                "the checkpoint with --target ort-cuda"
            )
        self.bundle = bundle
        cuda = Cuda()
        self._memory = DeviceMemory(cuda)
        names = bundle.manifest.graphs if graphs is None else graphs
        self._graphs = {name: OrtCudaGraph(open_session(bundle, name, cuda), self._memory) for name in names}

    def graph(self, name: str) -> GraphRunner:
        """One graph by its name."""
        return self._graphs[name]

    @property
    def decoder(self) -> GraphRunner:
        """The decoder graph."""
        return self._graphs[DECODER]

    @property
    def memory(self) -> Memory:
        """That of the card."""
        return self._memory

    @property
    def limits(self) -> EngineLimits:
        """Those of the model; long prompts go in parts."""
        return EngineLimits(chunk=_CHUNK)

    def vision(self, batch: VisionBatch) -> tuple[Tensor, Tensor]:
        """Encode images and videos in one call; the outputs stay on the card.

        Returns:
            ``image_embeds (T, H)`` and ``deepstack_embeds (T, num_deepstack*H)``, float32.

        Raises:
            InputError: the model is text-only.
        """
        if VISION_ENCODER not in self._graphs:
            raise InputError(f"{self.bundle.folder}: this model takes text only; leave out images and videos")
        tokens = int(batch.tokens_per_item.sum())
        outputs = {
            spec.name: self._memory.empty((tokens, *map(int, spec.shape[1:])), spec.dtype)
            for spec in self.bundle.graph(VISION_ENCODER).outputs
        }
        inputs = {name: np.ascontiguousarray(array) for name, array in batch.graph_inputs().items()}
        self._graphs[VISION_ENCODER].bind(inputs, outputs)()
        return outputs["image_embeds"], outputs["deepstack_embeds"]
