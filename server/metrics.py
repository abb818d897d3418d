"""What Prometheus may know about one application: counts and times, and no word of any client."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
"""Bounds for times from a cached prompt on a GPU to a long one on a CPU."""
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """One per application, with a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("trinity_requests", "Requests that ended", ("path", "status", "caller"), registry=registry)
        self.seconds = Histogram(
            "trinity_request_seconds", "From a request's headers to its end", ("path",), buckets=SECONDS, registry=registry
        )
        self.in_flight = Gauge("trinity_requests_in_flight", "Requests that have not ended", registry=registry)
        self.answers = Counter(
            "trinity_answers", "Answers by how they ended: stop, length, or an error's code", ("outcome",), registry=registry
        )
        self.answering = Gauge("trinity_answers_in_flight", "Slots that are taken", registry=registry)
        self.waiting = Gauge("trinity_queue_length", "Requests that wait for a slot", registry=registry)
        self.position = Histogram(
            "trinity_queue_position",
            "Requests before one that comes to wait, itself counted",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.wait = Histogram("trinity_queue_seconds", "Wait for a slot; 0 for who finds one free", buckets=SECONDS, registry=registry)
        self.first_token = Histogram(
            "trinity_first_token_seconds", "From asking for a slot to the first token", buckets=SECONDS, registry=registry
        )
        self.speed = Histogram(
            "trinity_tokens_per_second",
            "Speed of an answer after its first token",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500),
            registry=registry,
        )
        self.tokens = Counter("trinity_tokens", "Tokens of answers that ended", ("kind",), registry=registry)
        self.engine_errors = Counter("trinity_engine_errors", "Answers that the engine failed", ("code",), registry=registry)
        self._release = Gauge("trinity_release", "1 for the release that is served", ("model", "release"), registry=registry)

    def serve(self, model: str, release: str) -> None:
        """Name the release that is served; empty for none."""
        self._release.clear()
        if release:
            self._release.labels(model, release).set(1)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
