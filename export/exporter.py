"""The export itself, in the order it happens."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
from tqdm.auto import tqdm

import deepstitch
from deepstitch.errors import CheckpointError, ConfigError, UnsupportedError, did_you_mean
from deepstitch.export import facts
from deepstitch.export.contract import DECODER, VISION_ENCODER, Contract, decoder_contract, vision_contract
from deepstitch.export.kv_functions import KV_CACHES
from deepstitch.export.lower import Target
from deepstitch.export.lower import target as find_target
from deepstitch.export.passes.quantize_kv_cache import QuantizeKVCache
from deepstitch.export.passes.quantize_weights import QuantizeWeights
from deepstitch.export.quantize.kv_scales import cache_scales
from deepstitch.export.quantize.recipe import INTEGER_BITS, Recipe
from deepstitch.export.quantize.report import write_reports
from deepstitch.export.quantize.work import MIXED, QuantizationConfig, QuantizationWork, quantization_work
from deepstitch.export.trace_cache import canonical_graph
from deepstitch.export.weights import PlannedTensor, WeightPlan
from deepstitch.export.writer import (
    REFERENCE_FOLDER,
    WEIGHTS_FILE,
    BackgroundHashes,
    atomic_folder,
    copy_files,
    link_checkpoint,
    refuse_existing,
    write_weights,
)
from deepstitch.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    EmbeddingTable,
    FileRecord,
    Graph,
    Manifest,
    TensorSpec,
    file_sha256,
)
from deepstitch.models.checkpoint import EXPERT_LAYOUTS, Checkpoint, WeightSource
from deepstitch.models.config import ModelConfig
from deepstitch.models.fingerprint import fingerprint
from deepstitch.runtime.verify import remember_files
from deepstitch.tensorfile import TensorEntry

__all__ = ["ExportConfig", "QuantizationConfig", "contracts", "export_checkpoint", "lowered_graphs", "weight_plan"]

FLOAT_WEIGHTS = ("fp32", "fp16")
WEIGHTS = (*FLOAT_WEIGHTS, *INTEGER_BITS, MIXED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What to make of a checkpoint.

    Attributes:
        checkpoint: folder with config.json and safetensors files.
        output: bundle folder to create.
        target: one of :data:`deepstitch.export.lower.TARGETS`.
        weights: what the decoder's matrices are stored as, one of :data:`WEIGHTS`.
        vision_weights: likewise for the vision encoder, any of those but ``mixed``; None: fp16 next to integers, else
            the same as ``weights``.
        kv_cache: what keys and values are stored as, one of :data:`deepstitch.export.kv_functions.KV_CACHES`; int8 and
            int4 need ``quantization.calibration``.
        quantization: how integers are chosen, where there are any.
        by_reference: keep the weights in the checkpoint's own files (hard links) instead of writing a copy.
        expert_layout: ``"hub"`` or ``"transformers"``, where the shapes of the experts cannot tell.
        overwrite: replace an existing bundle.
        progress: show progress bars on stderr.
    """

    checkpoint: Path
    output: Path
    target: str = "ort-cpu"
    weights: str = "fp32"
    vision_weights: str | None = None
    kv_cache: str = "fp32"
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    by_reference: bool = False
    expert_layout: str | None = None
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        _one_of("--weights", self.weights, WEIGHTS)
        if self.vision_weights is not None:
            _one_of("--vision-weights", self.vision_weights, (*FLOAT_WEIGHTS, *INTEGER_BITS))
        if self.by_reference and (self.weights != "fp32" or self.vision_weights is not None):
            raise ConfigError("--by-reference keeps the checkpoint's own dtype; leave --weights out")
        if self.expert_layout is not None:
            _one_of("--expert-layout", self.expert_layout, EXPERT_LAYOUTS)
        _one_of("--kv-cache", self.kv_cache, tuple(KV_CACHES))
        calibrated = KV_CACHES[self.kv_cache].largest is not None
        self.quantization.check(self.weights, self.vision, calibrated_cache=calibrated)

    @property
    def vision(self) -> str:
        """What the vision encoder's matrices are stored as."""
        return self.vision_weights or (self.weights if self.weights in FLOAT_WEIGHTS else "fp16")


