"""What a checkpoint or bundle holds, in numbers: parameters, bytes per module, KV cache, estimated memory.

Reads config.json, manifest.json and safetensors headers; no tensor is loaded and torch is not needed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deepstitch.blockwise import WeightFormat
from deepstitch.engine_manifest import ENGINE_MANIFEST, EngineFacts, EngineManifest, Limits, built_engines
from deepstitch.errors import BundleError, CheckpointError, InputError
from deepstitch.manifest import MANIFEST_NAME, Manifest, file_sha256
from deepstitch.memory_estimate import CACHE_BITS, WEIGHT_BYTES, DecoderShape, Memory, Workload, estimate_memory
from deepstitch.tensorfile import TensorEntry, TensorFile

if TYPE_CHECKING:
    from deepstitch.models.config import ModelConfig

__all__ = ["EngineStatus", "FileStatus", "Inspection", "ModuleSize", "cache_dtype_of", "decoder_shape", "inspect"]

# First match wins. The names are those of the checkpoints; the export keeps them for its initializers.
_MODULES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (module, re.compile(pattern))
    for module, pattern in (
        ("vision embeddings", r"visual\.(patch_embed|pos_embed)\."),
        ("vision blocks", r"visual\.blocks\."),
        ("DeepStack mergers", r"visual\.deepstack_merger_list\."),
        ("vision merger", r"visual\.merger\."),
        ("token embedding", r"embed_tokens\."),
        ("attention", r"\.self_attn\."),
        ("routers", r"\.mlp\.gate\."),
        ("experts", r"\.mlp\.experts\."),
        ("dense MLPs", r"\.mlp\."),
        ("norms", r"norm"),
        ("lm_head", r"lm_head"),
    )
)
_OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSize:
    """One kind of module, all layers together.

    Attributes:
        bytes_by_dtype: bytes on disk by safetensors dtype name.
    """

    name: str
    tensors: int
    parameters: int
    bytes_by_dtype: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(self.bytes_by_dtype.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """One file. ``status`` is ``ok``, ``not listed`` (no sha256 to compare with), or what is wrong."""

    name: str
    size: int
    sha256: str | None
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """TensorRT engines of a bundle. ``status`` is ``ok``, or what is wrong; of a damaged record that is all."""

    name: str
    status: str
    card: str = ""
    limits: Limits | None = None
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything ``deepstitch inspect`` shows.

    Attributes:
        kind: ``checkpoint`` or ``bundle``.
        architecture: labelled facts, in the order they are shown.
        active_parameters: parameters that take part in one token: all but the experts it is not routed to.
        memory: for a checkpoint one row per weight dtype it can be exported with; for a bundle its own.
        graphs: for a bundle, the contract as in the manifest.
        engines: that were built of it.
    """

    kind: str
    path: str
    architecture: Mapping[str, Any]
    parameters: int
    active_parameters: int
    modules: tuple[ModuleSize, ...]
    files: tuple[FileStatus, ...]
    kv_cache_dtype: str
    kv_bytes_per_token: int
    workload: Workload
    memory: tuple[Memory, ...]
    graphs: Mapping[str, Any]
    engines: tuple[EngineStatus, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether every file is what the manifest says."""
        return all(file.status in ("ok", "not listed") for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict with the derived sums included."""
        raw = dataclasses.asdict(self)
        for row, module in zip(raw["modules"], self.modules, strict=True):
            row["bytes"] = module.num_bytes
        for row, memory in zip(raw["memory"], self.memory, strict=True):
            row["total_bytes"] = memory.total_bytes
        return raw | {"intact": self.intact}


def inspect(
    path: str | Path, *, context: int | None = None, batch: int = 1, prefill_chunk: int | None = None
) -> Inspection:
    """Describe a checkpoint or bundle folder.

    Args:
        path: the folder; one with manifest.json is a bundle.
        context: tokens per row for the memory estimate; None takes 4096 or what the model allows, if less.
        batch: rows for the memory estimate.
        prefill_chunk: prompt tokens per decoder call for the memory estimate; None takes the context at once.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        BundleError: the manifest is damaged. Files that differ from it are reported in the result instead.
        ConfigError: config.json cannot be used.
        UnsupportedError: the model is not supported.
        InputError: ``context`` is more than the model allows.
    """
    folder = Path(path)
    request = {"context": context, "batch": batch, "prefill_chunk": prefill_chunk}
    if (folder / MANIFEST_NAME).is_file():
        return _inspect_bundle(folder, request)
    return _inspect_checkpoint(folder, request)


def _workload(request: Mapping[str, int | None], limit: int) -> Workload:
    values = {key: value for key, value in request.items() if value is not None}
    if values.get("context", 0) > limit:
        raise InputError(f"--context {values['context']} is more than the {limit} tokens the model allows")
    return Workload(**{"context": min(4096, limit), **values})


def _inspect_checkpoint(folder: Path, request: Mapping[str, int | None]) -> Inspection:
    from deepstitch.export.facts import active_parameters
    from deepstitch.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    shape = decoder_shape(config)
    entries = dict(checkpoint.entries)
    if config.text.tie_word_embeddings:
        entries.pop("lm_head.weight", None)  # some savers write the tied matrix twice
    modules = _module_sizes(entries.values())
    total = sum(module.parameters for module in modules)
    workload = _workload(request, config.text.max_position_embeddings)
    return Inspection(
        kind="checkpoint",
        path=str(folder),
        architecture=_architecture(config),
        parameters=total,
        active_parameters=active_parameters(config.text, total),
        modules=modules,
        files=tuple(
            FileStatus(name=file.name, size=file.stat().st_size, sha256=None, status="not listed")
            for file in checkpoint.files
        ),
        kv_cache_dtype="float32",
        kv_bytes_per_token=shape.kv_bytes_per_token("float32"),
        workload=workload,
        memory=tuple(
            estimate_memory(shape, workload, weights, int(total * width), "float32")
            for weights, width in WEIGHT_BYTES.items()
        ),
        graphs={},
    )


def _inspect_bundle(folder: Path, request: Mapping[str, int | None]) -> Inspection:
    from deepstitch.models.config import ModelConfig

    manifest = Manifest.read(folder)
    files = tuple(_file_status(folder, manifest, name) for name in manifest.files)
    config = ModelConfig.from_file(folder)
    formats = manifest.quantization.formats if manifest.quantization is not None else {}
    modules = _module_sizes(_stored_tensors(folder, files), formats)
    shape = dataclasses.replace(decoder_shape(config), stores_scores=manifest.target == "portable")
    workload = _workload(request, manifest.model.max_position_embeddings)
    cache_dtype = cache_dtype_of(manifest)
    weight_bytes = sum(module.num_bytes for module in modules)
    origin = {
        "target": manifest.target,
        "weights": manifest.weights,
        **_integer_facts(manifest),
        "deepstitch": manifest.deepstitch_version,
    }
    return Inspection(
        kind="bundle",
        path=str(folder),
        architecture={**_architecture(config), **origin, "produced by": manifest.command},
        parameters=manifest.model.num_parameters,
        active_parameters=manifest.model.num_active_parameters,
        modules=modules,
        files=files,
        kv_cache_dtype=cache_dtype,
        kv_bytes_per_token=shape.kv_bytes_per_token(cache_dtype),
        workload=workload,
        memory=(estimate_memory(shape, workload, manifest.weights, weight_bytes, cache_dtype),),
        graphs={name: dataclasses.asdict(graph) for name, graph in manifest.graphs.items()},
        engines=tuple(_engine_status(folder, engines) for engines in built_engines(folder)),
    )


def _architecture(config: ModelConfig) -> dict[str, Any]:
    text, vision = config.text, config.vision
    facts: dict[str, Any] = {
        "model type": config.model_type,
        "decoder layers": text.num_hidden_layers,
        "hidden size": text.hidden_size,
        "attention heads": text.num_attention_heads,
        "key/value heads": text.num_key_value_heads,
        "head dim": text.head_dim,
        "vocabulary": text.vocab_size,
        "context length": text.max_position_embeddings,
        "tied embeddings": text.tie_word_embeddings,
    }
    if text.num_experts:
        facts |= {
            "MoE layers": _moe_layers(config),
            "experts": text.num_experts,
            "experts per token": text.num_experts_per_tok,
            "expert width": text.moe_intermediate_size,
        }
    else:
        facts["MLP width"] = text.intermediate_size
    if vision is not None:
        facts |= {
            "vision blocks": vision.depth,
            "vision hidden size": vision.hidden_size,
            "patch size": vision.patch_size,
            "merge size": vision.spatial_merge_size,
            "DeepStack taps": list(vision.deepstack_visual_indexes),
        }
    return facts


def _moe_layers(config: ModelConfig) -> int:
    return sum(config.text.is_moe_layer(index) for index in range(config.text.num_hidden_layers))


def decoder_shape(config: ModelConfig) -> DecoderShape:
    """The sizes that memory depends on; for the kernels that go through the scores in blocks."""
    text = config.text
    widths = [
        text.num_experts_per_tok * text.moe_intermediate_size if text.is_moe_layer(index) else text.intermediate_size
        for index in range(text.num_hidden_layers)
    ]
    return DecoderShape(
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        mlp_width=max(widths, default=0),
    )


def _integer_facts(manifest: Manifest) -> dict[str, Any]:
    found = manifest.quantization
    if found is None:
        return {}
    return {
        "vision weights": manifest.vision_weights,
        "bits per integer": found.bits_per_weight,
        "rounding": found.method,
        "calibration tokens": found.calibration_tokens,
    }


def _module_sizes(
    entries: Iterable[TensorEntry], formats: Mapping[str, str] = MappingProxyType({})
) -> tuple[ModuleSize, ...]:
    grouped: dict[str, list[TensorEntry]] = {name: [] for name in (*(name for name, _ in _MODULES), _OTHER)}
    for entry in entries:
        grouped[_module_of(entry.name)].append(entry)
    return tuple(_module_size(name, group, formats) for name, group in grouped.items() if group)


def _module_of(tensor: str) -> str:
    return next((module for module, pattern in _MODULES if pattern.search(tensor)), _OTHER)


def _module_size(name: str, entries: list[TensorEntry], formats: Mapping[str, str]) -> ModuleSize:
    by_dtype: dict[str, int] = {}
    parameters = 0
    for entry in entries:
        owner = entry.name.removesuffix(".scales").removesuffix(".zero_points")
        if owner not in formats:
            kind, count = entry.dtype, math.prod(entry.shape)
        else:  # scales and zero points are part of how the integers are stored
            kind = formats[owner]
            count = 8 * entry.nbytes // WeightFormat.parse(kind).bits if entry.name == owner else 0
        by_dtype[kind] = by_dtype.get(kind, 0) + entry.nbytes
        parameters += count
    return ModuleSize(name=name, tensors=len(entries), parameters=parameters, bytes_by_dtype=by_dtype)


def _file_status(folder: Path, manifest: Manifest, name: str) -> FileStatus:
    from deepstitch.runtime.verify import verify_files, verify_level

    record = manifest.files[name]
    try:
        verify_files(folder, dataclasses.replace(manifest, files={name: record}), verify_level(None), progress=True)
        status = "ok"
    except BundleError as error:
        status = str(error)
    return FileStatus(name=name, size=record.size, sha256=record.sha256, status=status)


def _engine_status(bundle: Path, folder: Path) -> EngineStatus:
    try:
        manifest = EngineManifest.read(folder / ENGINE_MANIFEST)
    except BundleError as error:
        return EngineStatus(name=folder.name, status=str(error))
    here = EngineFacts(target=Manifest.read(bundle).target, bundle_sha256=file_sha256(bundle / MANIFEST_NAME))
    wrong = manifest.differences(here)
    for graph in manifest.graphs.values():
        path = folder / graph.file
        if not path.is_file() or path.stat().st_size != graph.size:
            wrong.append(f"{graph.file} is missing, or not as long as it was")
    return EngineStatus(
        name=folder.name,
        status="; ".join(wrong) or "ok",
        card=manifest.card,
        limits=manifest.limits,
        size=sum(graph.size for graph in manifest.graphs.values()),
    )


def _stored_tensors(folder: Path, files: Iterable[FileStatus]) -> list[TensorEntry]:
    """Tensors of the bundle's safetensors files; a damaged file is already reported by its status."""
    entries: list[TensorEntry] = []
    for file in files:
        if file.name.endswith(".safetensors"):
            try:
                entries.extend(TensorFile.open(folder / file.name).values())
            except CheckpointError:
                continue
    return entries


def cache_dtype_of(manifest: Manifest) -> str:
    """What the KV cache holds, a key of :data:`deepstitch.memory_estimate.CACHE_BITS`.

    Raises:
        BundleError: something else.
    """
    decoder = manifest.graphs.get("decoder")
    dtypes = {spec.dtype for spec in decoder.inputs if spec.name.startswith("past_key_values.")} if decoder else set()
    dtype = next(iter(dtypes), "float32")
    dtype = "int4" if dtype == "uint8" else dtype  # two values per byte
    if dtype not in CACHE_BITS:
        raise BundleError(f"{MANIFEST_NAME}: the KV cache is {dtype}, this deepstitch knows {', '.join(CACHE_BITS)}")
    return dtype
