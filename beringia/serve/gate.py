"""What stands before every route: keys, the size of a body, and how long it may take to arrive. Plain ASGI, so that
nothing is read of a request without a key."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from beringia.serve.failures import Failure
from beringia.serve.metrics import Metrics

_LOG = logging.getLogger("uvicorn.error")

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Without a key: the page asks for one itself, and probes have none."""

HEAD_BYTES = 32 << 10
"""Of a request before its body: path and headers."""

_READ_ANYWAY_BYTES = 64 << 20
"""Of a body that is too large so much is read, and thrown away: a client that is still sending when the connection is
closed does not see the answer."""


PAGES_OF_THIS_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""Origins whose pages a browser lets ask: other chat pages that somebody runs beside the server. No other page: else a
server without keys would answer whatever site its user visits."""


class Pages(CORSMiddleware):
    """Outside of the gate, since a browser asks whether a page may ask before it sends the page's key."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            app,
            allow_origin_regex=PAGES_OF_THIS_MACHINE,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Which repeats what the browser asks for, so no more than a head may have."""
        if sum(len(name) + len(value) for name, value in request_headers.raw) > HEAD_BYTES:
            return head_too_large().response()
        return super().preflight_response(request_headers)


class Gate:
    """Middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        body_bytes: int,
        body_seconds: float,
        metrics: Metrics,
        check_room: Callable[[], None],
    ) -> None:
        """`check_room` raises Failure where no request can be taken: then it is refused before it is read."""
        self._check_room = check_room
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._body_bytes = body_bytes
        self._body_seconds = body_seconds
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 400:
                    self._metrics.refused.labels(str(message["status"])).inc()
            await send(message)

        try:
            _check_head(scope)
            self._check_key(scope)
            if scope["method"] == "POST":
                self._check_room()
            body = await self._read(scope, receive)
            await self._app(scope, body, noting)
        except Exception as problem:
            failure = problem if isinstance(problem, Failure) else _unforeseen(problem)
            if started:
                self._metrics.refused.labels(str(failure.status)).inc()
                raise
            response = failure.response()
            if failure.status in (408, 413, 431):
                response.headers["Connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, noting)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN_PATHS:
            return
        given = _header(scope, b"authorization")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() == b"bearer":  # RFC 9110: the case of a scheme's name means nothing, nor how many spaces
            given = key.lstrip(b" ")
        # Every key is compared, each in constant time: how long this takes says nothing about them.
        if not any([hmac.compare_digest(given, key) for key in self._keys]):
            raise Failure(
                401, "The key is missing or wrong: send one as 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body, and then what `receive` says: that the client has gone."""
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > _READ_ANYWAY_BYTES:
            raise self._too_large()
        parts: list[bytes] = []
        # What is open to all takes no body: who has no key has none kept.
        size, more = 0, scope["method"] in ("POST", "PUT", "PATCH") and scope["path"] not in OPEN_PATHS
        try:
            async with asyncio.timeout(self._body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    part = message.get("body", b"")
                    size += len(part)
                    more = message.get("more_body", False)
                    if size <= self._body_bytes:
                        parts.append(part)
                    if size > _READ_ANYWAY_BYTES:
                        break
        except TimeoutError:
            raise Failure(408, f"The body did not arrive within {self._body_seconds:g} s.", code="timeout") from None
        if size > self._body_bytes:
            raise self._too_large()
        whole: list[dict[str, Any]] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again

    def _too_large(self) -> Failure:
        return Failure(413, f"The body has more than {self._body_bytes} bytes.", code="body_too_large")


def _check_head(scope: Scope) -> None:
    size = len(scope["raw_path"]) + len(scope["query_string"])
    if size + sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
        raise head_too_large()


def head_too_large() -> Failure:
    """The failure of a request with too much before its body."""
    return Failure(431, f"The request's head has more than {HEAD_BYTES} bytes.", code="head_too_large")


def _unforeseen(problem: Exception) -> Failure:
    _LOG.error("A request met an error that nobody foresaw.", exc_info=problem)
    return Failure(500, f"An error that nobody foresaw: {type(problem).__name__}.")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
