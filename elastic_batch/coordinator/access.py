"""Who may ask: the token, the Host and the Origin of every request and WebSocket are checked before anything else."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/healthz"})
"""Where no token is asked for: they tell nothing."""


class Access:
    """ASGI middleware that lets through who has the token and came by a name that is ours.

    A page of another site in a user's browser can send requests here. Its Origin gives it away; and if it makes its own
    name point to this address (DNS rebinding), the Host does. An address in digits cannot be rebound.

    Args:
        app: What is protected.
        token: The secret, ASCII.
        hosts: Names under which the service may be called, besides `localhost`, the machine's own and any address.
    """

    def __init__(self, app: ASGIApp, *, token: str, hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._token = token.encode()
        own = {"localhost", socket.gethostname(), socket.getfqdn()}
        self._hosts = {name.lower().rstrip(".") for name in own | set(hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (refusal := self._refusal(scope)) is None:
            await self._app(scope, receive, send)
            return
        status, text = refusal
        client = scope.get("client")
        logger.warning("refused %s from %s: %s", scope["path"], client[0] if client else "?", text)
        await _answer(scope, send, status, text)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 400, f"Host {host!r} is not a name of this coordinator. Allow it with --allow-host"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, f"Origin {origin!r} is another site"
        if scope["path"] in OPEN_PATHS and scope["type"] == "http":
            return None
        given = headers.get("authorization", "").encode()
        if not given:
            return 401, "no token. Send the header 'Authorization: Bearer TOKEN'; coordinator.json has the token"
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            return 401, "wrong token. coordinator.json in the run's directory, or the token file, has the right one"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if not name:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.rstrip(".") in self._hosts
        return True


async def _answer(scope: Scope, send: Send, status: int, text: str) -> None:
    """Refuse a request, or a WebSocket before it opens, with a line that says why."""
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    body = text.encode() if scope["type"] == "websocket" else json.dumps({"error": text}).encode()
    content = b"text/plain" if scope["type"] == "websocket" else b"application/json"
    headers = [(b"content-type", content), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