def _one_of(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnsupportedError(f"{flag} {value}: must be one of {', '.join(known)}{did_you_mean(value, known)}")


def export_checkpoint(config: ExportConfig) -> Path:
    """Export a checkpoint; the bundle appears whole or not at all.

    Returns:
        The bundle folder.

    Raises:
        DeepstitchError: the checkpoint, a flag or the output folder is refused; nothing is written.
    """
    target = find_target(config.target)
    target.check(config)
    checkpoint = Checkpoint.open(config.checkpoint)
    sources = checkpoint.sources(expert_layout=config.expert_layout)
    if config.by_reference:
        _refuse_other_layouts(sources)
    kind = KV_CACHES[config.kv_cache]
    kind.check(checkpoint.config.text.head_dim)
    facts.eos_token_ids(checkpoint.folder)  # refuses a damaged generation_config.json before any work
    refuse_existing(config.output, overwrite=config.overwrite)
    work = quantization_work(config, checkpoint, sources)
    plan = weight_plan(config, checkpoint, sources, work)
    with _hashing(checkpoint.files if config.by_reference else (), config.progress) as hashes:
        scales = cache_scales(config, checkpoint, sources, work.calibration if work is not None else None)
        graphs = lowered_graphs(checkpoint, target, plan, QuantizeKVCache(kind, scales), config.progress)
        table, stored = plan.embedding(facts.embedding_name(checkpoint.config))
        if work is not None:
            work.run()
        with atomic_folder(config.output, overwrite=config.overwrite) as folder:
            places, files = _write_weights(plan, checkpoint, folder, hashes, config.progress)
            location = {Path(name).name: name for name in files}
            written = _write_graphs(graphs, plan, contracts(checkpoint.config, kind.name), places, location, folder)
            graph_files = (folder / graph.file for graph in written.values())
            reports = write_reports(work.search, folder) if work is not None and work.search is not None else []
            for path in (*copy_files(checkpoint.folder, folder), *graph_files, *reports):
                files[path.name] = FileRecord(sha256=file_sha256(path), size=path.stat().st_size)
            place = places[table.name]
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                deepstitch_version=deepstitch.__version__,
                target=target.name,
                weights="checkpoint" if config.by_reference else config.weights,
                vision_weights=None if checkpoint.config.vision is None else config.vision,
                quantization=work.facts() if work is not None else None,
                command=_command(config, work),
                versions=_versions(),
                model=facts.model_facts(
                    checkpoint,
                    batched_continuation=target.batched_continuation and kind.name not in target.unbatched_caches,
                    kv_cache_in_place=target.kv_cache_in_place,
                ),
                vision=facts.vision_facts(checkpoint.config),
                embedding=EmbeddingTable(
                    file=location[place.path.name], tensor=place.name, stored=str(stored.stored) if stored else None
                ),
                graphs=written,
                files=files,
                checkpoint=Path(os.path.relpath(checkpoint.folder.resolve(), config.output.resolve())).as_posix(),
                checkpoint_fingerprint=fingerprint(checkpoint.entries),
            )
            (folder / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    remember_files(config.output, manifest)
    if work is not None:
        work.store.remove()
    return config.output


def weight_plan(
    config: ExportConfig, checkpoint: Checkpoint, sources: Mapping[str, WeightSource], work: QuantizationWork | None
) -> WeightPlan:
    """An empty plan for the checkpoint's weights."""
    tied = checkpoint.config.text.tie_word_embeddings
    return WeightPlan(
        sources,
        weights=config.weights if config.weights in FLOAT_WEIGHTS else "fp32",
        vision_weights=config.vision if config.vision in FLOAT_WEIGHTS else "fp32",
        by_reference=config.by_reference,
        tied=facts.embedding_name(checkpoint.config) if tied else None,
        recipe=work.recipe if work is not None else Recipe({}),
        store=work.store if work is not None else None,
    )


@contextlib.contextmanager
def _hashing(shards: Sequence[Path], progress: bool) -> Iterator[BackgroundHashes]:
    """Hash the checkpoint's files, if there are any to be linked, while the graphs are traced."""
    total = sum(path.stat().st_size for path in shards)
    disable = None if progress and shards else True
    with (
        tqdm(total=total, desc="hash weights", unit="B", unit_scale=True, disable=disable) as bar,
        BackgroundHashes(shards, bar.update) as hashes,
    ):
        yield hashes


def _refuse_other_layouts(sources: Mapping[str, WeightSource]) -> None:
    for name, source in sources.items():
        if source.in_place is None:
            raise CheckpointError(
                f"--by-reference: '{name}' is stored in another layout than the graph reads (experts saved by "
                "transformers 5 or one by one); leave the flag out to write a copy"
            )


def lowered_graphs(
    checkpoint: Checkpoint, target: Target, plan: WeightPlan, cache: QuantizeKVCache, progress: bool
) -> dict[str, ir.Model]:
    """The graphs of a target, bound to the plan; their weights are names, shapes and dtypes."""
    names = [DECODER] if checkpoint.config.vision is None else [DECODER, VISION_ENCODER]
    graphs = {}
    for name in tqdm(names, desc="trace and lower", unit="graph", disable=None if progress else True):
        model = canonical_graph(name, checkpoint.config)
        for each in (QuantizeWeights(plan), cache, *target.passes(plan)):
            each(model)
        plan.bind(model)
        graphs[name] = model
    return graphs


def _write_weights(
    plan: WeightPlan, checkpoint: Checkpoint, folder: Path, hashes: BackgroundHashes, progress: bool
) -> tuple[dict[str, TensorEntry], dict[str, FileRecord]]:
    """Write or link the weights; return where each planned tensor lies, and the files' identities."""
    copied = [tensor for name, tensor in plan.tensors.items() if not plan.is_referenced(name)]
    total = sum(tensor.nbytes for tensor in copied)
    with tqdm(total=total, desc="write weights", unit="B", unit_scale=True, disable=None if progress else True) as bar:
        places, record = write_weights(copied, folder / WEIGHTS_FILE, bar.update)
    files = {WEIGHTS_FILE: record}
    if plan.by_reference:
        link_checkpoint(checkpoint.files, folder)
        files |= {f"{REFERENCE_FOLDER}/{path.name}": record for path, record in hashes.records().items()}
        for name, tensor in plan.tensors.items():
            if isinstance(tensor, PlannedTensor) and plan.is_referenced(name) and tensor.source.in_place is not None:
                places[name] = tensor.source.in_place
    return places, files


def contracts(config: ModelConfig, kv_cache: str) -> dict[str, Contract]:
    """Inputs and outputs of every graph."""
    found = {DECODER: decoder_contract(config, kv_cache)}
    if config.vision is not None:
        found[VISION_ENCODER] = vision_contract(config.vision)
    return found


def _write_graphs(
    graphs: Mapping[str, ir.Model],
    plan: WeightPlan,
    contracts: Mapping[str, Contract],
    places: Mapping[str, TensorEntry],
    location: Mapping[str, str],
    folder: Path,
) -> dict[str, Graph]:
    written = {}
    for name, model in graphs.items():
        plan.attach(model, places, location)
        written[name] = _write_graph(model, name, folder, *contracts[name], check=not plan.by_reference)
    return written


def _write_graph(
    model: ir.Model,
    name: str,
    folder: Path,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    check: bool,
) -> Graph:
    model.graph.name = name
    proto = ir.serde.serialize_model(model)
    proto.producer_version = deepstitch.__version__
    path = folder / f"{name}.onnx"
    onnx.save(proto, path)
    if check:  # onnx's checker refuses the hard links of a bundle by reference
        onnx.checker.check_model(path)
    nodes = sum(1 for _ in model.graph.all_nodes())
    return Graph(file=path.name, opset=model.graph.opset_imports[""], nodes=nodes, inputs=inputs, outputs=outputs)


def _versions() -> dict[str, str]:
    names = ("torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")
    return {name: importlib.metadata.version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:  # of onnxruntime's packages, there is one
        return False


def _command(config: ExportConfig, work: QuantizationWork | None) -> str:
    """The equivalent command line; folders by name only, because a bundle travels."""
    words = [
        "deepstitch",
        "export",
        config.checkpoint.name,
        "--target",
        config.target,
        "-o",
        config.output.name,
    ]
    words += ["--weights", config.weights] if not config.by_reference else ["--by-reference"]
    words += ["--vision-weights", config.vision_weights] if config.vision_weights else []
    if work is not None:
        words += config.quantization.words(work.method)
    elif config.quantization.calibration is not None:
        words += ["--calibration", config.quantization.calibration.name]
    words += ["--kv-cache", config.kv_cache] if config.kv_cache != "fp32" else []
    words += ["--expert-layout", config.expert_layout] if config.expert_layout else []
    return shlex.join(words)
