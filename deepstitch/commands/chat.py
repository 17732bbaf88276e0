"""``deepstitch chat``: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepstitch.commands.generation_options import (
    LOADING,
    SAMPLING,
    loading_options,
    sampling_options,
    take,
)

if TYPE_CHECKING:
    from deepstitch.runtime.chat import Chat

__all__ = ["command"]

_HELP = "/image FILE adds a picture to your next message, /clear starts over, /quit leaves"


@click.command("chat")
@click.argument("bundle", type=click.Path(path_type=Path), metavar="BUNDLE")
@click.option("--system", metavar="TEXT", help="System message.")
@sampling_options
@loading_options
def command(bundle: Path, system: str | None, **options: Any) -> None:
    """Talk to a bundle. Each turn computes only what is new.

    /image FILE adds a picture to your next message, /clear starts over, /quit leaves; Ctrl-C stops an answer.

    \b
    deepstitch chat BUNDLE --temperature 0.7
    """
    import deepstitch

    pipeline = deepstitch.load(bundle, **take(options, LOADING))
    chat = pipeline.chat(system, **take(options, SAMPLING))
    click.echo(f"{_HELP}; Ctrl-C stops an answer", err=True)
    _converse(chat)


def _converse(chat: Chat) -> None:
    """Read lines until /quit or the end of the input."""
    from deepstitch.errors import DeepstitchError

    images: list[str] = []
    while True:
        line = _read_line()
        if line is None or line == "/quit":
            return
        try:
            if line.startswith("/"):
                _obey(line, chat, images)
            elif line:
                _answer(chat, line, images)
                images.clear()
        except DeepstitchError as error:  # refused: the conversation goes on
            click.echo(f"error: {error}", err=True)


def _read_line() -> str | None:
    """One line from the user; None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo("\n/quit leaves", err=True)
        return ""


def _obey(line: str, chat: Chat, images: list[str]) -> None:
    from deepstitch.errors import InputError, did_you_mean
    from deepstitch.runtime.preprocess import load_image

    verb, _, rest = line.partition(" ")
    if verb == "/clear":
        chat.clear()
        images.clear()
    elif verb == "/image" and rest.strip():
        load_image(rest.strip())  # refuse it now rather than with the next message
        images.append(rest.strip())
    else:
        hint = did_you_mean(verb, ("/image", "/clear", "/quit"))
        raise InputError(f"{line}: not understood{hint}; {_HELP}")


def _answer(chat: Chat, text: str, images: list[str]) -> None:
    """Print an answer while it is written; Ctrl-C ends it."""
    stream = chat.stream(text, images=images)
    try:
        for piece in stream:
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        stream.stop()
    click.echo()
