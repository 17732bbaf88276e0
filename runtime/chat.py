"""A conversation: each turn computes only what the KV cache does not hold yet."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deepstitch.runtime.embedding import item_spans
from deepstitch.runtime.generate import Generation
from deepstitch.runtime.kvcache import CachedTokens, common_prefix
from deepstitch.runtime.preprocess import Prompt, load_image
from deepstitch.runtime.results import Result
from deepstitch.runtime.sampling import GenerationOptions
from deepstitch.runtime.stream import TextStream

if TYPE_CHECKING:
    from deepstitch.runtime.pipeline import Pipeline

__all__ = ["Chat"]

Message = dict[str, Any]


class Chat:
    """Turns of one conversation.

    Attributes:
        messages: the conversation so far, in chat format. A turn joins when its answer has ended.
    """

    def __init__(self, pipeline: Pipeline, *, system: str | None, options: Mapping[str, Any]) -> None:
        """Start empty; ``options`` are defaults for every turn."""
        GenerationOptions.from_keywords(options)
        self._pipeline = pipeline
        self._options = dict(options)
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._last: Generation | None = None
        self.messages: list[Message] = list(self._system)

    def send(self, text: str, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any) -> Result:
        """Say something and return the answer; arguments as in :meth:`Pipeline.generate`."""
        return self.stream(text, images=images, videos=videos, **options).result

    def stream(
        self, text: str, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any
    ) -> TextStream:
        """Say something and read the answer while it is written."""
        chosen = GenerationOptions.from_keywords(self._options | options)
        began = time.perf_counter()
        turn = _user_turn(text, images, videos)
        prompt = self._pipeline.prepare([*self.messages, turn])
        seconds = time.perf_counter() - began
        generation = self._continue(prompt, chosen)

        def finish(result: Result) -> Result:
            self.messages += [turn, {"role": "assistant", "content": result.text}]
            return self._pipeline.complete(result, preprocess_seconds=seconds)

        return TextStream(generation, finish)

    def clear(self) -> None:
        """Forget all turns but the system message."""
        self.messages = list(self._system)

    def _continue(self, prompt: Prompt, options: GenerationOptions) -> Generation:
        parts, last = self._pipeline.parts, self._last
        if last is None:
            generation = Generation(parts, [prompt], options)
        else:
            starts, ends = item_spans(prompt, parts.visual_ids)
            new = CachedTokens(
                input_ids=prompt.input_ids,
                position_ids=prompt.position_ids,
                item_starts=starts,
                item_keys=prompt.vision.content_keys if prompt.vision else (),
            )
            start = common_prefix(last.cached_tokens(), new, ends)
            generation = Generation(parts, [prompt], options, state=last.state, start=start)
        self._last = generation
        return generation


def _user_turn(text: str, images: Sequence[Any], videos: Sequence[Any]) -> Message:
    if not images and not videos:
        return {"role": "user", "content": text}
    # opened now: a file may be gone by the next turn
    pictures = [{"type": "image", "image": load_image(image, f"image {n}")} for n, image in enumerate(images, 1)]
    clips = [{"type": "video", "video": video} for video in videos]
    return {"role": "user", "content": [*pictures, *clips, {"type": "text", "text": text}]}
