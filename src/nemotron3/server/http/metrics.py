"""Metrics for Prometheus at /metrics: requests, latencies, and the counters of the engine.

The registry belongs to one server, so two servers in one process have separate counts. The counts
of its engines are read at each scrape. Names are `nemotron3_` and a quantity with its unit.
"""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nemotron3.inference.engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_GAUGES = {
    "num_running": ("requests_running", "Answers being generated."),
    "num_waiting": ("requests_waiting", "Requests waiting in the queue."),
    "kv_usage": (
        "kv_cache_usage_ratio",
        "Fraction of the KV pages that running answers use.",
    ),
    "prefix_bytes": ("prefix_cache_bytes", "Memory of the prefix cache."),
    "draft_length": ("draft_length_tokens", "Current number of draft tokens per step."),
}
_NOT_ADDED = {"kv_usage", "draft_length"}
"""Of several engines, the largest."""
_COUNTERS = {
    "prompt_tokens": (
        "prompt_tokens",
        "Prompt tokens computed, without those found in the prefix cache.",
    ),
    "steps": ("engine_steps", "Steps of the engine."),
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "prefix_queries": (
        "prefix_cache_queries_tokens",
        "Prompt tokens looked up in the prefix cache.",
    ),
    "prefix_hits": ("prefix_cache_hits_tokens", "Prompt tokens found in the prefix cache."),
    "preemptions": ("preemptions", "Answers preempted for lack of memory, and recomputed later."),
    "drafted_tokens": ("draft_tokens", "Tokens drafted by multi-token prediction."),
    "accepted_tokens": ("draft_tokens_accepted", "Drafted tokens that verification accepted."),
}


class RequestMetrics:
    """Metrics of one server: the requests that it has answered."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "nemotron3_http_requests",
            "Requests answered.",
            ("path", "status"),
            registry=self._registry,
        )
        self._durations = Histogram(
            "nemotron3_http_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("path",),
            buckets=_LATENCIES_S,
            registry=self._registry,
        )

    def count_request(self, path: str, status: int, duration_s: float) -> None:
        """Count an HTTP request; `path` is that of the route, which limits the number of labels."""
        self._requests.labels(path, str(status)).inc()
        self._durations.labels(path).observe(duration_s)

    def page(self) -> bytes:
        """All metrics, in the text format of Prometheus."""
        return generate_latest(self._registry)


class ServerMetrics(RequestMetrics):
    """Metrics of one server of a model: requests, latencies of answers, counters of the engine."""

    def __init__(self, *stats: Callable[[], EngineStats]) -> None:
        """`stats` are those of each engine."""
        super().__init__()
        self._registry.register(_EngineCollector(stats))
        self._first_token = Histogram(
            "nemotron3_time_to_first_token_seconds",
            "From a prompt's submission to its first token.",
            buckets=_LATENCIES_S,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "nemotron3_time_per_output_token_seconds",
            "Mean time between an answer's tokens after the first.",
            buckets=_PER_TOKEN_S,
            registry=self._registry,
        )

    def count_answer(self, first_token_s: float, total_s: float, num_tokens: int) -> None:
        """Record the latencies of one request of the engine."""
        self._first_token.observe(first_token_s)
        if num_tokens > 1:
            self._per_token.observe((total_s - first_token_s) / (num_tokens - 1))


class _EngineCollector(Collector):
    """Reads the counters of the engines at each scrape, and adds them up."""

    def __init__(self, stats: Sequence[Callable[[], EngineStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        stats = [each() for each in self._stats]
        for field, (name, text) in _GAUGES.items():
            values = [getattr(each, field) for each in stats]
            value = max(values) if field in _NOT_ADDED else sum(values)
            yield GaugeMetricFamily(f"nemotron3_{name}", text, value=value)
        for field, (name, text) in _COUNTERS.items():
            value = sum(getattr(each, field) for each in stats)
            yield CounterMetricFamily(f"nemotron3_{name}", text, value=value)
