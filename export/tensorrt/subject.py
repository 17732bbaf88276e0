"""What is to be built: the lowered graphs without their weights, from a bundle or straight from a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from deepstitch.errors import BundleError, UnsupportedError
from deepstitch.export.contract import Contract
from deepstitch.inspection import cache_dtype_of, decoder_shape
from deepstitch.manifest import Manifest
from deepstitch.memory_estimate import DecoderShape
from deepstitch.models.config import ModelConfig

__all__ = ["Stored", "Subject"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How the weights and the cache of a checkpoint are to be stored; of a bundle that is decided.

    Attributes:
        weights: as ``deepstitch export --weights``.
        vision_weights: likewise; None: as the export chooses.
        kv_cache: ``fp32`` or ``fp16``; the others are calibrated, which needs the weights.
    """

    weights: str = "fp32"
    vision_weights: str | None = None
    kv_cache: str = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Graphs and what planning has to know about the model.

    Attributes:
        name: folder, for messages.
        graphs: by name; the weights are shapes and types.
        contracts: inputs and outputs by graph.
        shape: sizes of the decoder.
        cache_dtype: of the KV cache, a key of :data:`deepstitch.memory_estimate.CACHE_BITS`.
        context: tokens the model allows.
        merge_size: patches on a side that become one visual token; None without vision.
        weights: what the decoder's matrices are stored as.
        vision_weights: likewise.
    """

    name: str
    target: str
    graphs: Mapping[str, onnx.ModelProto]
    contracts: Mapping[str, Contract]
    shape: DecoderShape
    cache_dtype: str
    context: int
    merge_size: int | None
    weights: str
    vision_weights: str | None

    @classmethod
    def from_bundle(cls, folder: Path, target: str) -> Subject:
        """Read a bundle's manifest and graphs; sizes of its files are compared, contents are not.

        Raises:
            BundleError: it is not intact, or it was exported for another target.
        """
        from deepstitch.runtime.verify import verify_files

        manifest = Manifest.read(folder)
        if manifest.target != target:
            raise BundleError(
                f"{folder} was exported for {manifest.target}; run 'deepstitch export … --target {target}' and build "
                "that bundle"
            )
        verify_files(folder, manifest, "size", progress=False)
        return cls(
            name=str(folder),
            target=target,
            graphs={name: _load(folder / graph.file) for name, graph in manifest.graphs.items()},
            contracts={name: (graph.inputs, graph.outputs) for name, graph in manifest.graphs.items()},
            shape=decoder_shape(ModelConfig.from_file(folder)),
            cache_dtype=cache_dtype_of(manifest),
            context=manifest.model.max_position_embeddings,
            merge_size=manifest.vision.spatial_merge_size if manifest.vision is not None else None,
            weights=manifest.weights,
            vision_weights=manifest.vision_weights,
        )

    @classmethod
    def from_checkpoint(cls, folder: Path, target: str, stored: Stored) -> Subject:
        """Trace and lower a checkpoint as an export would, and leave its weights where they are.

        Raises:
            DeepstitchError: what an export would refuse, or a cache that has to be calibrated.
        """
        from deepstitch.export.exporter import ExportConfig, contracts, lowered_graphs, weight_plan
        from deepstitch.export.kv_functions import KV_CACHES
        from deepstitch.export.lower import target as find_target
        from deepstitch.export.passes.quantize_kv_cache import QuantizeKVCache
        from deepstitch.export.quantize.work import quantization_work
        from deepstitch.models.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(folder)
        with tempfile.TemporaryDirectory() as nowhere:
            config = ExportConfig(
                checkpoint=folder,
                output=Path(nowhere, "bundle"),
                target=target,
                weights=stored.weights,
                vision_weights=stored.vision_weights,
                kv_cache=_uncalibrated(stored.kv_cache),
                progress=False,
            )
            find_target(target).check(config)
            sources = checkpoint.sources()
            plan = weight_plan(config, checkpoint, sources, quantization_work(config, checkpoint, sources))
        cache = QuantizeKVCache(KV_CACHES[config.kv_cache])
        graphs = lowered_graphs(checkpoint, find_target(target), plan, cache, config.progress)
        model = checkpoint.config
        return cls(
            name=str(folder),
            target=target,
            graphs={name: _without_weights(graph, plan.tensors) for name, graph in graphs.items()},
            contracts=contracts(model, config.kv_cache),
            shape=decoder_shape(model),
            cache_dtype={"fp32": "float32", "fp16": "float16"}[config.kv_cache],
            context=model.text.max_position_embeddings,
            merge_size=model.vision.spatial_merge_size if model.vision is not None else None,
            weights=config.weights,
            vision_weights=config.vision if model.vision is not None else None,
        )


def _uncalibrated(kv_cache: str) -> str:
    if kv_cache not in ("fp32", "fp16"):
        raise UnsupportedError(
            f"--kv-cache {kv_cache}: its scales come from a calibration; export the bundle and check that, or plan "
            "with fp32 or fp16"
        )
    return kv_cache


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # of protobuf; their type depends on its implementation
        raise BundleError(f"{path}: not an ONNX graph ({error}); export the bundle again") from None


def _without_weights(model: ir.Model, planned: Mapping[str, object]) -> onnx.ModelProto:
    """The graph with weights that point to a file which nobody reads."""
    for name, value in model.graph.initializers.items():
        if name in planned:
            assert value.dtype is not None and value.shape is not None, "a planned weight has a type and a shape"
            value.const_value = ir.ExternalTensor("nowhere", 0, 0, value.dtype, shape=ir.Shape(value.shape), name=name)
    return ir.serde.serialize_model(model)
