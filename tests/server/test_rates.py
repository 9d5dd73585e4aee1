from __future__ import annotations

import dataclasses
import datetime as dt
import io

import pytest
import rich.console

from server.engine import SegmentDistributions
from server.histogram import Distribution
from server.rates import rates_between
from server.results import ReloadReport, SegmentCounters, ServerStatus, TaskCounters
from server.top import view

START = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)


def seconds(*counts: int) -> Distribution:
    return Distribution((0.01, 0.1), (*counts, 0), sum(counts) * 0.01)


def task(name: str, answered: int, failed: int = 0, latency: Distribution | None = None) -> TaskCounters:
    return TaskCounters(
        name, answered, 2 * answered, {"overloaded": failed}, latency or seconds(answered, 0), seconds(0, 0), seconds(0, 0)
    )


def segment(name: str, requested: int, computed: int, executions: int, *, busy: float = 0.0) -> SegmentCounters:
    rows = Distribution((1.0, 4.0), (0, executions, 0), float(computed))
    distributions = SegmentDistributions(
        seconds(computed, 0), dataclasses.replace(seconds(executions, 0), sum=busy), rows, rows, rows
    )
    return SegmentCounters(name, requested, computed, requested - computed, executions, ("a", "b"), 7, distributions)


def status(
    uptime: float, tasks: tuple[TaskCounters, ...], segments: tuple[SegmentCounters, ...] = (), *, started: dt.datetime = START
) -> ServerStatus:
    return ServerStatus(3, 5, started, uptime, None, segments, "embedded", "0.1.0", tasks=tasks)


def test_rates_are_over_the_time_between_two_looks() -> None:
    before = status(10.0, (task("a", 100), task("b", 7)), (segment("seg-a", 100, 50, 20, busy=1.0), segment("seg-idle", 4, 4, 4)))
    after = status(
        12.0,
        (task("a", 140, latency=seconds(100, 40)), task("b", 7), task("c", 2, failed=4)),
        (segment("seg-a", 180, 90, 40, busy=2.5), segment("seg-idle", 4, 4, 4)),
    )
    rates = rates_between(before, after)
    assert (rates.seconds, rates.requests_per_second) == (2.0, 21.0)
    assert [found.name for found in rates.tasks] == ["a", "c"]
    first, other = rates.tasks
    assert (first.requests_per_second, first.images_per_second, first.failures_per_second) == (20.0, 40.0, 0.0)
    # All of the answers since lie between 10 and 100 milliseconds.
    assert first.latency_p50_seconds == pytest.approx(0.055)
    assert first.queue_p50_seconds is None
    assert other.failures_per_second == 2.0
    (ran,) = rates.segments
    assert (ran.rows_per_second, ran.saved_share, ran.batches_per_second) == (20.0, 0.5, 10.0)
    assert (ran.busy, ran.batch_rows) == (0.75, 2.0)


def test_after_a_restart_everything_is_new() -> None:
    before = status(10.0, (task("a", 100),), (segment("seg-a", 9, 9, 9),))
    after = status(2.0, (task("a", 4),), (segment("seg-a", 2, 2, 2),), started=START + dt.timedelta(hours=1))
    assert rates_between(before, after) == rates_between(None, after)
    assert rates_between(None, after).tasks[0].requests_per_second == 2.0


def test_what_was_unloaded_and_came_back_counts_from_nothing() -> None:
    before = status(10.0, (task("a", 100),), (segment("seg-a", 90, 90, 90),))
    after = status(11.0, (task("a", 4),), (segment("seg-a", 8, 4, 2),))
    rates = rates_between(before, after)
    assert rates.tasks[0].requests_per_second == 4.0
    assert (rates.segments[0].rows_per_second, rates.segments[0].saved_share) == (4.0, 0.5)


def shown(found: ServerStatus, rows: int) -> str:
    out = io.StringIO()
    rich.console.Console(file=out, width=160).print(view(rates_between(None, found), rows))
    return out.getvalue()


def test_people_see_the_busiest() -> None:
    tasks = tuple(task(f"task-{index}", index) for index in range(1, 5))
    text = shown(status(1.0, tasks, (segment("seg-a", 4, 2, 1),)), 2)
    lines = text.splitlines()
    assert lines[0] == "generation 3, 5 tasks, embedded, up 1 s; 10.0 requests/s over 1.0 s"
    assert lines[2].split() == ["task-4", "4.0", "8.0", "0.0", "5.0", "9.9"]
    assert "task-2" not in text
    assert "and 2 tasks more" in text
    assert lines[-2].split()[:6] == ["seg-a", "2", "2.0", "50%", "1.0", "2.0"]


def test_people_see_that_a_reload_was_refused() -> None:
    last = ReloadReport(4, START, 0.1, "generation 4 is refused: [red]x[/red]")
    text = shown(dataclasses.replace(status(1.0, ()), last_reload=last), 2)
    assert "last reload refused: generation 4 is refused: [red]x[/red]" in text
