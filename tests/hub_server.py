"""A hub on loopback for tests: what is common to all that answer huggingface-hub's requests."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Any


class HubAnswer(BaseHTTPRequestHandler):
    """Answers HEAD as GET, without the body. A hub says in `answer` what it has."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        raise NotImplementedError

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
