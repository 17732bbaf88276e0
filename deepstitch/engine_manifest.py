"""engine.json: what TensorRT engines were built from, with and for; they are opened only where all of that is the same.

Engines lie in their bundle, ``engines/<tag>/``: this file, a plan for each graph, the plugin library they were built
with, and the timing cache.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from deepstitch.errors import BundleError, InputError
from deepstitch.records import parse_record

__all__ = [
    "ENGINES_FOLDER",
    "ENGINE_MANIFEST",
    "SCHEMA_VERSION",
    "EngineFacts",
    "EngineGraph",
    "EngineManifest",
    "EngineProfile",
    "Limits",
    "PluginRecord",
    "built_engines",
    "engine_folder",
]

SCHEMA_VERSION = 1
ENGINES_FOLDER = "engines"
ENGINE_MANIFEST = "engine.json"
_AGAIN = "the file was edited or damaged; build the engines again"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest inputs the engines are built for; each is a flag of ``deepstitch build``.

    Attributes:
        images: pictures of one call of the vision encoder.
        image_patches: patches of one picture, before merging.
        max_context: tokens a row of the KV cache holds.
        batch: rows of the decoder.
        prefill_chunk: new tokens of a row in one call.
        logits: of how many of them one call gives logits; a prompt needs one, drafted tokens and comparisons more.
    """

    images: int = 1
    image_patches: int = 4096
    max_context: int = 4096
    batch: int = 1
    prefill_chunk: int = 512
    logits: int = 1

    @property
    def patches(self) -> int:
        """Of one call of the vision encoder."""
        return self.images * self.image_patches

    def check(self, *, merge_size: int | None, context: int) -> None:
        """Refuse what the model cannot have.

        Args:
            merge_size: patches on a side that become one token; None for a model without vision.
            context: tokens the model allows.

        Raises:
            InputError: too long a context, or patches that cannot be merged.
        """
        if self.max_context > context:
            raise InputError(f"--max-context {self.max_context} is more than the {context} tokens the model allows")
        if self.prefill_chunk > self.max_context:
            raise InputError(
                f"--prefill-chunk {self.prefill_chunk} is more than --max-context {self.max_context}; a chunk must fit "
                "into the cache"
            )
        if self.logits > self.prefill_chunk:
            raise InputError(f"--logits {self.logits} is more than the tokens of --prefill-chunk {self.prefill_chunk}")
        if merge_size is not None and self.image_patches % merge_size**2:
            raise InputError(
                f"--image-patches {self.image_patches}: {merge_size**2} patches become one token; give a multiple"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """Sizes one optimization profile works between.

    Attributes:
        name: ``vision``, ``prefill`` or ``decode``.
        shapes: smallest, usual and largest by the name of the input; every input is there.
    """

    name: str
    shapes: dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGraph:
    """One plan. ``profiles`` are in the order of their numbers in TensorRT."""

    file: str
    size: int
    sha256: str
    profiles: tuple[EngineProfile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginRecord:
    """The plugin library the engines were built with, copied beside them.

    Attributes:
        version: of the operators; all have the same.
        targets: what it has code for, as ``sm_61`` and ``compute_61``.
    """

    file: str
    version: str
    sha256: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What is there where engines are to be opened; None: not known, hence not compared.

    Attributes:
        target: the bundle's.
        tensorrt: version of the Python package.
        sm: compute capability of the card, without the dot.
        card: its name.
        bundle_sha256: of the bundle's manifest.json.
    """

    target: str | None = None
    tensorrt: str | None = None
    sm: int | None = None
    card: str | None = None
    bundle_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineManifest:
    """All engines of one bundle for one kind of card and one TensorRT.

    Attributes:
        target: export target of the bundle, ``trt8`` or ``trt10``.
        tensorrt: version of the Python package that built them.
        sm: compute capability of the card, without the dot.
        card: its name.
        created_by: the command line.
        deepstitch: the version that built them.
        bundle_sha256: of the bundle's manifest.json.
        plugins: None where no graph has a plugin.
        limits: largest inputs.
        graphs: by the name of the graph.
    """

    schema_version: int = SCHEMA_VERSION
    target: str
    tensorrt: str
    sm: int
    card: str
    created_by: str
    deepstitch: str
    bundle_sha256: str
    plugins: PluginRecord | None
    limits: Limits
    graphs: dict[str, EngineGraph]

    @property
    def tag(self) -> str:
        """Name of the folder."""
        return _tag(self.sm, self.tensorrt)

    @classmethod
    def read(cls, path: Path) -> EngineManifest:
        """Read an ``engine.json``.

        Raises:
            BundleError: there is none, it is of another deepstitch, or it is not intact.
        """
        try:
            raw = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; build engines with 'deepstitch build'") from None
        except ValueError as error:  # JSON or UTF-8
            raise BundleError(f"{path}: not valid JSON ({error}); {_AGAIN}") from None
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path}: schema_version is {version!r}, this deepstitch reads {SCHEMA_VERSION}; build the engines "
                "again"
            )
        found: EngineManifest = parse_record(cls, raw, str(path), _AGAIN)
        return found

    def write(self, path: Path) -> None:
        """Write an ``engine.json``; the inverse of :meth:`read`."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", "utf-8")

    def differences(self, here: EngineFacts) -> list[str]:
        """Why the engines cannot be opened here; empty where they can."""
        said = []
        if here.target not in (None, self.target):
            said.append(f"they are of target {self.target}, the bundle is of {here.target}")
        if here.tensorrt not in (None, self.tensorrt):
            said.append(f"they were built with TensorRT {self.tensorrt}, here is {here.tensorrt}")
        if here.sm not in (None, self.sm):
            card = f" ({here.card})" if here.card else ""
            said.append(f"they were built for sm_{self.sm} ({self.card}), the card here has sm_{here.sm}{card}")
        if here.bundle_sha256 not in (None, self.bundle_sha256):
            said.append("the bundle's manifest.json is not the one they were built from")
        return said


def _tag(sm: int, tensorrt: str) -> str:
    return f"sm{sm}-tensorrt{tensorrt}"


def engine_folder(bundle: Path, sm: int, tensorrt: str) -> Path:
    """Where the engines of a bundle for this card and this TensorRT lie."""
    return bundle / ENGINES_FOLDER / _tag(sm, tensorrt)


def built_engines(bundle: Path) -> list[Path]:
    """Folders of all engines of a bundle; ones that are being built are left out."""
    return sorted(path.parent for path in (bundle / ENGINES_FOLDER).glob(f"[!.]*/{ENGINE_MANIFEST}"))
