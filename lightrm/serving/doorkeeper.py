"""In front of every route: who may ask, how much, and how long it may take to say it. Written to ASGI.

A request's body is read here, whole and bounded, before a route sees it. While a route works, the connection is
watched: if the client hangs up, the route is cancelled, and what it waits for is never computed. Each request is
counted, and logged by method, path, status and time; a path or query that no route has may be a user's text, and is
not logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Coroutine
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightrm.serving.limits import Access, Limits
from lightrm.serving.refusals import RefusedError
from lightrm.serving.tallies import Tallies

LOG = logging.getLogger("lightrm.serving")
HELD = 8  # bodies of the largest size that may be in memory together
DRAINED = 2  # of the largest body: what is read and dropped of a larger one, so that its sender reads the answer


class HungUpError(Exception):
    """The client is gone."""


class Doorkeeper:
    """paths: of all routes. posted: of those that take a body."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        limits: Limits,
        tallies: Tallies,
        paths: frozenset[str],
        posted: frozenset[str],
    ) -> None:
        self.app, self.access, self.limits, self.tallies, self.paths = app, access, limits, tallies, paths
        self.posted = posted
        self.held = 0  # bytes of bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # the client hung up

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with contextlib.suppress(HungUpError):
            await self.passed(scope, receive, noting)
        path = scope["path"] if scope["path"] in self.paths else "other"
        seconds = time.perf_counter() - started
        self.tallies.request(path, status, seconds)
        LOG.info("%s %s %d, %.3f s", scope["method"], path, status, seconds)

    async def passed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check and read a request, and let a route answer it."""
        headers = Headers(scope=scope)
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            if self.held + count > HELD * self.limits.body:
                raise RefusedError(429, "Busy", "the server holds as many requests as it has room for: ask again", 1)
            self.held += count
            mine += count

        try:
            self.check(scope, headers)
            if scope["method"] == "POST":
                body = await self.in_time(self.body(receive, headers, hold))
            else:
                body = b""
            await self.watched(scope, receive, send, body)
        except RefusedError as refusal:
            response = refusal.response()
            response.headers["Connection"] = "close"  # the body may not have been read
            await response(scope, receive, send)
        finally:
            self.held -= mine

    def check(self, scope: Scope, headers: Headers) -> None:
        if not self.access.names(headers.get("host", "")):
            raise RefusedError(
                403, "Forbidden", "without an API key, this server answers only to names of its own machine"
            )
        if not self.access.allows(scope["path"], headers.get("authorization", "")):
            raise RefusedError(401, "Unauthorized", "send the server's API key: Authorization: Bearer KEY")
        if scope["method"] != "POST" or scope["path"] not in self.posted:
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a form of another web page could be sent without asking the browser's user
            raise RefusedError(415, "UnsupportedMediaType", "send JSON, with Content-Type: application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedError(415, "UnsupportedMediaType", "send the body as it is, without a Content-Encoding")

    async def body(self, receive: Receive, headers: Headers, hold: Any) -> bytes:
        most, said = self.limits.body, headers.get("content-length", "")
        told = int(said[:18]) if said.isdigit() else 0
        parts: list[bytes] = []
        read = 0
        too_large = told > most
        while not (too_large and max(read, told) > DRAINED * most):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HungUpError
            part = message.get("body", b"")
            read += len(part)
            too_large = too_large or read > most
            if too_large:
                parts.clear()
            else:
                hold(len(part))
                parts.append(part)
            if not message.get("more_body"):
                break
        if too_large:
            raise RefusedError(413, "TooLarge", f"a request has at most {most} bytes: send fewer answers at once")
        return b"".join(parts)

    async def in_time(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        """Return a body. Raises RefusedError if it does not arrive in time."""
        with Interruption() as interruption:
            clock = asyncio.get_running_loop().call_later(self.limits.seconds, interruption.set)
            try:
                return await reading
            finally:
                clock.cancel()
        seconds = self.limits.seconds
        raise RefusedError(408, "TooSlow", f"the request did not arrive within {seconds:g} seconds")

    async def watched(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Run a route, and break it off if the client hangs up. Raises HungUpError."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            interruption.set()

        with Interruption() as interruption:
            watcher = asyncio.ensure_future(watch())
            try:
                await self.app(scope, replay, send)
                return
            finally:
                watcher.cancel()
        raise HungUpError


class Interruption:
    """Breaks off what runs within it, without a task of its own for each part: quicker than `asyncio.wait_for`."""

    def __init__(self) -> None:
        self.task, self.happened, self.over = asyncio.current_task(), False, False

    def set(self) -> None:
        if self.task is not None and not self.over:
            self.happened = True
            self.task.cancel()

    def __enter__(self) -> Interruption:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, place: object) -> bool:
        """Swallow the cancellation that `set` asked for, and no other."""
        self.over = True
        mine = self.happened and kind is asyncio.CancelledError
        if mine and sys.version_info >= (3, 11) and self.task is not None:
            self.task.uncancel()
        return mine
