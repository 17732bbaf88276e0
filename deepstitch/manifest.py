"""manifest.json: the only thing the runtime knows about a model, and the contract of its graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deepstitch.errors import BundleError
from deepstitch.records import parse_record

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "EmbeddingTable",
    "FileRecord",
    "Graph",
    "Manifest",
    "ModelFacts",
    "Quantization",
    "TensorSpec",
    "VisionFacts",
    "file_sha256",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_HASH_STEP = 4 << 20  # bytes
_EDITED = "the manifest was edited, export again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One graph input or output. ``shape`` holds numbers and axis names; ``dtype`` is a numpy dtype name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One ONNX file of the bundle."""

    file: str
    opset: int
    nodes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Identity of one file of the bundle."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingTable:
    """Where the token embedding lies: a tensor ``[vocab, H]`` inside a safetensors file of the bundle.

    Attributes:
        stored: ``int8/32``, ``int4/64+zp``, … (see :class:`deepstitch.blockwise.WeightFormat`): the tensor holds
            integers, with scales and zero points in ``<tensor>.scales`` and ``<tensor>.zero_points``; None: floats.
    """

    file: str
    tensor: str
    stored: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How integer weights came about.

    Attributes:
        method: ``rtn``, ``search`` or ``gptq``, as carried out: eight bits alone are never searched. With ``gptq``, the
            embedding table and the vision encoder, which no calibration prompt reaches, are by ``search``.
        calibration_tokens: tokens the method looked at; 0 without calibration.
        bits_per_weight: average over the integer weights, scales included.
        formats: by parameter name, e.g. ``int4/32``; see :class:`deepstitch.blockwise.WeightFormat`.
    """

    method: str
    calibration_tokens: int
    bits_per_weight: float
    formats: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What generation has to know about the decoder.

    Attributes:
        num_deepstack: DeepStack slices per visual row; 0 for a text-only model.
        eos_token_ids: from generation_config.json; generation stops at any of them.
        kv_cache_in_place: present tensors may be bound to the memory of the past tensors.
        batched_continuation: one call may add several tokens to several non-empty rows; where false, the
            runtime goes row by row.
        mrope_section: rotary pairs per axis (t, h, w).
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    num_deepstack: int
    num_parameters: int
    num_active_parameters: int
    kv_cache_in_place: bool
    batched_continuation: bool
    rope_theta: float
    mrope_section: tuple[int, int, int]
    eos_token_ids: tuple[int, ...]
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFacts:
    """What preprocessing has to know about the vision encoder.

    Attributes:
        num_grid_per_side: side of the square learned position table.
        head_dim: width of one attention head; rotary rows have half of it.
    """

    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_grid_per_side: int
    head_dim: int
    rope_theta: float
    out_hidden_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A whole bundle.

    Attributes:
        graphs: ``decoder`` and, with vision, ``vision_encoder``.
        files: every other file of the bundle by its path relative to the folder, with forward slashes.
        weights: what the decoder's matrices are stored as: fp32, fp16, int8, int4, mixed or checkpoint.
        vision_weights: likewise for the vision encoder.
        quantization: None where no weights are integers.
        command: the command line that produced the bundle.
        versions: packages that took part, by name.
        checkpoint: folder the bundle was exported from, relative to the bundle; ``compare`` looks there first.
        checkpoint_fingerprint: which weights those are; bundles of one checkpoint share it, however they store them.
    """

    format_version: int
    deepstitch_version: str
    target: str
    weights: str
    command: str
    versions: dict[str, str]
    model: ModelFacts
    vision: VisionFacts | None
    embedding: EmbeddingTable
    graphs: dict[str, Graph]
    files: dict[str, FileRecord] = field(default_factory=dict)
    checkpoint: str | None = None
    checkpoint_fingerprint: str | None = None
    vision_weights: str | None = None
    quantization: Quantization | None = None

    def to_json(self) -> str:
        """Serialise; the inverse of :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and type-check.

        Raises:
            BundleError: not JSON, another format version, or an unknown, missing or mistyped entry.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise BundleError(f"{where}: not valid JSON ({error}); export the bundle again") from None
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{where}: format_version is {version!r}, this deepstitch reads {FORMAT_VERSION}; export again"
            )
        manifest: Manifest = parse_record(cls, raw, where, _EDITED)
        return manifest

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read ``manifest.json`` of a bundle folder.

        Raises:
            BundleError: there is none, or it is not intact.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            return cls.from_json(path.read_text("utf-8"), str(path))
        except FileNotFoundError:
            hint = (
                "; it looks like a checkpoint: run 'deepstitch export' first"
                if (Path(folder) / "config.json").is_file()
                else ""
            )
            raise BundleError(f"{folder}: not a bundle (no {MANIFEST_NAME}){hint}") from None
        except (NotADirectoryError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: cannot be read ({error})") from None


def file_sha256(path: str | Path, progress: Callable[[int], object] | None = None, *, past_cache: bool = False) -> str:
    """Hash a file in 4 MiB steps.

    Args:
        path: the file.
        progress: called with the number of bytes just hashed.
        past_cache: read past the page cache where the file system can, so that hashing a file larger than memory
            neither evicts everything else nor pays for filling pages that nobody reads again.
    """
    digest = hashlib.sha256()
    # an anonymous mapping is page-aligned, which direct reads need
    with mmap.mmap(-1, _HASH_STEP) as buffer, _open_to_hash(path, past_cache) as file, memoryview(buffer) as view:
        while count := file.readinto(view):
            digest.update(view[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def _open_to_hash(path: str | Path, past_cache: bool) -> io.FileIO:
    if past_cache and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # not every file system can
            return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
    return io.FileIO(path)
