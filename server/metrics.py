"""Prometheus metrics, over HTTP where an address is given. docs/operations.md describes each of them."""

from __future__ import annotations

import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

import munet
from server.config import MetricsSettings
from server.embedded.memory import MemoryStatistics
from server.engine import SegmentStatistics
from server.errors import SettingsError
from server.histogram import Distribution
from server.reload import ReloadAttempt
from server.task_counts import TaskCount, TaskCounts

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_RELOAD_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

Watched = Literal["requests_in_flight", "request_bytes_in_flight", "serving"]
"""Gauges that are read where they arise, at each scrape."""


class Metrics:
    """What is counted.

    Args:
        statistics: the engine's counters, asked at each scrape.
        counts: what tasks are asked.
        settings: how many tasks and segments have series of their own.
        engine: what computes, for people.
        memory: what the engine's segments take of memory, asked at each scrape; none where another process holds them.
    """

    def __init__(
        self,
        statistics: Callable[[], Iterable[SegmentStatistics]],
        counts: TaskCounts,
        settings: MetricsSettings,
        engine: str = "",
        memory: Callable[[], MemoryStatistics | None] = lambda: None,
    ) -> None:
        self.registry = registry = prometheus_client.CollectorRegistry()
        self._calls = prometheus_client.Counter(
            "munet_calls", "Calls answered, by method and gRPC status.", ["method", "status"], registry=registry
        )
        self._latency = prometheus_client.Histogram(
            "munet_call_seconds",
            "Time from parsed request to answer.",
            ["method"],
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self._rejections = prometheus_client.Counter(
            "munet_rejections", "Calls that got no answer, by reason.", ["reason"], registry=registry
        )
        self._reloads = prometheus_client.Counter(
            "munet_reloads", "Tries to serve another generation, by outcome.", ["outcome"], registry=registry
        )
        self._reload_seconds = prometheus_client.Histogram(
            "munet_reload_seconds",
            "Time from reading a generation to serving or refusing it, by outcome.",
            ["outcome"],
            buckets=_RELOAD_BUCKETS,
            registry=registry,
        )
        self._refused = prometheus_client.Gauge(
            "munet_generation_refused",
            "Number of the generation that was refused last, until another serves; 0 if none was, -1 if CURRENT names none.",
            registry=registry,
        )
        self._rereads = prometheus_client.Counter(
            "munet_rereads",
            "Changed files of tokens or certificates read again, by outcome.",
            ["what", "outcome"],
            registry=registry,
        )
        self._generation = prometheus_client.Gauge(
            "munet_generation", "Number of the generation that answers.", registry=registry
        )
        self._tasks = prometheus_client.Gauge("munet_tasks", "Tasks that are served.", registry=registry)
        self._watched: dict[Watched, prometheus_client.Gauge] = {
            "requests_in_flight": prometheus_client.Gauge(
                "munet_requests_in_flight", "Requests that are worked on or wait.", registry=registry
            ),
            "request_bytes_in_flight": prometheus_client.Gauge(
                "munet_request_bytes_in_flight", "Sum of their messages' sizes.", registry=registry
            ),
            "serving": prometheus_client.Gauge(
                "munet_serving", "1 while health says SERVING, 0 while it says NOT_SERVING.", registry=registry
            ),
        }
        prometheus_client.Info("munet_build", "Version and engine of the server.", registry=registry).info(
            {"version": munet.__version__, "engine": engine}
        )
        registry.register(_SegmentCollector(statistics, settings.max_segments))
        registry.register(_MemoryCollector(memory))
        registry.register(_TaskCollector(counts, settings.max_tasks))
        registry.register(_ThreadCollector())
        prometheus_client.ProcessCollector(registry=registry)
        prometheus_client.PlatformCollector(registry=registry)

    def count_call(self, method: str, status: str, seconds: float) -> None:
        """Counts a call.

        Args:
            method: such as `InferenceService/Classify`.
            status: name of its gRPC status.
            seconds: how long it took.
        """
        self._calls.labels(method, status).inc()
        self._latency.labels(method).observe(seconds)

    def count_rejection(self, reason: str) -> None:
        """Counts a call that got no answer, by `server.errors.reason_of`."""
        self._rejections.labels(reason).inc()

    def count_reload(self, attempt: ReloadAttempt) -> None:
        """Counts a try to serve another generation."""
        if attempt.is_canary:
            outcome = "canary_refused" if attempt.error else "canary_served"
        else:
            outcome = "refused" if attempt.error else "served"
            # CURRENT may be what cannot be read: that is no generation, and not 0 either.
            self._refused.set((attempt.number or -1) if attempt.error else 0)
        self._reloads.labels(outcome).inc()
        self._reload_seconds.labels(outcome).observe(attempt.duration_seconds)

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

    def watch(self, gauge: Watched, read: Callable[[], float]) -> None:
        """Has a gauge read at each scrape, in the thread that answers it."""
        self._watched[gauge].set_function(read)


class _Listed:
    """Which of many names have series of their own: the first to be asked for, as long as they are there.

    Nobody's counters ever begin to count somebody else's, as they would if the least busy were summed up.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: dict[str, None] = {}

    def update(self, names: Sequence[str]) -> set[str]:
        """Returns which of the names there are now are listed."""
        there = set(names)
        listed = {name: None for name in self._names if name in there}
        for name in names:
            if len(listed) >= self._limit:
                break
            listed[name] = None
        # Replaced whole: two may scrape at once.
        self._names = listed
        return set(listed)


class _SegmentCollector(Collector):
    """The engine's counters as Prometheus sees them."""

    def __init__(self, statistics: Callable[[], Iterable[SegmentStatistics]], max_segments: int) -> None:
        self._statistics = statistics
        self._listed = _Listed(max_segments)

    def collect(self) -> Iterator[Metric]:
        label = ["segment"]
        requested = CounterMetricFamily("munet_segment_rows_requested", "Rows that tasks asked for.", labels=label)
        computed = CounterMetricFamily("munet_segment_rows_computed", "Rows that ran.", labels=label)
        saved = CounterMetricFamily("munet_segment_rows_saved", "Rows computed once for several tasks.", labels=label)
        executions = CounterMetricFamily("munet_segment_executions", "Batches that ran.", labels=label)
        histograms = {
            "queue_seconds": _histogram("munet_segment_queue_seconds", "Time that each row waited for the segment.", label),
            "compute_seconds": _histogram("munet_segment_compute_seconds", "Time that each batch ran.", label),
            "batch_rows": _histogram("munet_segment_batch_rows", "Rows in each batch.", label),
            "batch_questions": _histogram("munet_segment_batch_requests", "Requests in each batch.", label),
            "batch_tasks": _histogram("munet_segment_batch_tasks", "Tasks that each batch was for.", label),
        }
        ran = [segment for segment in self._statistics() if segment.executions]
        listed = self._listed.update([segment.name for segment in ran])
        for segment in ran:
            if segment.name not in listed:
                continue
            requested.add_metric([segment.name], segment.rows_requested)
            computed.add_metric([segment.name], segment.rows_computed)
            saved.add_metric([segment.name], segment.rows_saved)
            executions.add_metric([segment.name], segment.executions)
            if segment.distributions is not None:
                for name, family in histograms.items():
                    _add(family, [segment.name], getattr(segment.distributions, name))
        yield from (requested, computed, saved, executions, *histograms.values())
        yield GaugeMetricFamily(
            "munet_segments_unlisted", "Segments that ran and have no series, see max_segments.", len(ran) - len(listed)
        )


class _TaskCollector(Collector):
    """What tasks were asked, as Prometheus sees it: of tasks that were asked, not of ten thousand that might be."""

    def __init__(self, counts: TaskCounts, max_tasks: int) -> None:
        self._counts = counts
        self._listed = _Listed(max_tasks)

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "munet_task_requests", "Requests to each task, answered or by the reason of failure.", labels=["task", "outcome"]
        )
        images = CounterMetricFamily("munet_task_images", "Images in the requests answered.", labels=["task"])
        histograms: dict[str, HistogramMetricFamily] = {
            "latency": _histogram("munet_task_seconds", "Time to answer a request, decoding included.", ["task"]),
            "queue": _histogram("munet_task_queue_seconds", "Time that a request waited on its route.", ["task"]),
            "compute": _histogram("munet_task_compute_seconds", "Time that a request was computed on its route.", ["task"]),
        }
        asked: list[tuple[str, TaskCount]] = self._counts.items()
        listed = self._listed.update([name for name, _ in asked])
        for name, count in asked:
            if name not in listed:
                continue
            requests.add_metric([name, "answered"], count.num_answered)
            for reason, number in list(count.failed.items()):
                requests.add_metric([name, reason], number)
            images.add_metric([name], count.num_images)
            for attribute, family in histograms.items():
                _add(family, [name], getattr(count, attribute).distribution())
        yield from (requests, images, *histograms.values())
        yield GaugeMetricFamily(
            "munet_tasks_unlisted", "Tasks that were asked and have no series, see max_tasks.", len(asked) - len(listed)
        )


