"""Prometheus metrics, over HTTP where an address is given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine import SegmentStatistics
from server.errors import SettingsError
from server.reload import ReloadAttempt

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """What is counted. Names of tasks are no labels: a thousand tasks would make thousands of series.

    Args:
        statistics: the engine's counters, asked at each scrape.
    """

    def __init__(self, statistics: Callable[[], Iterable[SegmentStatistics]]) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._calls = prometheus_client.Counter(
            "munet_calls", "Calls answered, by method and gRPC status.", ["method", "status"], registry=self.registry
        )
        self._latency = prometheus_client.Histogram(
            "munet_call_seconds",
            "Time from parsed request to answer.",
            ["method"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._reloads = prometheus_client.Counter(
            "munet_reloads", "Tries to serve another generation, by outcome.", ["outcome"], registry=self.registry
        )
        self._rereads = prometheus_client.Counter(
            "munet_rereads",
            "Changed files of tokens or certificates read again, by outcome.",
            ["what", "outcome"],
            registry=self.registry,
        )
        self._generation = prometheus_client.Gauge(
            "munet_generation", "Number of the generation that answers.", registry=self.registry
        )
        self._tasks = prometheus_client.Gauge("munet_tasks", "Tasks that are served.", registry=self.registry)
        self.registry.register(_SegmentCollector(statistics))

    def count_call(self, method: str, status: str, seconds: float) -> None:
        """Counts a call.

        Args:
            method: such as `InferenceService/Classify`.
            status: name of its gRPC status.
            seconds: how long it took.
        """
        self._calls.labels(method, status).inc()
        self._latency.labels(method).observe(seconds)

    def count_reload(self, attempt: ReloadAttempt) -> None:
        """Counts a try to serve another generation."""
        self._reloads.labels("refused" if attempt.error else "served").inc()

    def count_reread(self, what: str, was_whole: bool) -> None:
        """Counts a further reading of files that had changed.

        Args:
            what: `tokens` or `certificates`.
            was_whole: whether they are used now; if not, what was read before goes on.
        """
        self._rereads.labels(what, "used" if was_whole else "refused").inc()

    def set_generation(self, number: int, num_tasks: int) -> None:
        """Notes which generation answers."""
        self._generation.set(number)
        self._tasks.set(num_tasks)


class _SegmentCollector(Collector):
    """The engine's counters as Prometheus sees them."""

    def __init__(self, statistics: Callable[[], Iterable[SegmentStatistics]]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        requested = CounterMetricFamily("munet_segment_rows_requested", "Rows that tasks asked for.", labels=["segment"])
        computed = CounterMetricFamily("munet_segment_rows_computed", "Rows that ran.", labels=["segment"])
        executions = CounterMetricFamily("munet_segment_executions", "Batches that ran.", labels=["segment"])
        for segment in self._statistics():
            requested.add_metric([segment.name], segment.rows_requested)
            computed.add_metric([segment.name], segment.rows_computed)
            executions.add_metric([segment.name], segment.executions)
        yield from (requested, computed, executions)


class MetricsEndpoint:
    """Serves metrics over HTTP from a thread of its own.

    Args:
        metrics: what to serve.
        address: HOST:PORT; port 0 for any free one.

    Raises:
        SettingsError: the address cannot be listened on.
    """

    def __init__(self, metrics: Metrics, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            server, thread = prometheus_client.start_http_server(int(port), host.strip("[]"), metrics.registry)
        except OSError as error:
            raise SettingsError("metrics_listen", address, f"an address to listen on ({error})") from error
        self._server = server
        self._thread: threading.Thread = thread
        self.address = f"{host}:{server.server_port}"

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
