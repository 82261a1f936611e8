"""What `hovle serve` tells of itself at /metrics, in Prometheus' text form."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Borders of histograms."""


class Metrics:
    """Numbers of one server; several in a process do not mix."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("hovle_requests", "Chat requests that are over", ["status"], registry=registry)
        self.request_seconds = Histogram(
            "hovle_request_seconds", "From the first byte to the last", buckets=SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "hovle_first_token_seconds",
            "From a prompt that is ready to its answer's first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter("hovle_prompt_tokens", "Tokens of prompts, read or reused", registry=registry)
        self.reused_tokens = Counter(
            "hovle_reused_tokens", "Tokens of prompts that an earlier one began with", registry=registry
        )
        self.answer_tokens = Counter("hovle_answer_tokens", "Tokens of answers", registry=registry)
        self.steps = Counter("hovle_steps", "Passes that gave every answer in work a token", registry=registry)

    def watch(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Tell a number as it is when somebody asks."""
        Gauge(name, documentation, registry=self._registry).set_function(value)

    def text(self) -> tuple[bytes, str]:
        """All numbers, and the media type of the text."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
