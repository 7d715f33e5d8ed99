"""A server that listens: uvicorn with a clock, and a model that has scored once before others may ask."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lightrm.errors import LightRMError, TemplateError, TokenizerError
from lightrm.scorer import RewardModel
from lightrm.serving.refusals import RefusedError

SWITCH = 0.0005  # seconds: the thread that scores lets the one that listens in more often than Python does by itself
LONGEST_HEAD = 2**16  # bytes of a request's headers
WAITING_CONNECTIONS = 2048  # that the system holds until they are taken


class TimedProtocol(HttpToolsProtocol):
    """Ends a connection whose headers do not arrive in time, or have no end, or whose client does not read its answer
    in time. uvicorn takes headers as they come, and keeps an answer until it is read: such a client would hold its
    memory, and the end of the server, for ever."""

    def __init__(self, *args: Any, seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds, self.head = seconds, 0
        self.clock: asyncio.TimerHandle | None = None

    @property
    def awaited(self) -> bool:
        """Whether the next thing to come is a request's headers."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.arm()

    def data_received(self, data: bytes) -> None:
        self.head += len(data)
        super().data_received(data)
        if not self.awaited:
            self.stop()
        elif self.head > LONGEST_HEAD:
            self.transport.close()
        else:
            self.arm()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.awaited:
            self.arm()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the form of every refusal."""
        answer = RefusedError(400, "InvalidRequest", "this is not an HTTP request").response()
        head = b"".join(b"%b: %b\r\n" % header for header in answer.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"connection: close\r\n\r\n" + answer.body)
        self.transport.close()

    def arm(self) -> None:
        """Start the clock. More of the same headers does not start it again."""
        if self.clock is None:
            self.clock = self.loop.call_later(self.seconds, self.late)

    def stop(self) -> None:
        self.head = 0
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None

    def late(self) -> None:
        self.clock = None
        if self.awaited:
            self.transport.abort()  # a closed one would wait until its answer is read


def run(app: Starlette, host: str, port: int, seconds: float, listening: Callable[[int], None]) -> None:
    """Listen until SIGTERM or SIGINT; then take no more connections, and answer what was accepted.

    port: 0 for any that is free. seconds: for a request's headers to arrive. listening: called with the port.
    """
    config = config_of(app, host, port, seconds)
    with config.bind_socket() as socket:
        socket.listen(WAITING_CONNECTIONS)
        sys.setswitchinterval(SWITCH)
        listening(socket.getsockname()[1])
        uvicorn.Server(config).run(sockets=[socket])


def config_of(app: Starlette, host: str, port: int, seconds: float) -> uvicorn.Config:
    protocol: Any = partial(TimedProtocol, seconds=seconds)
    return uvicorn.Config(
        app, host=host, port=port, http=protocol, ws="none", access_log=False, log_config=None, server_header=False,
        date_header=False, backlog=WAITING_CONNECTIONS, lifespan="on",
    )  # fmt: skip


def warm_up(rm: RewardModel) -> None:
    """Score once, so that kernels are compiled before anyone waits. Raises what a model says that gives no score: one
    with several attributes, or a process reward model, that was loaded without label or reduce."""
    try:
        rm.score("Hello", ["Hello!"])
    except (TemplateError, TokenizerError) as error:
        try:  # a model without a prompt template scores texts that are templated
            rm.score_text(["Hello"])
        except LightRMError:
            raise error from None
