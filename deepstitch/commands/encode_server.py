"""``deepstitch encode-server``: the vision encoder in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepstitch.commands.server_options import (
    COUNT,
    FILE,
    cache_bytes,
    pool_config,
    run,
    seconds,
    shared_options,
    token_of,
)

if TYPE_CHECKING:
    from deepstitch.runtime.disaggregated.config import EncodeConfig

__all__ = ["command"]


@click.command("encode-server")
@click.argument("bundle", type=FILE, metavar="BUNDLE")
@click.option(
    "--listen",
    required=True,
    metavar="ADDRESS",
    help="Where language processes connect: unix:/path/to/socket on one machine, else tcp://host:port.",
)
@click.option(
    "--transport",
    metavar="NAME",
    help="How the data moves: shm on one machine, tcp between machines, or one of the extras mooncake and nixl.  "
    "[default: shm behind a socket file, else tcp]",
)
@click.option("--http", metavar="ADDRESS", help="Serve /health and /metrics at a port, host:port or unix:/path.")
@click.option("--max-requests", type=COUNT, default=256, help="Requests held at a time; more are refused as busy.")
@click.option(
    "--request-mib", type=COUNT, default=1024, help="Memory for pictures not yet encoded and features not yet read."
)
@seconds("--lease-seconds", 60.0, "Forget a request its language process has not spoken of for so long.")
@click.option(
    "--checksums/--no-checksums",
    default=None,
    help="Sum all that is transferred.  [default: except within the memory of one machine]",
)
@click.option("--tls-certificate", type=FILE, help="PEM file with certificate and key: encrypt TCP connections.")
@shared_options
def command(bundle: Path, listen: str, http: str | None, **options: Any) -> None:
    """Run the vision encoder of BUNDLE for language processes.

    It prepares prompts, encodes their pictures and clips, and keeps the result until it was read. Any number of
    language processes may use it, and each of them any number of encode processes.

    \b
    deepstitch encode-server BUNDLE --listen unix:/run/deepstitch/encode.sock
    deepstitch encode-server BUNDLE --listen tcp://10.0.0.5:7000 --token-file token --http 9100
    """
    from deepstitch.runtime.server import require_packages

    require_packages("a server")
    from deepstitch.manifest import Manifest
    from deepstitch.runtime.disaggregated.multimodal_embedding import EncodeServer
    from deepstitch.runtime.server.http import HttpServer, parse_listen

    config = _config(bundle, listen, options)
    Manifest.read(bundle)  # refuses a folder that is no bundle before anything is opened
    at = None if http is None else parse_listen(http)
    server = EncodeServer(config)
    web = None
    if at is not None:
        web = HttpServer(at, check=server.check, metrics=server.metrics, token=config.token)
    run("encode-server", server, web, lambda: str(server.address), options)


def _config(bundle: Path, listen: str, options: dict[str, Any]) -> EncodeConfig:
    from deepstitch.runtime.disaggregated.config import Address, Deadlines, EncodeConfig

    return EncodeConfig(
        bundle=bundle,
        listen=Address.parse(listen),
        transport=options["transport"],
        token=token_of(options),
        pool=pool_config(options),
        deadlines=Deadlines(lease=options["lease_seconds"]),
        max_requests=options["max_requests"],
        request_bytes=options["request_mib"] << 20,
        threads=options["threads"],
        encoder_cache_bytes=cache_bytes(options),
        tls_certificate=options["tls_certificate"],
        faults=options["faults"],
    )
