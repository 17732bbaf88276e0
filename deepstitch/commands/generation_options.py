"""Options ``run`` and ``chat`` share. Ranges are checked in one place, ``runtime/sampling.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

__all__ = ["LOADING", "SAMPLING", "loading_options", "sampling_options", "take"]

Command = TypeVar("Command", bound=Callable[..., Any])

SAMPLING = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "prefill_chunk",
    "speculate",
    "speculate_ngram",
)
LOADING = ("engine", "threads", "packed_cache")

_SAMPLING_OPTIONS = (
    click.option("--max-tokens", type=int, default=128, help="Most tokens to write."),
    click.option("--temperature", type=float, default=0.0, help="0 takes the most probable token."),
    click.option("--top-k", type=int, default=0, help="Keep the k most probable tokens; 0 keeps all."),
    click.option("--top-p", type=float, default=1.0, help="Keep the most probable tokens up to this sum."),
    click.option("--min-p", type=float, default=0.0, help="Drop tokens below this fraction of the best."),
    click.option("--repetition-penalty", type=float, default=1.0, help="Make tokens seen before less probable."),
    click.option("--seed", type=int, help="Make sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
    click.option("--prefill-chunk", type=int, default=512, help="Prompt tokens per decoder call; 0 takes all at once."),
    click.option("--speculate", type=int, default=0, help="Tokens to guess from earlier text per call; 0 is off."),
    click.option("--speculate-ngram", type=int, default=3, help="Last tokens to look for in earlier text."),
)
_LOADING_OPTIONS = (
    click.option("--engine", help="ort, ort-cuda or tensorrt.  [default: the one for the bundle's target]"),
    click.option("--threads", type=int, help="Threads per operator.  [default: one per core]"),
    click.option("--packed-cache", is_flag=True, help="Map rearranged weights from a file: less memory, more disk."),
)


def sampling_options(command: Command) -> Command:
    """Add the options that decide how an answer is written."""
    return _apply(_SAMPLING_OPTIONS, command)


def loading_options(command: Command) -> Command:
    """Add the options that decide how a bundle is loaded."""
    return _apply(_LOADING_OPTIONS, command)


def take(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The entries of ``values`` called ``names``."""
    return {name: values[name] for name in names}


def _apply(options: tuple[Callable[[Command], Command], ...], command: Command) -> Command:
    for option in reversed(options):  # decorators apply from the last to the first
        command = option(command)
    return command
