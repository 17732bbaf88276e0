"""``deepstitch run``: one question, one answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    from deepstitch.runtime.disaggregated.pair_client import PairStream
    from deepstitch.runtime.results import Result
    from deepstitch.runtime.stream import TextStream

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
@click.option("--disaggregated", is_flag=True, help="Run vision encoder and decoder in two processes of this machine.")
@click.option("--trace", type=_FILE, metavar="FILE.svg", help="With --disaggregated: draw what happened when.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the answer is complete.")
def command(
    bundle: Path,
    prompt: str,
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    system: str | None,
    logprobs: int | None,
    disaggregated: bool,
    trace: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a bundle one question; the answer appears while it is written.

    Pictures and clips come before the text. How long each stage took is printed on stderr.

    \b
    deepstitch run BUNDLE --image cat.jpg --prompt "What is in the picture?"
    """
    from deepstitch.errors import InputError
    from deepstitch.runtime.sampling import GenerationOptions

    chosen = {**take(options, SAMPLING), "logprobs": False if logprobs is None else logprobs}
    GenerationOptions.from_keywords(chosen)  # refuse before loading, which can take a while
    messages = _messages(prompt, system, images, videos)
    if disaggregated:
        _check_loading(options)
        _ask_pair(bundle, messages, images, videos, chosen, options["threads"], trace, as_json)
        return
    if trace is not None:
        raise InputError("--trace draws the way of a request through two processes; add --disaggregated")
    import deepstitch

    pipeline = deepstitch.load(bundle, **take(options, LOADING))
    _report(pipeline.stream(messages, images=images, videos=videos, **chosen), as_json)


def _ask_pair(
    bundle: Path,
    messages: list[dict[str, Any]],
    images: tuple[Path, ...],
    videos: tuple[Path, ...],
    chosen: dict[str, Any],
    threads: int | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Start an encode and a language process for this one question."""
    from deepstitch.errors import OutputError
    from deepstitch.manifest import Manifest
    from deepstitch.runtime.bundle import require_graphs
    from deepstitch.runtime.server import require_packages

    require_packages("--disaggregated")
    from deepstitch.runtime.disaggregated.local_pair import LocalPair
    from deepstitch.runtime.disaggregated.pair_client import chat_request
    from deepstitch.runtime.disaggregated.trace import draw

    if trace is not None and not trace.parent.is_dir():
        raise OutputError(f"{trace}: there is no folder {trace.parent}; make it first")
    require_graphs(bundle, Manifest.read(bundle))
    request = chat_request(messages, images, videos, chosen, trace=trace is not None)
    with LocalPair(bundle, threads=threads, max_body_bytes=len(request)) as pair:
        stream = pair.stream(request)
        _report(stream, as_json)
    if trace is not None:
        try:
            trace.write_text(draw(stream.spans), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{trace}: cannot be written ({error.strerror or error})") from None


def _check_loading(options: Mapping[str, Any]) -> None:
    """Two processes load a bundle in one way only."""
    from deepstitch.errors import InputError

    if options["engine"] not in (None, "ort"):
        raise InputError(f"--engine {options['engine']}: two processes run engine ort; leave --disaggregated out")
    if options["packed_cache"]:
        raise InputError("--packed-cache is for one process; leave it or --disaggregated out")


def _report(stream: TextStream | PairStream, as_json: bool) -> None:
    """Print the answer while it is written, or as one JSON object."""
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
            *([f"transfer {seconds['transfer']:.3f} s"] if "transfer" in seconds else []),
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
