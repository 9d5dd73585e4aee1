"""How large batches should be on this machine, measured on a generation's own largest segment, for those who ask for it.

Docs/decisions/0023 says what it brings, and why threads and workers are not chosen this way.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from server.config import EngineSettings
from server.embedded.sessions import SegmentSession
from server.generation import Generation, Segment

_log = logging.getLogger(__name__)

BUDGET_SECONDS = 0.8
"""What measuring may take, but for a first batch of one row."""

LEAST_GAIN = 0.03
"""A size that needs not even so much less time for a row than the rule's is within what a machine varies by."""

NUM_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """What was measured.

    Attributes:
        segment: the name of the segment.
        row_bytes: what a row of it counts by `max_batch_bytes`.
        seconds: for a row, by the rows of a batch.
    """

    segment: str
    row_bytes: int
    seconds: Mapping[int, float]


def with_measured_batches(
    settings: EngineSettings, generation: Generation, sessions: Mapping[str, SegmentSession]
) -> EngineSettings:
    """Returns settings with the greatest batch by size that suits this machine and a generation.

    Args:
        settings: as told.
        generation: what is to be answered.
        sessions: of some of its segments; others are opened for the while.

    Raises:
        SegmentLoadError: one of them cannot be.
        Exception: whatever ONNX Runtime raises; its errors share no other class.
    """
    measured = measure(settings, generation, sessions)
    if measured is None:
        return settings
    rule = settings.max_rows(measured.row_bytes)
    rows = choose_rows(measured.seconds, rule)
    times = ", ".join(f"{count}: {1000 * seconds:.3g}" for count, seconds in sorted(measured.seconds.items()))
    _log.info(
        "batches of %d rows of %d bytes; segment %s took ms a row by rows in a batch: %s; the rule says %d",
        *(rows, measured.row_bytes, measured.segment, times, rule),
    )
    return settings if rows == rule else settings.model_copy(update={"max_batch_bytes": rows * measured.row_bytes})


def choose_rows(seconds: Mapping[int, float], rule: int) -> int:
    """Returns how many rows a batch should have.

    Args:
        seconds: for a row, by rows in a batch.
        rule: what it would have without measuring.
    """
    known = [count for count in seconds if count <= rule]
    if not known:
        return rule
    by_rule, least = seconds[max(known)], min(seconds.values())
    if least > by_rule * (1 - LEAST_GAIN):
        return rule
    # Smaller ones answer sooner: the smallest of those that are as good.
    return min(count for count, took in seconds.items() if took <= least * (1 + LEAST_GAIN / 3))


def measure(settings: EngineSettings, generation: Generation, sessions: Mapping[str, SegmentSession]) -> Measured | None:
    """Times batches of the segment with the most weights, as many at once as there are workers.

    Returns:
        What was measured; None if there is nothing to measure, or on a GPU, where a larger batch never costs more for each row.
    """
    if settings.device != "cpu" or not generation.tasks:
        return None
    largest = max(generation.segments.values(), key=lambda segment: segment.num_parameters)
    task = next(task for task in generation.tasks.values() if largest.name in task.route)
    rows: npt.NDArray[Any] = np.zeros((1, task.image_size, task.image_size, 3), np.uint8)
    session = _session(largest, sessions)
    for name in task.route[: task.route.index(largest.name)]:
        rows = _session(generation.segments[name], sessions).run(rows)
    row_bytes = max(rows.nbytes, largest.output.known_bytes)
    most = min(largest.max_batch_size, settings.max_batch_rows)
    sizes = [count for count in NUM_ROWS if count <= most]
    return Measured(largest.name, row_bytes, _time(session, rows, sizes, settings))


def _session(segment: Segment, sessions: Mapping[str, SegmentSession]) -> SegmentSession:
    return sessions.get(segment.name) or SegmentSession(segment)


def _time(session: SegmentSession, row: npt.NDArray[Any], sizes: Sequence[int], settings: EngineSettings) -> dict[int, float]:
    # A worker's own time says what its batch cost it, whatever else this machine does; with a pool, others compute for it.
    clock = time.thread_time if settings.num_threads == 1 else time.perf_counter

    def run(rows: npt.NDArray[Any]) -> float:
        started = clock()
        session.run(rows)
        return (clock() - started) / len(rows)

    times: dict[int, list[float]] = {count: [] for count in sizes}
    workers = settings.num_workers
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        session.run(row)
        ends = time.perf_counter() + BUDGET_SECONDS
        ran = True
        while ran:
            ran = False
            least = min((min(took) for took in times.values() if took), default=0.0)
            for count, took in times.items():
                if time.perf_counter() + count * least < ends:
                    batch = np.repeat(row, count, axis=0)
                    took.append(sum(pool.map(run, [batch] * workers)) / workers)
                    ran = True
    # What was timed once may be an accident.
    return {count: min(took) for count, took in times.items() if len(took) > 1}
