from __future__ import annotations

import datetime as dt

import pytest
from prometheus_client import generate_latest

from server.engine import SegmentStatistics
from server.errors import SettingsError
from server.metrics import Metrics, MetricsEndpoint
from server.reload import ReloadAttempt


def test_what_is_counted() -> None:
    metrics = Metrics(lambda: [SegmentStatistics("seg-a", 5, 3, 2)])
    metrics.count_call("InferenceService/Classify", "OK", 0.02)
    metrics.count_reload(ReloadAttempt(2, dt.datetime.now(dt.UTC), 0.1, "bad"))
    metrics.set_generation(1, 4)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'munet_calls_total{method="InferenceService/Classify",status="OK"} 1.0',
        'munet_call_seconds_bucket{le="0.025",method="InferenceService/Classify"} 1.0',
        'munet_reloads_total{outcome="refused"} 1.0',
        "munet_generation 1.0",
        "munet_tasks 4.0",
        'munet_segment_rows_requested_total{segment="seg-a"} 5.0',
        'munet_segment_rows_computed_total{segment="seg-a"} 3.0',
        'munet_segment_executions_total{segment="seg-a"} 2.0',
    ):
        assert line in text


def test_an_address_in_use_is_refused() -> None:
    metrics = Metrics(list)
    endpoint = MetricsEndpoint(metrics, "127.0.0.1:0")
    with pytest.raises(SettingsError, match="metrics_listen"):
        MetricsEndpoint(metrics, endpoint.address)
    endpoint.close()
