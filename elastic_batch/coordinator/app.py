"""The coordinator's routes: one WebSocket for workers, HTTP with JSON for everybody else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from elastic_batch.coordinator.access import Access
from elastic_batch.coordinator.connections import Connection
from elastic_batch.coordinator.service import Service
from elastic_batch.coordinator.status import status
from elastic_batch.protocol import PATH

HELLO_SECONDS = 10.0
"""How long a new connection may stay silent."""
_MAX_BODY_BYTES = 1 << 16


def make_app(service: Service, *, token: str, hosts: tuple[str, ...] = ()) -> Starlette:
    """The ASGI application.

    Args:
        service: Whom the routes ask.
        token: What every request but those for `/healthz` carries.
        hosts: Further names under which it may be called.
    """
    run = service.run

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def show_status(_: Request) -> Response:
        return JSONResponse(status(run))

    async def metrics(_: Request) -> Response:
        text = run.metrics.read(run.clock(), run.state, run.membership)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def drain(request: Request) -> Response:
        error = service.drain(request.path_params["name"])
        return JSONResponse({"error": error} if error else {}, status_code=404 if error else 200)

    async def exited(request: Request) -> Response:
        return JSONResponse({"known": service.exited(request.path_params["name"])})

    async def stop(request: Request) -> Response:
        try:
            reason = await _reason(request)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        service.stop(reason)
        return JSONResponse({})

    async def worker(websocket: WebSocket) -> None:
        await _serve_worker(service, websocket)

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/status", show_status),
            Route("/metrics", metrics),
            Route("/workers/{name:path}/drain", drain, methods=["POST"]),
            Route("/workers/{name:path}/exited", exited, methods=["POST"]),
            Route("/stop", stop, methods=["POST"]),
            WebSocketRoute(PATH, worker),
        ],
        middleware=[Middleware(Access, token=token, hosts=hosts)],
    )


async def _serve_worker(service: Service, websocket: WebSocket) -> None:
    await websocket.accept()
    connection = Connection()
    pump = asyncio.create_task(connection.pump(websocket))
    silence = asyncio.get_running_loop().call_later(HELLO_SECONDS, connection.close, 1008, "no hello came")
    try:
        while (event := await websocket.receive())["type"] == "websocket.receive":
            silence.cancel()
            text = event.get("text")
            service.hear(connection, event.get("bytes") or b"" if text is None else text)
    finally:
        silence.cancel()
        service.gone(connection)
        if not connection.is_closing:
            pump.cancel()
        await asyncio.wait([pump])


async def _reason(request: Request) -> str:
    """The reason in a request's body.

    Raises:
        ValueError: There is none.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise ValueError(f"the body must have at most {_MAX_BODY_BYTES} bytes")
    said: Any = json.loads(body) if body else {}
    reason = said.get("reason", "asked to stop") if isinstance(said, dict) else None
    if not isinstance(reason, str):
        raise ValueError('the body must be like {"reason": "..."}')
    return reason[:500]
