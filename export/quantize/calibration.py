"""Calibration prompts: what the inputs of the model's layers look like when it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepstitch.errors import DeepstitchError, InputError, did_you_mean
from deepstitch.export import facts
from deepstitch.models.checkpoint import Checkpoint
from deepstitch.runtime.preprocess import Processor, Prompt

__all__ = ["CalibrationSet"]

_KEYS = ("messages", "prompt", "answer", "images")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """Prompts as the model sees them.

    Attributes:
        prompts: at least one.
        digest: sha256 of the file and its pictures.
    """

    prompts: tuple[Prompt, ...]
    digest: str

    @property
    def tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(len(prompt.input_ids) for prompt in self.prompts)

    @classmethod
    def open(cls, path: Path, checkpoint: Checkpoint) -> CalibrationSet:
        """Read a JSON Lines file.

        Each line is one conversation: ``{"prompt": "…", "answer": "…", "images": ["a.png"]}``, of which only the
        prompt is required, or ``{"messages": […], "images": […]}`` in chat format. Paths of pictures are relative to
        the file.

        Args:
            path: the file.
            checkpoint: whose tokenizer and picture sizes count.

        Raises:
            InputError: the file cannot be read or holds no conversation, or a line cannot be used.
        """
        processor = Processor.from_folder(
            checkpoint.folder,
            facts.model_facts(checkpoint, batched_continuation=True),
            facts.vision_facts(checkpoint.config),
        )
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--calibration {path}: cannot be read ({error})") from None
        digest = hashlib.sha256()
        prompts = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                messages, images = _conversation(json.loads(line), path.parent)
                for each in (line.encode(), *(image.read_bytes() for image in images)):
                    digest.update(each)
                prompts.append(processor(messages, images=images, add_generation_prompt=False))
            except (ValueError, OSError, DeepstitchError) as error:
                raise InputError(f"--calibration {path}, line {number}: {error}") from None
        if not prompts:
            raise InputError(
                f"--calibration {path}: holds no conversation; write one JSON object per line, "
                'for example {"prompt": "What is this?", "images": ["a.png"]}'
            )
        return cls(prompts=tuple(prompts), digest=digest.hexdigest())


def _conversation(line: Any, folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    if not isinstance(line, Mapping):
        raise ValueError("not a JSON object")
    for key in line:
        if key not in _KEYS:
            raise ValueError(f"unknown entry '{key}'{did_you_mean(key, _KEYS)}; there are {', '.join(_KEYS)}")
    if ("messages" in line) == ("prompt" in line):
        raise ValueError("give either 'messages' or 'prompt'")
    images = [folder / name for name in line.get("images", ())]
    if "messages" in line:
        return list(line["messages"]), images
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": line["prompt"]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if "answer" in line:
        messages.append({"role": "assistant", "content": line["answer"]})
    return messages, images
