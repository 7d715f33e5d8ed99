"""A server on loopback for tests, and requests to it by http.client, which adds and hides nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import uvicorn

from lightrm.errors import InputError
from lightrm.serving.limits import Access, Limits
from lightrm.serving.server import bound, config_of
from lightrm.serving.service import application


class Fake:
    """A model whose score of an answer is its length. It waits for `gate`, and notes what each call holds."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()

    def score_batch(self, prompts: Sequence[Any], responses: Sequence[str]) -> np.ndarray:
        self.entered.set()
        self.gate.wait(20)
        if any("refused" in text for text in responses):
            raise InputError("a refused text")
        if any("crash" in text for text in responses):
            raise RuntimeError(*responses)
        self.calls.append(list(responses))
        return np.array([len(text) for text in responses], np.float32)

    def score_text(self, texts: Sequence[str]) -> np.ndarray:
        return self.score_batch(texts, texts)


@contextlib.contextmanager
def serving(rm: Any, access: Access | None = None, limits: Limits | None = None, **options: Any) -> Iterator[int]:
    """Yield the port of a server in a thread of its own."""
    access = access or Access()
    app = application(rm, "a model", access, limits or Limits(), **options)
    seconds = (limits or Limits()).seconds
    config = config_of(app, seconds)
    with bound(access.host, 0) as socket:
        socket.listen(256)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield socket.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def ask(
    port: int, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Return status, answer and headers. body: posted as JSON, or as it is if it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    with contextlib.closing(connection):
        connection.request(
            "GET" if body is None else "POST", path, None if body is None else sent, kind | (headers or {})
        )
        response = connection.getresponse()
        found = response.read()
        is_json = "json" in response.headers.get("Content-Type", "")
        return response.status, json.loads(found) if is_json else found.decode(), dict(response.headers)


def until(condition: Any, seconds: float = 10) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
