"""Messages, pictures and clips in; token ids, positions and vision inputs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepstitch.errors import BundleError, InputError
from deepstitch.manifest import ModelFacts, VisionFacts
from deepstitch.runtime.preprocess.batch import Prompt
from deepstitch.runtime.preprocess.chat import ChatTemplate
from deepstitch.runtime.preprocess.images import ImageSource
from deepstitch.runtime.preprocess.items import ClipItem, ImageItem, KnownItem, VisualItem, pack
from deepstitch.runtime.preprocess.messages import Message, conversation, split_media
from deepstitch.runtime.preprocess.patches import PatchShape
from deepstitch.runtime.preprocess.positions import MRopeState
from deepstitch.runtime.preprocess.settings import ImageSettings, VideoSettings
from deepstitch.runtime.preprocess.tokenizer import DecodeStream, Tokenizer
from deepstitch.runtime.preprocess.video import VideoSource

__all__ = ["Processor"]

_KINDS = ("image", "video")


class Processor:
    """Everything that happens before the graphs, equal to Hugging Face's processor on the same pixels.

    Attributes:
        tokenizer: of the checkpoint.
        template: its chat template, None if it has none.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        model: ModelFacts,
        vision: VisionFacts | None = None,
        image_settings: ImageSettings | None = None,
        video_settings: VideoSettings | None = None,
        folder: str | Path = ".",
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._model, self._vision, self._folder = model, vision, Path(folder)
        self._image_settings, self._video_settings = image_settings, video_settings
        self._placeholders: dict[str, str] = {}
        if vision is None:
            return
        self._shape = PatchShape(
            size=vision.patch_size,
            temporal=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            channels=vision.in_channels,
        )
        self._placeholders = {kind: self._spelling(f"{kind}_token_id") for kind in _KINDS}
        self._start = self._spelling("vision_start_token_id")
        self._end = self._spelling("vision_end_token_id")

    @classmethod
    def from_folder(cls, folder: str | Path, model: ModelFacts, vision: VisionFacts | None = None) -> Processor:
        """Read the tokenizer, the chat template and the pixel settings of a bundle or checkpoint folder.

        Args:
            folder: holds tokenizer.json and, with vision, preprocessor_config.json.
            model: from the manifest.
            vision: from the manifest; None for a text-only model.

        Raises:
            BundleError: a file is missing or damaged, or contradicts the manifest.
        """
        path = Path(folder)
        return cls(
            tokenizer=Tokenizer.from_folder(path),
            template=ChatTemplate.from_folder(path),
            model=model,
            vision=vision,
            image_settings=ImageSettings.from_folder(path, vision) if vision else None,
            video_settings=VideoSettings.from_folder(path, vision) if vision else None,
            folder=path,
        )

    def __call__(
        self,
        messages: str | Sequence[Message],
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Prepare one conversation.

        Args:
            messages: chat format. A content part of type image or video may carry its own
                (``{"type": "image", "image": path}``), or it takes the next of ``images`` or ``videos``. A
                bare string is one user turn.
            images: paths, bytes, PIL images or arrays; or, for all of them, what is known from an earlier prompt.
            videos: see :mod:`deepstitch.runtime.preprocess.video`.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of functions, where the template knows them.
            template_options: further variables of the template.

        Raises:
            InputError: messages, images or clips cannot be used, or placeholders and images differ in number.
            BundleError: there is no chat template.
        """
        images, videos = _as_list(images, "images"), _as_list(videos, "videos")
        plain, images, videos = split_media(conversation(messages, images, videos), images, videos)
        if self.template is None:
            raise BundleError(
                f"{self._folder}: no chat template (chat_template.jinja, chat_template.json, or an entry in "
                "tokenizer_config.json); add the one of the checkpoint, or pass a finished prompt as text"
            )
        text = self.template.render(
            plain, add_generation_prompt=add_generation_prompt, tools=tools, options=template_options
        )
        return self.from_text(text, images=images, videos=videos)

    def from_text(self, text: str, *, images: Sequence[ImageSource] = (), videos: Sequence[VideoSource] = ()) -> Prompt:
        """Prepare a prompt that is already rendered, with one placeholder per image and clip.

        Args:
            text: the prompt.
            images: in the order of their placeholders.
            videos: in the order of their placeholders.

        Raises:
            InputError: as in :meth:`__call__`.
        """
        media = dict(zip(_KINDS, (_as_list(images, "images"), _as_list(videos, "videos")), strict=True))
        order = self._order(text, media)
        items: list[VisualItem] = [self._item(kind, index, media[kind][index]) for kind, index in order]
        ids = self.tokenizer.encode(self._with_timestamps(text, items))
        batch = pack(items, self._vision, self._shape) if items and self._vision else None
        ids = self._expand(ids, batch.grid_thw if batch else None)
        positions = MRopeState.for_model(self._model, self._vision)
        position_ids = positions.extend(ids, batch.grid_thw if batch else None)
        return Prompt(
            input_ids=ids,
            position_ids=position_ids,
            rope_delta=positions.rope_delta,
            vision=batch,
            text=text,
            timestamps=tuple(tuple(item.timestamps) for item in items),
        )

    def decode_stream(self, *, skip_special_tokens: bool = True) -> DecodeStream:
        """A new incremental decoder for one answer."""
        return self.tokenizer.decode_stream(skip_special_tokens=skip_special_tokens)

    def _order(self, text: str, media: dict[str, list[Any]]) -> list[tuple[str, int]]:
        """Kind and index of every item as the text names them; refuses numbers that differ."""
        if not self._placeholders:
            for kind, given in media.items():
                if given:
                    raise InputError(f"the model reads text only, but {len(given)} {kind}s were passed")
            return []
        found: list[tuple[int, str]] = []
        for kind, given in media.items():
            token = self._placeholders[kind]
            places = [(start, kind) for start in _find_all(text, token)]
            if len(places) != len(given):
                raise InputError(
                    f"the prompt holds {len(places)} {kind} placeholders ({token}), but {len(given)} {kind}s "
                    f"were passed; give every {kind} one content part of type '{kind}', and keep the "
                    "placeholder itself out of the text"
                )
            found += places
        counters = dict.fromkeys(_KINDS, -1)
        order = []
        for _, kind in sorted(found):
            counters[kind] += 1
            order.append((kind, counters[kind]))
        return order

    def _item(self, kind: str, index: int, source: Any) -> ImageItem | ClipItem | KnownItem:
        if isinstance(source, KnownItem):
            return source
        if kind == "image":
            assert self._image_settings is not None
            return ImageItem(source, self._image_settings, self._shape, f"image {index + 1}")
        assert self._video_settings is not None
        return ClipItem(source, self._video_settings, self._shape, f"video {index + 1}")

    def _with_timestamps(self, text: str, items: Sequence[VisualItem]) -> str:
        """Replace each video placeholder by its time steps, ``<1.5 seconds>`` and one placeholder each.

        The start and end tokens the template puts around the placeholder stay, as they do in transformers 5.
        """
        clips = [item for item in items if item.timestamps]
        if not clips:
            return text
        token = self._placeholders["video"]
        pieces = text.split(token)
        for index, clip in enumerate(clips):
            steps = [f"<{seconds:.1f} seconds>{self._start}{token}{self._end}" for seconds in clip.timestamps]
            pieces[index] += "".join(steps)
        return "".join(pieces)

    def _expand(self, ids: npt.NDArray[np.int64], grid: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
        """Repeat each placeholder id once per visual token of its image or time step."""
        if grid is None:
            return ids
        places = (ids == self._model.image_token_id) | (ids == self._model.video_token_id)
        per_step = np.repeat(grid[:, 1] * grid[:, 2] // self._shape.merge**2, grid[:, 0])
        if places.sum() != per_step.size:
            raise BundleError(
                f"{self._folder}: the tokenizer finds {int(places.sum())} placeholders where the prompt has "
                f"{per_step.size}; tokenizer.json does not belong to this model"
            )
        counts = np.ones(ids.size, np.int64)
        counts[places] = per_step
        return np.repeat(ids, counts)

    def _spelling(self, name: str) -> str:
        token_id = getattr(self._model, name)
        token = None if token_id is None else self.tokenizer.token(token_id)
        if token is None:
            raise BundleError(
                f"{self._folder}: {name} is {token_id}, which tokenizer.json does not have; "
                "it does not belong to this model"
            )
        return token


def _find_all(text: str, token: str) -> list[int]:
    starts, start = [], text.find(token)
    while start >= 0:
        starts.append(start)
        start = text.find(token, start + len(token))
    return starts


def _as_list(sources: Any, name: str) -> list[Any]:
    """A list of sources; a single one is a mistake worth naming."""
    if sources is None:
        return []
    if not isinstance(sources, list | tuple):
        raise InputError(f"{name} must be a list; for a single one pass {name}=[...]")
    return list(sources)
