from __future__ import annotations

import dataclasses
import datetime as dt

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.config import MetricsSettings
from server.embedded.memory import MemoryStatistics
from server.engine import SegmentDistributions, SegmentStatistics
from server.errors import SettingsError
from server.histogram import Distribution
from server.metrics import Metrics, MetricsEndpoint
from server.reload import ReloadAttempt
from server.task_counts import TaskCounts

DISTRIBUTION = Distribution((0.1, 2.0), (1, 2, 3), 8.5)


def segment(name: str, executions: int = 2) -> SegmentStatistics:
    return SegmentStatistics(name, 5, 3, executions, SegmentDistributions(*[DISTRIBUTION] * 5) if executions else None)


def attempt(number: int, error: str) -> ReloadAttempt:
    return ReloadAttempt(number, dt.datetime.now(dt.UTC), 0.1, error)


def ask(counts: TaskCounts, *tasks: str) -> None:
    with counts.counted(tasks, 2):
        pass


def test_what_is_counted() -> None:
    metrics = Metrics(lambda: [segment("seg-a"), segment("seg-never", 0)], TaskCounts(), MetricsSettings(), "embedded")
    metrics.count_call("InferenceService/Classify", "OK", 0.02)
    metrics.count_rejection("overloaded")
    metrics.count_reload(attempt(2, "bad"))
    metrics.set_generation(1, 4)
    metrics.watch("requests_in_flight", lambda: 7)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'munet_calls_total{method="InferenceService/Classify",status="OK"} 1.0',
        'munet_call_seconds_bucket{le="0.025",method="InferenceService/Classify"} 1.0',
        'munet_rejections_total{reason="overloaded"} 1.0',
        'munet_reloads_total{outcome="refused"} 1.0',
        'munet_reload_seconds_bucket{le="0.1",outcome="refused"} 1.0',
        "munet_generation_refused 2.0",
        "munet_generation 1.0",
        "munet_tasks 4.0",
        "munet_requests_in_flight 7.0",
        'munet_segment_rows_requested_total{segment="seg-a"} 5.0',
        'munet_segment_rows_computed_total{segment="seg-a"} 3.0',
        'munet_segment_rows_saved_total{segment="seg-a"} 2.0',
        'munet_segment_executions_total{segment="seg-a"} 2.0',
        'munet_segment_batch_tasks_bucket{le="2.0",segment="seg-a"} 3.0',
        'munet_segment_batch_tasks_bucket{le="+Inf",segment="seg-a"} 6.0',
        'munet_segment_batch_tasks_sum{segment="seg-a"} 8.5',
        "munet_segments_unlisted 0.0",
    ):
        assert line in text
    # What never ran has no series.
    assert "seg-never" not in text


@pytest.mark.parametrize(("attempts", "refused"), [([(2, "bad")], 2), ([(2, "bad"), (3, "")], 0), ([(0, "no CURRENT")], -1)])
def test_a_refused_generation_stands_until_another_serves(attempts: list[tuple[int, str]], refused: int) -> None:
    metrics = Metrics(list, TaskCounts(), MetricsSettings())
    for number, error in attempts:
        metrics.count_reload(attempt(number, error))
    assert metrics.registry.get_sample_value("munet_generation_refused") == refused


def test_a_canary_is_counted_apart_and_ends_no_refusal() -> None:
    metrics = Metrics(list, TaskCounts(), MetricsSettings())
    metrics.count_reload(attempt(2, "bad"))
    for error in ("", "bad"):
        metrics.count_reload(dataclasses.replace(attempt(3, error), is_canary=True))
    value = metrics.registry.get_sample_value
    assert value("munet_generation_refused") == 2
    assert [value("munet_reloads_total", {"outcome": outcome}) for outcome in ("canary_served", "canary_refused")] == [1, 1]


def listed(metrics: Metrics, name: str, label: str) -> list[str]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return sorted({sample.labels[label] for family in families for sample in family.samples if sample.name == name})


def test_so_many_tasks_have_series_and_keep_them() -> None:
    counts = TaskCounts()
    metrics = Metrics(list, counts, MetricsSettings(max_tasks=2))
    ask(counts, "c")
    assert listed(metrics, "munet_task_images_total", "task") == ["c"]
    ask(counts, "a", "b", "d")
    assert listed(metrics, "munet_task_images_total", "task") == ["a", "c"]
    assert metrics.registry.get_sample_value("munet_tasks_unlisted") == 2
    assert metrics.registry.get_sample_value("munet_task_requests_total", {"task": "c", "outcome": "answered"}) == 1
    # A task that is gone makes room.
    counts.keep({"c", "d"})
    assert listed(metrics, "munet_task_images_total", "task") == ["c", "d"]
    assert metrics.registry.get_sample_value("munet_tasks_unlisted") == 0


def test_so_many_segments_have_series() -> None:
    held = [segment("seg-a", 0), segment("seg-b"), segment("seg-c")]
    metrics = Metrics(lambda: held, TaskCounts(), MetricsSettings(max_segments=1))
    assert listed(metrics, "munet_segment_executions_total", "segment") == ["seg-b"]
    assert metrics.registry.get_sample_value("munet_segments_unlisted") == 1
    held[:] = [segment("seg-a"), segment("seg-b")]
    assert listed(metrics, "munet_segment_executions_total", "segment") == ["seg-b"]


def test_an_address_in_use_is_refused() -> None:
    metrics = Metrics(list, TaskCounts(), MetricsSettings())
    endpoint = MetricsEndpoint(metrics, "127.0.0.1:0")
    with pytest.raises(SettingsError, match="metrics_listen"):
        MetricsEndpoint(metrics, endpoint.address)
    endpoint.close()


def test_what_segments_take_of_memory_is_there_where_this_process_holds_them() -> None:
    held = MemoryStatistics(limit_bytes=None, resident_bytes=5, num_segments=4, num_resident=3, num_loads=2, num_evictions=1)
    scraped = generate_latest(Metrics(list, TaskCounts(), MetricsSettings(), memory=lambda: held).registry).decode()
    for line in (
        "munet_segments 4.0",
        "munet_segments_resident 3.0",
        "munet_segments_resident_bytes 5.0",
        "munet_segments_limit_bytes 0.0",
        "munet_segment_loads_total 2.0",
        "munet_segment_load_failures_total 0.0",
        "munet_segment_evictions_total 1.0",
    ):
        assert f"\n{line}\n" in scraped
    elsewhere = generate_latest(Metrics(list, TaskCounts(), MetricsSettings()).registry).decode()
    assert "\nmunet_segments_resident " not in elsewhere
