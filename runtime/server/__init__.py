"""HTTP in front of an encode or language process, and what both commands need to run as a server.

=================  ===================================================================================
``openai``         a chat request in OpenAI's format to messages, pictures and options; answers back
``data_url``       pictures and clips inside a request; nothing is ever fetched or opened for a client
``refusals``       errors as status codes
``health``         /health: whether work is really done
``chat``           POST /v1/chat/completions and GET /v1/models
``http``           the listening socket, the token, the routes
``process``        signals, the ready line, a clean end
``token_file``     the shared secret
=================  ===================================================================================
"""

from __future__ import annotations

import importlib.util

from deepstitch.errors import MissingDependency

__all__ = ["require_packages"]

_PACKAGES = {
    "aiohttp": "aiohttp",
    "msgspec": "msgspec",
    "prometheus_client": "prometheus-client",
    "xxhash": "xxhash",
}


def require_packages(purpose: str) -> None:
    """Refuse early where the extra ``disaggregated`` is not installed.

    Raises:
        MissingDependency: it names the package and the extra.
    """
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependency(package, "disaggregated", purpose)
