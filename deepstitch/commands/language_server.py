"""``deepstitch language-server``: the text decoder in a process of its own, behind OpenAI's chat interface."""

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
    from deepstitch.manifest import Manifest
    from deepstitch.runtime.disaggregated.config import LanguageConfig

__all__ = ["command"]


@click.command("language-server")
@click.argument("bundle", type=FILE, metavar="BUNDLE")
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    metavar="ADDRESS",
    help="An encode process, as it was told to --listen; may be repeated.",
)
@click.option(
    "--registry",
    type=FILE,
    help="File with the address of an encode process per line; changes are followed.",
)
@click.option("--local-encoder", is_flag=True, help="Load the vision encoder too, for when no encode process answers.")
@click.option("--http", default="8000", metavar="ADDRESS", help="Where clients ask: a port, host:port or unix:/path.")
@click.option("--model-name", metavar="NAME", help="What clients call the model.  [default: the folder's name]")
@click.option("--max-requests", type=COUNT, default=512, help="Requests admitted at a time; more are refused as busy.")
@click.option("--max-running", type=COUNT, default=4, help="Answers written at the same time.")
@click.option("--max-body-mib", type=COUNT, default=64, help="Size of one request, pictures and clips included.")
@click.option("--first-blocks", type=COUNT, help="Blocks one transfer may take at most.  [default: all there are]")
@seconds("--request-seconds", 300.0, "Until a request must be encoded, all attempts together.")
@seconds("--hang-seconds", 3.5, "Give an encode process up that has not answered for so long.")
@seconds("--encoder-seconds", 10.0, "Wait for an encode process to come (back) while none can be reached.")
@click.option("--tls-authority", type=FILE, help="PEM file with the certificate that encode processes must show.")
@shared_options
def command(bundle: Path, http: str, **options: Any) -> None:
    """Run the text decoder of BUNDLE and answer clients: POST /v1/chat/completions.

    Pictures and clips go to an encode process; text alone never waits for one. Nothing is fetched for clients: they
    send pictures as data: URLs. Also served: /v1/models, /health, /metrics.

    \b
    deepstitch language-server BUNDLE --encoder unix:/run/deepstitch/encode.sock
    deepstitch language-server BUNDLE --registry encoders.txt --token-file token --http 0.0.0.0:8000
    """
    from deepstitch.runtime.server import require_packages

    require_packages("a server")
    from deepstitch.manifest import Manifest
    from deepstitch.runtime.disaggregated.multimodal_language import LanguageServer
    from deepstitch.runtime.server.chat import Chat
    from deepstitch.runtime.server.http import HttpServer, parse_listen

    config = _config(bundle, options)
    _check(config, Manifest.read(bundle))
    at = parse_listen(http)
    server = LanguageServer(config)
    name = options["model_name"] or bundle.resolve().name
    chat = Chat(server, model=name, max_body_bytes=options["max_body_mib"] << 20)
    web = HttpServer(at, check=server.check, metrics=server.metrics, token=config.token, chat=chat)
    run("language-server", server, web, lambda: None, options)


def _config(bundle: Path, options: dict[str, Any]) -> LanguageConfig:
    from deepstitch.runtime.disaggregated.config import Address, Deadlines, LanguageConfig

    return LanguageConfig(
        bundle=bundle,
        encoders=tuple(Address.parse(each) for each in options["encoders"]),
        registry=options["registry"],
        token=token_of(options),
        pool=pool_config(options),
        deadlines=Deadlines(
            request=options["request_seconds"], hang=options["hang_seconds"], encoder=options["encoder_seconds"]
        ),
        local_encoder=options["local_encoder"],
        max_requests=options["max_requests"],
        max_running=options["max_running"],
        threads=options["threads"],
        encoder_cache_bytes=cache_bytes(options),
        tls_authority=options["tls_authority"],
        faults=options["faults"],
    )


def _check(config: LanguageConfig, manifest: Manifest) -> None:
    """What would only be noticed after loading, or by the first client."""
    from deepstitch.errors import InputError

    if config.registry is not None and not config.registry.is_file():
        raise InputError(
            f"registry {config.registry}: no such file; make one with an address per line, or an empty one"
        )
    remote = [str(address) for address in config.encoders if not address.path]
    if remote and not config.token:
        raise InputError(f"{remote[0]}: an encoder behind TCP wants a shared token; pass --token-file FILE")
    if config.tls_authority is not None and config.encoders and not remote:
        raise InputError("TLS is for TCP; leave --tls-authority out, or name encoders as tcp://host:port")
    if manifest.vision is not None and not (config.encoders or config.registry or config.local_encoder):
        raise InputError("nothing could encode pictures; pass --encoder ADDRESS, --registry FILE or --local-encoder")
