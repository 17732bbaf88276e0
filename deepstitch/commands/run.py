"""``deepstitch run``: one question, one answer."""

from __future__ import annotations

import json
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
    from deepstitch.runtime.results import Result

__all__ = ["command", "summary"]

_FILE = click.Path(path_type=Path)


@click.command("run")
@click.argument("bundle", type=_FILE, metavar="BUNDLE")
@click.option("--prompt", required=True, metavar="TEXT", help="What to ask.")
@click.option("--image", "images", type=_FILE, multiple=True, help="A picture; may be repeated.")
@click.option("--video", "videos", type=_FILE, multiple=True, help="A clip; may be repeated.")
@click.option("--system", metavar="TEXT", help="System message.")
@sampling_options
@click.option("--logprobs", type=int, metavar="N", help="Report the N best tokens at each place (with --json).")
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the answer is complete.")
def command(
    bundle: Path,
    prompt: str,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    system: str | None,
    logprobs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a bundle one question; the answer appears while it is written.

    Pictures and clips come before the text. How long each stage took is printed on stderr.

    \b
    deepstitch run BUNDLE --image cat.jpg --prompt "What is in the picture?"
    """
    import deepstitch
    from deepstitch.runtime.sampling import GenerationOptions

    chosen = {**take(options, SAMPLING), "logprobs": False if logprobs is None else logprobs}
    GenerationOptions.from_keywords(chosen)  # refuse before loading, which can take a while
    pipeline = deepstitch.load(bundle, **take(options, LOADING))
    messages = _messages(prompt, system, images, videos)
    stream = pipeline.stream(messages, images=images, videos=videos, **chosen)
    if as_json:
        click.echo(json.dumps(stream.result.to_dict(), ensure_ascii=False))
        return
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()
    click.echo(summary(stream.result), err=True)


def summary(result: Result) -> str:
    """Seconds and rates of every stage in one line."""
    seconds = result.timings
    computed = result.prompt_tokens - result.cached_tokens
    cached = f" (+{result.cached_tokens} cached)" if result.cached_tokens else ""
    guessed = f" · guessed {result.accepted_tokens} of {result.drafted_tokens} right" if result.drafted_tokens else ""
    stages = " · ".join(
        [
            f"load {seconds['load']:.2f} s",
            f"preprocess {seconds['preprocess']:.3f} s",
            f"encode {seconds['encode']:.3f} s",
            f"prefill {computed} tokens{cached} {seconds['prefill']:.3f} s ({result.prompt_tps:.0f}/s)",
            f"decode {result.generated_tokens} tokens {seconds['decode']:.3f} s ({result.generation_tps:.0f}/s)",
        ]
    )
    return stages + guessed


def _messages(
    prompt: str, system: str | None, images: tuple[Path, ...], videos: tuple[Path, ...]
) -> list[dict[str, Any]]:
    media = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    content: Any = [*media, {"type": "text", "text": prompt}] if media else prompt
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": content}]
