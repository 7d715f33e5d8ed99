"""What a server allows: how much at once, for how long, and for whom."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass

from lightrm.errors import InputError

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
SHORTEST_KEY = 16  # characters
REPEATED = 16  # prompts that fill a whole request, and are read with as many answers
OPEN_PATHS = ("/", "/page.js", "/page.css", "/health")  # hold no text and no score: they need no key


@dataclass(frozen=True, slots=True)
class Limits:
    """body: bytes of a request. texts: of one request. longest: characters of one text with its prompt. waiting: texts
    of all requests that are not computed yet. seconds: for headers to arrive, for a body to arrive, and for an answer
    to be read."""

    body: int = 8 * 2**20
    texts: int = 1024
    longest: int = 2**18
    waiting: int = 8192
    seconds: float = 30.0

    @property
    def characters(self) -> int:
        """Of one request's answers, each with its prompt: a long prompt with many answers is short on the wire, and
        takes the tokenizer's time for each."""
        return REPEATED * self.body


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask. host: the address that the server listens on. key: what a caller must show; None: nothing.

    Raises InputError on an address that others can reach without a key, or on a key that is too short.
    """

    host: str = "127.0.0.1"
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key is None and not self.local:
            raise InputError(
                f"others could reach {self.host} without a key: pass --api-key or set LIGHTRM_API_KEY, or listen on "
                "127.0.0.1"
            )
        if self.key is not None and (len(self.key) < SHORTEST_KEY or not self.key.isascii() or " " in self.key):
            raise InputError(f"an API key must be {SHORTEST_KEY} ASCII characters or more, without spaces")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def allows(self, path: str, authorization: str) -> bool:
        """Whether a request may pass. authorization: its header, "Bearer KEY". Compared in constant time."""
        if self.key is None or path in OPEN_PATHS:
            return True
        scheme, _, shown = authorization.partition(" ")
        same = hmac.compare_digest(shown.strip().encode(), self.key.encode())
        return scheme.lower() == "bearer" and same

    def names(self, host: str) -> bool:
        """Whether a request's Host header names this server. Without a key it must be a name of this machine: a web
        page that points a name of its own at 127.0.0.1 (DNS rebinding) gets no answer."""
        if self.key is not None:
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        return name.strip("[]").lower() in (*LOCAL_NAMES, self.host)
