"""What ``encode-server`` and ``language-server`` share. Defaults equal those of the configs, which a test compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from deepstitch.runtime.disaggregated.config import PoolConfig
    from deepstitch.runtime.server.http import HttpServer
    from deepstitch.runtime.server.process import Server

__all__ = ["cache_bytes", "pool_config", "run", "seconds", "shared_options", "token_of"]

Command = TypeVar("Command", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0, min_open=True)

_SHARED = (
    click.option(
        "--token-file",
        type=FILE,
        help="Secret shared with the other processes, and with HTTP clients where they come from elsewhere.  "
        "[needed with tcp://, and where HTTP is open to other machines]",
    ),
    click.option("--block-tokens", type=COUNT, default=128, help="Tokens per block of the pool."),
    click.option("--pool-blocks", type=COUNT, default=64, help="Blocks for tokens; longer prompts come in parts."),
    click.option("--deepstack-blocks", type=COUNT, help="Blocks for DeepStack rows.  [default: as many]"),
    click.option("--encoder-cache-mib", type=click.IntRange(min=0), default=256, help="Memory for encoded pictures."),
    click.option("--threads", type=COUNT, help="Threads per operator.  [default: one per core]"),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON line when ready: address, pid, http."),
    click.option("--until-stdin-closes", is_flag=True, hidden=True, help="End with the parent process."),
    click.option("--faults", default="", hidden=True, help="For tests."),
)


def shared_options(command: Command) -> Command:
    """Add the options both servers have."""
    for option in reversed(_SHARED):  # decorators apply from the last to the first
        command = option(command)
    return command


def seconds(name: str, default: float, text: str) -> Callable[[Command], Command]:
    """An option that is a time."""
    return click.option(name, type=SECONDS, default=default, metavar="SECONDS", help=text)


def pool_config(options: dict[str, Any]) -> PoolConfig:
    """The pool the options describe."""
    from deepstitch.runtime.disaggregated.config import PoolConfig

    return PoolConfig(
        block_tokens=options["block_tokens"],
        blocks=options["pool_blocks"],
        deepstack_blocks=options["deepstack_blocks"],
        first_blocks=options.get("first_blocks"),
        checksums=options.get("checksums"),
    )


def cache_bytes(options: dict[str, Any]) -> int:
    """Bytes for encoded pictures."""
    return int(options["encoder_cache_mib"]) << 20


def token_of(options: dict[str, Any]) -> str:
    """The token in the file that was named, or none.

    Raises:
        InputError: the file cannot be used.
    """
    from deepstitch.runtime.server.token_file import read_token

    return "" if options["token_file"] is None else read_token(options["token_file"])


def run(
    name: str, server: Server, http: HttpServer | None, address: Callable[[], str | None], options: dict[str, Any]
) -> None:
    """Run a server and print one line when it is ready.

    Args:
        name: the verb.
        server: not started yet.
        http: likewise.
        address: where other processes connect to it, once it is started.
        options: of the command.
    """
    import os

    from deepstitch.runtime.server.process import run_server

    def ready() -> None:
        places = {"address": address(), "pid": os.getpid(), "http": http.url if http else None}
        if options["as_json"]:
            click.echo(json.dumps(places))
            return
        where = " and ".join(str(places[each]) for each in ("address", "http") if places[each])
        click.echo(f"deepstitch {name}: ready at {where}")

    run_server(server, http, ready=ready, until_stdin_closes=options["until_stdin_closes"])
