"""Every error a user can cause. The command line prints the message on one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BundleError",
    "CheckpointError",
    "ComparisonFailed",
    "ConfigError",
    "DeepstitchError",
    "DeviceError",
    "InputError",
    "MissingDependency",
    "OutputError",
    "UnsupportedError",
    "did_you_mean",
    "list_names",
]


class DeepstitchError(Exception):
    """Refused input. The message says what was wrong, which file, tensor or flag, and what to do next."""

    exit_code = 2


class ConfigError(DeepstitchError):
    """A configuration file has an unknown, missing or contradictory entry."""


class CheckpointError(DeepstitchError):
    """A checkpoint folder is damaged or does not hold the tensors its config asks for."""


class UnsupportedError(DeepstitchError):
    """The input is well formed, but asks for something deepstitch does not do."""


class BundleError(DeepstitchError):
    """A bundle folder is incomplete, edited, or from another version."""


class InputError(DeepstitchError):
    """A prompt, image, video or sampling option cannot be used."""


class DeviceError(DeepstitchError):
    """The card, its driver or its memory does not allow what was asked for."""


class OutputError(DeepstitchError):
    """The result cannot be written where it was asked for."""


class MissingDependency(DeepstitchError):
    """An optional package is needed for this step."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}': pip install 'deepstitch[{extra}]'")


class ComparisonFailed(DeepstitchError):
    """A comparison ran to the end and found errors over the tolerance."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known word, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def list_names(names: Iterable[str], limit: int = 6) -> str:
    """Join names for a message, naming at most ``limit`` of them."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} … and {len(ordered) - limit} more"
