"""Chat messages: checked, their pictures and clips taken out, and what remains reduced to plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepstitch.errors import InputError, did_you_mean

__all__ = ["Message", "conversation", "split_media"]

Message = Mapping[str, Any]

_MEDIA_KEYS = {
    "image": ("image", "image_url", "path", "url"),
    "video": ("video", "video_url", "path", "url"),
}
_PART_TYPES = ("text", "image", "image_url", "video", "video_url")


def conversation(messages: str | Sequence[Message], images: Sequence[Any], videos: Sequence[Any]) -> Sequence[Message]:
    """A bare string becomes one user turn, with a placeholder per image and clip before the text."""
    if not isinstance(messages, str):
        return messages
    if not images and not videos:
        return [{"role": "user", "content": messages}]
    media = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    return [{"role": "user", "content": [*media, {"type": "text", "text": messages}]}]


def split_media(
    messages: Sequence[Message], images: Sequence[Any], videos: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
    """Take the media out of the messages.

    A part that carries no picture of its own takes the next of ``images``; clips likewise. What is left over
    is appended, so that the caller sees the numbers differ.

    Returns:
        The messages as plain data a template may see, and all images and clips in the order of their parts.

    Raises:
        InputError: the messages are not in chat format.
    """
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages must be a string or a list of messages, not {type(messages).__name__}")
    found: dict[str, list[Any]] = {"image": [], "video": []}
    given = {"image": iter(images), "video": iter(videos)}
    plain = [_message(message, f"messages[{index}]", found, given) for index, message in enumerate(messages)]
    if not plain:
        raise InputError("there are no messages; pass at least one user turn")
    for kind, rest in given.items():
        found[kind].extend(rest)
    return plain, found["image"], found["video"]


def _message(message: Any, where: str, found: dict[str, list[Any]], given: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be a dict with 'role' and 'content', not {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise InputError(f"{where} has no 'role'; use 'system', 'user' or 'assistant'")
    content = message.get("content")
    if isinstance(content, list | tuple):
        parts = [_part(part, f"{where}.content[{index}]", found, given) for index, part in enumerate(content)]
        return {**_plain(message), "content": parts}
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where}.content must be a string or a list of parts, not {type(content).__name__}")
    if content is None and "tool_calls" not in message:
        raise InputError(f"{where} has no 'content'")
    return _plain(message)


def _part(part: Any, where: str, found: dict[str, list[Any]], given: dict[str, Any]) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise InputError(f"{where} must be a dict with a 'type', not {type(part).__name__}")
    kind = part.get("type") or next((key for key in _PART_TYPES if key in part), None)
    if kind not in _PART_TYPES:
        expected = ", ".join(f"'{name}'" for name in _PART_TYPES)
        raise InputError(f"{where} has type {kind!r}{did_you_mean(str(kind), _PART_TYPES)}; supported are {expected}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where} is a text part whose 'text' is {part.get('text')!r}; it must be a string")
        return {**_plain(part), "type": "text"}
    medium = kind.removesuffix("_url")
    keys = _MEDIA_KEYS[medium]
    own = next((part[key] for key in keys if part.get(key) is not None), None)
    own = own.get("url") if isinstance(own, Mapping) else own
    if own is None:
        own = next(given[medium], None)
    if own is not None:
        found[medium].append(own)
    others = {key: value for key, value in part.items() if key not in keys}
    return {**_plain(others), "type": medium}


def _plain(value: Any) -> Any:
    """Rebuild from exact JSON types: an object's methods are nothing a checkpoint's template should reach."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray):
        return [_plain(item) for item in value]
    return str(value)
