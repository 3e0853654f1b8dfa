"""How pages are served: strict headers, our two files, a login by token, a stream of changes, and the server itself.

Both dashboards are built from this: the coordinator's (``server/dashboard``) and the organisation's. A page can be put
into nobody's frame, runs no script but ``live.js``, and is stored by no cache.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import CloisterError, Unavailable
from common.pages.access import Token, Viewer
from common.pages.assets import MEDIA_TYPES, asset

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy: nothing from elsewhere, nothing inline."""

HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}

COOKIE = "cloister-session"
MOST_STREAMS = 200
STREAM_LASTS_S = 300.0
"""A stream ends after this; the browser comes back by itself, and whether it may is asked anew."""

_POLL_S, _HEARTBEAT_S = 0.25, 15.0


class StrictHeaders:
    """Puts ``HEADERS`` on every answer, and ``no-store`` where the answer does not say how long it may be kept."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self._app(scope, receive, strict if scope["type"] == "http" else send)


def static_answer(name: str) -> Response:
    """``pages.css`` or ``live.js``, to be kept for a year: pages ask for it with its tag."""
    if name not in MEDIA_TYPES:
        return PlainTextResponse("no such file\n", status_code=404)
    found = asset(name)
    headers = {"cache-control": "public, max-age=31536000, immutable", "etag": f'"{found.tag}"'}
    return Response(found.body, media_type=found.media_type, headers=headers)


class TokenDoor:
    """Knows a viewer by a token (``Authorization: Bearer …``) or by the session that the token was given for."""

    def __init__(self, token: Token, viewer: Viewer, clock: Callable[[], float] = time.time) -> None:
        self._token, self._viewer, self._clock = token, viewer, clock

    def viewer(self, request: Request) -> Viewer | None:
        """Who asks; None for a stranger."""
        kind, _, text = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self._viewer if self._token.admits(text.strip()) else None
        session = request.cookies.get(COOKIE, "")
        return self._viewer if self._token.holds(session, self._clock()) else None

    async def log_in(self, request: Request, refused: Callable[[], Response]) -> Response:
        """The answer to a posted form with the field ``token``: to the first page, or what ``refused`` makes."""
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > 4096:
                return PlainTextResponse("too long\n", status_code=413)
        given = parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0].strip()
        if not _same_origin(request) or not self._token.admits(given):
            return refused()
        answer = RedirectResponse(first_page(request), status_code=303)
        answer.set_cookie(
            COOKIE, self._token.session(self._clock()), max_age=Token.LASTS_S, httponly=True, samesite="strict",
            secure=request.url.scheme == "https", path="/",
        )  # fmt: skip
        return answer

    def log_out(self, request: Request) -> Response:
        """Forget the session in this browser."""
        answer = RedirectResponse(first_page(request) + "login", status_code=303)
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return answer


def first_page(request: Request) -> str:
    """The path of the first page, with a slash at its end; longer than ``/`` behind a proxy that adds a folder."""
    return str(request.scope.get("root_path", "")).rstrip("/") + "/"


def _same_origin(request: Request) -> bool:
    """Whether a form was sent from a page of ours; a caller that is no browser says nothing about it."""
    return request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


class Streams:
    """Server-sent events: one word per change, to as many browsers as ``MOST_STREAMS``.

    Args:
        changed: the version of what this viewer sees, and a sentence about what is new; asked four times a second.
    """

    def __init__(self) -> None:
        self._open = 0

    def answer(self, changed: Callable[[], tuple[str, str]]) -> Response:
        """The stream for one browser, or 503 when there are too many."""
        if self._open >= MOST_STREAMS:
            return PlainTextResponse("too many pages follow this server\n", status_code=503)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._words(changed), media_type="text/event-stream", headers=headers)

    async def _words(self, changed: Callable[[], tuple[str, str]]) -> AsyncIterator[bytes]:
        self._open += 1
        started = spoke = time.monotonic()
        known = None
        try:
            yield b"retry: 1000\n\n"
            while time.monotonic() - started < STREAM_LASTS_S:
                try:
                    version, news = await run_in_threadpool(changed)
                except CloisterError:  # what was followed is gone: the browser asks again and is told
                    return
                if version != known:
                    known, spoke = version, time.monotonic()
                    yield f"event: state\ndata: {json.dumps({'version': version, 'news': news})}\n\n".encode()
                elif time.monotonic() - spoke > _HEARTBEAT_S:
                    spoke = time.monotonic()
                    yield b": still here\n\n"
                await asyncio.sleep(_POLL_S)
        finally:
            self._open -= 1


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        Unavailable: the address is taken or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # from here on a browser waits for the server instead of being turned away
    except OSError as error:
        listener.close()
        raise Unavailable(f"{host}:{port}: cannot listen there ({error.strerror or error})") from error
    return listener


def listen_unix(path: Path) -> socket.socket:
    """A listening Unix socket that only its owner's processes can reach (0600); one left by a killed server goes.

    Raises:
        Unavailable: the path is taken by something else, or cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # from its first moment: a chmod afterwards would leave a gap
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise Unavailable(f"{path}: cannot listen there ({error.strerror or error})") from error
    finally:
        os.umask(before)
    return listener


def server(
    app: Starlette | Callable[[Scope, Receive, Send], Awaitable[None]], *, tls: tuple[Path, Path] | None = None
) -> uvicorn.Server:
    """A server for sockets of ``listen``; ``server(app).run(sockets=[…])`` ends on SIGINT and SIGTERM.

    No header of a proxy is believed here, nothing is logged per request, and open streams do not keep it from ending.
    """
    certificate, key = (str(path) for path in tls) if tls else (None, None)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            ws="none",  # no page speaks it, and what uvicorn would load for it is deprecated
            access_log=False,
            log_config=None,  # its words go where those of the command go, in the same form
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            lifespan="off",
            limit_concurrency=1000,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
    )
