"""What the server counts, in Prometheus' form."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """A registry of its own, so that two servers in one process do not add up."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests_open = Gauge(
            "beringia_requests_open", "Requests that wait, run or are being written", registry=registry
        )
        self.requests = Counter("beringia_requests", "Requests by how they ended", ["finish"], registry=registry)
        self.refused = Counter(
            "beringia_requests_refused", "Requests refused, by status", ["status"], registry=registry
        )
        self.prompt_tokens = Counter("beringia_prompt_tokens", "Tokens of prompts", registry=registry)
        self.new_tokens = Counter("beringia_generated_tokens", "Tokens generated", registry=registry)
        self.cache_use = Gauge("beringia_cache_use", "Share of the cache's blocks in use", registry=registry)
        self.first_token = Histogram(
            "beringia_time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "beringia_inter_token_seconds", "Between two tokens of a request", buckets=_SECONDS, registry=registry
        )
        self.whole = Histogram(
            "beringia_request_seconds", "From arrival to the last token", buckets=_SECONDS, registry=registry
        )

    def note_token(self, arrived: float, last: float | None, now: float) -> None:
        """A request has one more token. Times of `time.perf_counter`."""
        self.new_tokens.inc()
        if last is None:
            self.first_token.observe(now - arrived)
        else:
            self.between_tokens.observe(now - last)

    def note_end(self, finish: str, arrived: float) -> None:
        """A request has ended."""
        self.requests.labels(finish).inc()
        self.whole.observe(time.perf_counter() - arrived)

    def text(self) -> bytes:
        """For Prometheus to read."""
        return generate_latest(self._registry)
