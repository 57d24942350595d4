"""What ``/metrics`` tells, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from trimkv_edge.runtime.server.pool import SlotPool
from trimkv_edge.runtime.server.prompt import Answer
from trimkv_edge.runtime.server.waiting import Line


class Metrics:
    """Counters of one server."""

    def __init__(self, pool: SlotPool, line: Line) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"trimkv_{name}", text, labels, registry=self._registry)

        self._requests = counter("requests", "Requests for text, by how they ended", ("outcome",))
        self._read = counter("prompt_tokens_read", "Prompt tokens that the engines read")
        self._cached = counter("prompt_tokens_cached", "Prompt tokens that a cache held already")
        self._made = counter("completion_tokens", "Tokens that were generated")
        Gauge("trimkv_sessions", "Sessions", registry=self._registry).set(len(pool.slots))
        busy = Gauge("trimkv_sessions_busy", "Sessions that are answering", registry=self._registry)
        busy.set_function(lambda: pool.busy)
        waiting = Gauge("trimkv_requests_waiting", "Requests that wait for a session", registry=self._registry)
        waiting.set_function(lambda: len(line))
        copies = Gauge("trimkv_undo_bytes", "Copies of caches that --undo holds", registry=self._registry)
        copies.set_function(lambda: sum(slot.session.statistics().checkpoint_bytes for slot in pool.slots))

    def count(self, outcome: str, answer: Answer | None = None) -> None:
        """Notes the end of a request: ``ok``, ``stopped``, or an HTTP status."""
        self._requests.labels(outcome).inc()
        if answer is not None:
            self._read.inc(answer.prompt_tokens - answer.cached_tokens)
            self._cached.inc(answer.cached_tokens)
            self._made.inc(answer.completion_tokens)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)
