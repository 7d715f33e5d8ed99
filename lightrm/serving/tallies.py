"""Counts of what a server did, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Tallies:
    """The counts of one server. None of them has a word of a request in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lightrm_requests", "Requests answered", ("path", "status"), registry=self.registry)
        self.seconds = Histogram(
            "lightrm_request_seconds", "From a request's headers to its answer", ("path",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.packs = Histogram(
            "lightrm_texts_together", "Texts in one call of the model, from all requests", buckets=TEXTS,
            registry=self.registry,
        )  # fmt: skip

    def request(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def together(self, texts: int) -> None:
        self.packs.observe(texts)

    def watch_waiting(self, count: Callable[[], int]) -> None:
        """count: returns how many texts wait."""
        gauge = Gauge("lightrm_texts_waiting", "Texts that wait for the model", registry=self.registry)
        gauge.set_function(count)

    def text(self) -> bytes:
        """Return all counts in Prometheus' text format."""
        return generate_latest(self.registry)
