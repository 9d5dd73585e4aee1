"""What a server did between two looks at its status: rates, latencies, batches, sharing. Pure; `server.top` shows it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from server.histogram import Distribution
from server.results import SegmentCounters, ServerStatus, TaskCounters

_NOTHING = Distribution((), (0,), 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class TaskRates:
    """What a task was asked.

    Attributes:
        name: the task's.
        requests_per_second: answered.
        images_per_second: in them.
        failures_per_second: failed after the task was found.
        latency_p50_seconds, latency_p99_seconds: of the answered ones; none if there were none.
        queue_p50_seconds: how long they waited on their route; none also where a Triton computes.
        compute_p50_seconds: how long they were computed there.
    """

    name: str
    requests_per_second: float
    images_per_second: float
    failures_per_second: float
    latency_p50_seconds: float | None
    latency_p99_seconds: float | None
    queue_p50_seconds: float | None
    compute_p50_seconds: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentRates:
    """What a segment ran.

    Attributes:
        name: the segment's.
        num_tasks: tasks whose route uses it now.
        rows_per_second: that ran.
        saved_share: of the rows that tasks asked for, what was computed once for several, 0 to 1; none if they asked for none.
        batches_per_second: that ran.
        busy: seconds of computing a second; more than 1 where batches run side by side. None where that is not known, as what follows.
        batch_rows, batch_requests, batch_tasks: means over batches.
        queue_p99_seconds: how long rows waited for it.
        compute_p50_seconds: how long batches ran.
    """

    name: str
    num_tasks: int
    rows_per_second: float
    saved_share: float | None
    batches_per_second: float
    busy: float | None
    batch_rows: float | None
    batch_requests: float | None
    batch_tasks: float | None
    queue_p99_seconds: float | None
    compute_p50_seconds: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """What a server did in some time.

    Attributes:
        seconds: how long that was.
        generation: that answers now.
        num_tasks: that it has.
        engine: what computes.
        uptime_seconds: of the server.
        refused: why the last reload was refused; empty if it was not.
        tasks: those that were asked, most requests first.
        segments: those that ran, busiest first.
    """

    seconds: float
    generation: int
    num_tasks: int
    engine: str
    uptime_seconds: float
    refused: str
    tasks: tuple[TaskRates, ...]
    segments: tuple[SegmentRates, ...]

    @property
    def requests_per_second(self) -> float:
        """Answered by all tasks; a request to several tasks counts for each."""
        return sum(task.requests_per_second for task in self.tasks)


def rates_between(earlier: ServerStatus | None, later: ServerStatus) -> Rates:
    """Returns what a server did between two statuses, asked with details.

    Args:
        earlier: none means the server's start, as does the status of another process at the same address.
        later: what it says now.
    """
    if earlier is None or earlier.started != later.started:
        seconds = later.uptime_seconds
        tasks_before: Mapping[str, TaskCounters] = {}
        segments_before: Mapping[str, SegmentCounters] = {}
    else:
        seconds = later.uptime_seconds - earlier.uptime_seconds
        tasks_before = {task.name: task for task in earlier.tasks}
        segments_before = {segment.name: segment for segment in earlier.segments}
    seconds = max(seconds, 1e-3)
    tasks = [_task_rates(tasks_before.get(task.name), task, seconds) for task in later.tasks]
    segments = [_segment_rates(segments_before.get(segment.name), segment, seconds) for segment in later.segments]
    last = later.last_reload
    return Rates(
        seconds=seconds,
        generation=later.generation,
        num_tasks=later.num_tasks,
        engine=later.engine,
        uptime_seconds=later.uptime_seconds,
        refused=last.error if last is not None else "",
        tasks=tuple(
            sorted(
                (task for task in tasks if task.requests_per_second or task.failures_per_second),
                key=lambda task: (-task.requests_per_second, -task.failures_per_second, task.name),
            )
        ),
        segments=tuple(
            sorted(
                (segment for segment in segments if segment.rows_per_second),
                key=lambda segment: (-(segment.busy or 0.0), -segment.rows_per_second, segment.name),
            )
        ),
    )


def _task_rates(before: TaskCounters | None, now: TaskCounters, seconds: float) -> TaskRates:
    # A task that was taken out and came back counts from 0 again.
    if before is not None and before.answered > now.answered:
        before = None
    latency = now.latency.since(before.latency if before else None)
    queue = now.queue.since(before.queue if before else None)
    compute = now.compute.since(before.compute if before else None)
    failed = sum(now.failed.values()) - (sum(before.failed.values()) if before else 0)
    return TaskRates(
        name=now.name,
        requests_per_second=(now.answered - (before.answered if before else 0)) / seconds,
        images_per_second=(now.images - (before.images if before else 0)) / seconds,
        failures_per_second=max(0, failed) / seconds,
        latency_p50_seconds=_known(latency.quantile(0.5)),
        latency_p99_seconds=_known(latency.quantile(0.99)),
        queue_p50_seconds=_known(queue.quantile(0.5)),
        compute_p50_seconds=_known(compute.quantile(0.5)),
    )


def _segment_rates(before: SegmentCounters | None, now: SegmentCounters, seconds: float) -> SegmentRates:
    # A segment that was unloaded and came back counts from 0 again.
    if before is not None and before.rows_computed > now.rows_computed:
        before = None
    requested = now.rows_requested - (before.rows_requested if before else 0)
    computed = now.rows_computed - (before.rows_computed if before else 0)
    old = before.distributions if before is not None else None
    new = now.distributions

    def over(name: str) -> Distribution:
        if new is None:
            return _NOTHING
        distribution: Distribution = getattr(new, name)
        return distribution.since(getattr(old, name) if old is not None else None)

    compute = over("compute_seconds")
    return SegmentRates(
        name=now.name,
        num_tasks=len(now.tasks),
        rows_per_second=computed / seconds,
        saved_share=max(0, requested - computed) / requested if requested else None,
        batches_per_second=(now.executions - (before.executions if before else 0)) / seconds,
        busy=compute.sum / seconds if compute.count else None,
        batch_rows=_known(over("batch_rows").mean),
        batch_requests=_known(over("batch_questions").mean),
        batch_tasks=_known(over("batch_tasks").mean),
        queue_p99_seconds=_known(over("queue_seconds").quantile(0.99)),
        compute_p50_seconds=_known(compute.quantile(0.5)),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
