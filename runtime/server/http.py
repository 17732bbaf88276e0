"""The HTTP side of a server: where it listens, who may ask, and what it answers to everything that is not a chat."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from deepstitch.errors import InputError
from deepstitch.runtime.disaggregated.config import Address
from deepstitch.runtime.disaggregated.listening import SocketFile, bound_socket
from deepstitch.runtime.disaggregated.metrics import CONTENT_TYPE, Metrics
from deepstitch.runtime.server.chat import Chat
from deepstitch.runtime.server.health import Check, Health
from deepstitch.runtime.server.refusals import Refusal, refusal

__all__ = ["HttpServer", "parse_listen"]

_LOOPBACK = "127.0.0.1"
_SHUTDOWN_SECONDS = 5.0
_SMALL_BODY = 1 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def parse_listen(text: str) -> Address:
    """Where HTTP listens: ``8000`` (on this machine only), ``host:port`` or ``unix:/path/to/socket``.

    Raises:
        InputError: none of the three.
    """
    place = text.removeprefix("http://")
    if place.isdigit():
        place = f"{_LOOPBACK}:{place}"
    try:
        if place.startswith("unix:"):
            return Address.parse(place)
        if "/" in place:
            raise InputError(place)
        return Address.parse(f"tcp://{place}")
    except InputError:
        raise InputError(f"HTTP address {text!r}: use a port, host:port or unix:/path/to/socket") from None


class HttpServer:
    """Serves ``/health`` and ``/metrics``, and a chat where there is one.

    Attributes:
        url: where it really listens.
    """

    def __init__(
        self, listen: Address, *, check: Check, metrics: Metrics, token: str, chat: Chat | None = None
    ) -> None:
        """Take the address, so that nothing is loaded for a server nobody could reach.

        Args:
            listen: see :func:`parse_listen`; port 0 takes a free one.
            check: does real work, for ``/health``.
            metrics: for ``/metrics``.
            token: what clients must show where others than this machine can connect.
            chat: its routes.

        Raises:
            InputError: the address is taken, or open to others without a token.
        """
        self._socket = bound_socket(listen)
        self._file = SocketFile.of(listen)
        self._path = listen.path
        open_to_others = not listen.path and not _is_loopback(self._socket.getsockname()[0])
        if open_to_others and not token:
            self._socket.close()
            raise InputError(f"HTTP at {listen.host}:{listen.port}: others can connect; pass --token-file FILE")
        self._token = token if open_to_others else ""
        # A web page may give this machine's address a name of its own, to be allowed to ask; a proxy may use any name
        self._names: tuple[str, ...] = () if listen.path or open_to_others else ("", "localhost", listen.host.lower())
        self._health, self._metrics, self._chat = Health(check), metrics, chat
        self._runner: web.AppRunner | None = None
        self._closed = False

    @property
    def url(self) -> str:
        """Where clients find it."""
        if self._path:
            return f"unix:{self._path}"
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def start(self) -> None:
        """Answer."""
        limit = self._chat.max_body_bytes if self._chat else _SMALL_BODY
        app = web.Application(middlewares=[self._guard], client_max_size=limit)
        app.add_routes([web.get("/health", self._get_health), web.get("/metrics", self._get_metrics)])
        if self._chat is not None:
            app.add_routes(self._chat.routes())
        # Without handler_cancellation a client that went away would be answered to the end.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS
        )
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()

    async def stop(self) -> None:
        """Take no more requests, give those under way a few seconds, and close; may be called twice."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if not self._closed:
            self._closed = True
            self._socket.close()
            if self._file is not None:
                self._file.remove()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The token first, then the answer; whatever goes wrong is told in one format, and counted."""
        status = 499  # the client went away
        try:
            response = await self._answer(request, handler)
            status = response.status
            return response
        finally:
            resource = request.match_info.route.resource
            path = resource.canonical if resource is not None else "other"
            self._metrics.count("http_responses_total", path=path, status=str(status))

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._names and _host(request) not in self._names and not _is_loopback(_host(request)):
            return _told(Refusal(403, "host", f"this server is {self.url}; ask under that name"))
        if not self._may(request):
            return _told(Refusal(401, "token", "send the header Authorization: Bearer TOKEN"))
        try:
            return await handler(request)
        except web.HTTPException as error:
            return _told(Refusal(error.status, _CODES.get(error.status, "refused"), _reason(request, error)))
        except Exception as error:
            told = refusal(error)
            if told.status == 500:
                logging.getLogger(__name__).error("%s %s failed", request.method, request.path, exc_info=error)
            return _told(told)

    def _may(self, request: web.Request) -> bool:
        if not self._token:
            return True
        scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(
            shown.strip().encode("utf-8", "surrogateescape"), self._token.encode()
        )

    async def _get_health(self, _: web.Request) -> web.StreamResponse:
        status, report = await self._health()
        return web.json_response(report, status=status, headers={"Cache-Control": "no-store"})

    async def _get_metrics(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})


_CODES = {404: "not_found", 405: "method", 413: "too_large", 415: "content_type"}


def _reason(request: web.Request, error: web.HTTPException) -> str:
    if error.status == 404:
        served = sorted({route.canonical for route in request.app.router.resources()})
        return f"nothing at {request.path[:80]}; there are {', '.join(served)}"
    return error.text or error.reason


def _told(told: Refusal) -> web.StreamResponse:
    headers = {**told.headers, **({"WWW-Authenticate": "Bearer"} if told.status == 401 else {})}
    return web.Response(
        text=json.dumps(told.body), status=told.status, content_type="application/json", headers=headers
    )


def _is_loopback(address: str) -> bool:
    """A name is none, whatever it stands for."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _host(request: web.Request) -> str:
    """The name or address the client used, without the port."""
    host = request.headers.get("Host", "").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