class _MemoryCollector(Collector):
    """What segments take of memory, and what comes and goes under a limit."""

    _GAUGES: Sequence[tuple[str, str, Callable[[MemoryStatistics], int]]] = (
        ("munet_segments", "Segments that are answered with, in memory or not.", lambda held: held.num_segments),
        ("munet_segments_resident", "Segments in memory.", lambda held: held.num_resident),
        ("munet_segments_resident_bytes", "What these are counted to take.", lambda held: held.resident_bytes),
        ("munet_segments_limit_bytes", "What they may take; 0 without a limit.", lambda held: held.limit_bytes or 0),
    )
    _COUNTERS: Sequence[tuple[str, str, Callable[[MemoryStatistics], int]]] = (
        ("munet_segment_loads", "Segments loaded because a question needed them.", lambda held: held.num_loads),
        ("munet_segment_load_failures", "Loads that failed, beside those.", lambda held: held.num_failures),
        ("munet_segment_evictions", "Segments that went to make room.", lambda held: held.num_evictions),
    )

    def __init__(self, memory: Callable[[], MemoryStatistics | None]) -> None:
        self._memory = memory

    def collect(self) -> Iterator[Metric]:
        held = self._memory()
        for family, rows in ((GaugeMetricFamily, self._GAUGES), (CounterMetricFamily, self._COUNTERS)):
            for name, words, read in rows:
                yield family(name, words, value=None if held is None else read(held))


class _ThreadCollector(Collector):
    """All threads of the process, those of ONNX Runtime and gRPC too, under the name that other languages' clients give it."""

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("process_threads", "Number of OS threads in the process.")
        try:
            lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            lines = [f"Threads: {threading.active_count()}"]
        for line in lines:
            if line.startswith("Threads:"):
                family.add_metric([], int(line.split()[1]))
        yield family


def _histogram(name: str, documentation: str, labels: Sequence[str]) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, documentation, labels=labels)


def _add(family: HistogramMetricFamily, labels: Sequence[str], distribution: Distribution) -> None:
    total = 0
    buckets = []
    for bound, count in zip((*distribution.bounds, math.inf), distribution.counts, strict=True):
        total += count
        buckets.append(("+Inf" if math.isinf(bound) else str(float(bound)), total))
    family.add_metric(labels, buckets, distribution.sum)


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
