"""The whole path for users: ``deepstitch.load(folder).generate("…", images=["a.png"])``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deepstitch.errors import InputError
from deepstitch.manifest import Manifest
from deepstitch.memory_estimate import KEPT_PICTURES
from deepstitch.runtime.bundle import Bundle
from deepstitch.runtime.chat import Chat
from deepstitch.runtime.embedding import EmbeddingTable
from deepstitch.runtime.encoder_cache import EncoderCache
from deepstitch.runtime.engine import Engine, open_engine
from deepstitch.runtime.generate import Generation
from deepstitch.runtime.parts import ModelParts
from deepstitch.runtime.preprocess import Processor, Prompt
from deepstitch.runtime.results import Result
from deepstitch.runtime.sampling import GenerationOptions
from deepstitch.runtime.stream import TextStream

__all__ = ["Messages", "Pipeline"]

Messages = str | Sequence[Mapping[str, Any]]


class Pipeline:
    """A loaded bundle. Not safe for use from several threads at once.

    Attributes:
        parts: engine, embedding table, encoder cache and processor.
    """

    def __init__(self, parts: ModelParts, *, load_seconds: float = 0.0) -> None:
        self.parts = parts
        self._load_seconds = load_seconds

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        engine: str | None = None,
        threads: int | None = None,
        verify: str | None = None,
        progress: bool = True,
        encoder_cache_bytes: int | None = None,
        packed_cache: bool = False,
    ) -> Pipeline:
        """Open, check and load a bundle.

        Args:
            bundle: its folder.
            engine: what runs the graphs: ``ort`` (ONNX Runtime on the CPU), ``ort-cuda`` or ``tensorrt``; None: the one
                for the bundle's target.
            threads: threads inside one operator; ``None`` takes one per physical core.
            verify: how files are checked: ``auto``, ``full`` or ``size``
                (see :func:`deepstitch.runtime.verify.verify_level`).
            progress: show a bar while large files are hashed, if stderr is a terminal.
            encoder_cache_bytes: memory for outputs of the vision encoder, where these lie; 0 keeps none. None: 256 MiB,
                or what the engine can spare of its card if that is less.
            packed_cache: map weights in the layout the kernels read from a file in the cache folder, which the first
                load writes: half the memory of the process, for disk of about 2.3 times the bundle.

        Raises:
            BundleError: the folder is not an intact bundle this version can run.
            InputError: an argument is out of range.
            DeviceError: an engine for a card finds no driver, card or memory.
        """
        began = time.perf_counter()
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, verify=verify, progress=progress)
        manifest = bundle.manifest
        processor = Processor.from_folder(bundle.folder, manifest.model, manifest.vision)
        table = EmbeddingTable.open(bundle)
        loaded = open_engine(engine, bundle, threads=threads, packed_cache=packed_cache)
        if encoder_cache_bytes is None:
            encoder_cache_bytes = loaded.limits.cache_bytes or KEPT_PICTURES
        encoder = EncoderCache(loaded.vision, encoder_cache_bytes)
        parts = ModelParts(engine=loaded, table=table, encoder=encoder, processor=processor)
        return cls(parts, load_seconds=time.perf_counter() - began)

    @property
    def engine(self) -> Engine:
        """What runs the graphs."""
        return self.parts.engine

    @property
    def manifest(self) -> Manifest:
        """Facts about the model."""
        return self.parts.engine.bundle.manifest

    def generate(
        self, messages: Messages, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any
    ) -> Result:
        """Answer one prompt.

        Args:
            messages: the user's text, or a conversation in chat format.
            images: paths, bytes, PIL images or arrays, in the order of their placeholders.
            videos: likewise.
            **options: fields of :class:`deepstitch.runtime.sampling.GenerationOptions`.

        Raises:
            InputError: the prompt, an image or an option cannot be used.
        """
        return self.stream(messages, images=images, videos=videos, **options).result

    def stream(
        self, messages: Messages, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any
    ) -> TextStream:
        """Like :meth:`generate`, but the text comes piece by piece; the stream's ``result`` has the rest."""
        chosen = GenerationOptions.from_keywords(options)
        began = time.perf_counter()
        prompt = self.prepare(messages, images=images, videos=videos)
        seconds = time.perf_counter() - began
        generation = Generation(self.parts, [prompt], chosen)
        return TextStream(generation, partial(self.complete, preprocess_seconds=seconds))

    def generate_batch(
        self,
        prompts: Sequence[Messages],
        *,
        images: Sequence[Sequence[Any]] | None = None,
        videos: Sequence[Sequence[Any]] | None = None,
        **options: Any,
    ) -> list[Result]:
        """Answer several prompts together; each answer equals that of a run of its own.

        Args:
            prompts: texts or conversations.
            images: one sequence per prompt.
            videos: one sequence per prompt.
            **options: as in :meth:`generate`, for all rows.

        Raises:
            InputError: as in :meth:`generate`; or ``images`` and ``prompts`` differ in length.
        """
        chosen = GenerationOptions.from_keywords(options)
        if not prompts or isinstance(prompts, str):
            raise InputError("generate_batch needs a list of at least one prompt; for a single one call generate")
        pictures, clips = _per_row("images", images, len(prompts)), _per_row("videos", videos, len(prompts))
        began = time.perf_counter()
        rows = [
            self.prepare(prompt, images=row_images, videos=row_videos)
            for prompt, row_images, row_videos in zip(prompts, pictures, clips, strict=True)
        ]
        seconds = time.perf_counter() - began
        generation = Generation(self.parts, rows, chosen)
        for _ in generation:
            pass
        return [self.complete(generation.result(row), preprocess_seconds=seconds) for row in range(len(rows))]

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """Start a conversation whose turns reuse the KV cache.

        Args:
            system: the system message.
            **options: defaults for every turn, as in :meth:`generate`.
        """
        return Chat(self, system=system, options=options)

    def prepare(self, messages: Messages, *, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Prompt:
        """Token ids, positions and vision inputs of one prompt."""
        return self.parts.processor(messages, images=images, videos=videos)

    def complete(self, result: Result, *, preprocess_seconds: float) -> Result:
        """Fill in the seconds that passed before generation began."""
        timings = result.timings | {"load": self._load_seconds, "preprocess": preprocess_seconds}
        return replace(result, timings=timings)


def _per_row(name: str, given: Sequence[Sequence[Any]] | None, rows: int) -> Sequence[Sequence[Any]]:
    if given is None:
        return [()] * rows
    if len(given) != rows:
        raise InputError(
            f"{name} holds {len(given)} lists for {rows} prompts; pass one list per prompt, empty ones too"
        )
    return given
