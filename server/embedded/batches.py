"""What the embedded engine's batches are made of: rows on their way through the tree of a question's routes, and what is noted of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import NamedTuple

from server.embedded.carriers import Values
from server.embedded.scheduler import Rows
from server.engine import SegmentDistributions, SegmentRun
from server.histogram import Histogram
from server.questions import Branch, OpenQuestion

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Trip(NamedTuple):
    """How rows have fared on their route so far.

    Attributes:
        since_seconds: since when they wait for the next segment, on the engine's clock.
        waited_seconds: how long they waited for those before.
        computed_seconds: how long those ran.
    """

    since_seconds: float
    waited_seconds: float = 0.0
    computed_seconds: float = 0.0

    def after(self, started_seconds: float, ended_seconds: float) -> Trip:
        """Returns the trip behind the next segment, which ran from here to there."""
        waited_seconds = self.waited_seconds + started_seconds - self.since_seconds
        return Trip(ended_seconds, waited_seconds, self.computed_seconds + ended_seconds - started_seconds)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Cargo:
    """What rows in a queue carry.

    Attributes:
        open_question: whose rows.
        branch: where in its tree they are.
        values: [rows, ...], the input of the branch's segment.
        first_image: index of the image that `values[0]` belongs to.
        trip: how they have fared.
    """

    open_question: OpenQuestion
    branch: Branch
    values: Values
    first_image: int
    trip: Trip


def values_of(rows: Rows[Cargo]) -> Values:
    """Returns the input of some rows, [rows, ...]."""
    return rows.payload.values[rows.first : rows.first + rows.count]


class BatchRun(NamedTuple):
    """A batch that ran.

    Attributes:
        segment: name of the segment.
        batch: its rows.
        started_seconds: when it began, on the engine's clock.
        ended_seconds: when it had run.
        cost_seconds: what it takes where nobody holds it up.
    """

    segment: str
    batch: Sequence[Rows[Cargo]]
    started_seconds: float
    ended_seconds: float
    cost_seconds: float

    def tell(self) -> None:
        """Tells the questions that want to hear of it."""
        for rows in self.batch:
            on_run = rows.payload.open_question.question.on_run
            if on_run is not None:
                on_run(
                    SegmentRun(
                        segment=self.segment,
                        num_rows=rows.count,
                        batch_rows=sum(rows.count for rows in self.batch),
                        batch_questions=len({rows.claim.request for rows in self.batch}),
                        started_seconds=self.started_seconds,
                        ended_seconds=self.ended_seconds,
                        waited_seconds=self.started_seconds - rows.payload.trip.since_seconds,
                    )
                )


class _Shape(NamedTuple):
    """What one batch was like: seconds computed; rows, questions and tasks; seconds waited, each with the number of rows that did."""

    computed_seconds: float
    num_rows: int
    num_questions: int
    num_tasks: int
    waits: Sequence[tuple[float, int]]


class SegmentCounters:
    """Counts what a segment runs. What is exact, `count` counts under the engine's lock; what batches were like, `observe` notes outside of
    it, after their rows were answered.
    """

    NUM_SHAPES = 256
    """So many batches are put into histograms together: that takes a hundredth of the time for each."""

    def __init__(self) -> None:
        self.rows_requested = 0
        self.rows_computed = 0
        self.executions = 0
        self._lock = threading.Lock()
        self._shapes: list[_Shape] = []
        # Made when they are needed: of ten thousand segments most may never run.
        self._histograms: tuple[Histogram, ...] = ()

    def count(self, batch: Sequence[Rows[Cargo]]) -> None:
        """Counts a batch."""
        counted = [rows for rows in batch if rows.payload.open_question.question.counted]
        self.rows_requested += sum(rows.count * rows.payload.branch.num_tasks for rows in counted)
        self.rows_computed += sum(rows.count for rows in counted)
        self.executions += bool(counted)

    def observe(self, run: BatchRun) -> None:
        """Notes what a batch was like."""
        started_seconds = run.started_seconds
        computed_seconds = run.ended_seconds - started_seconds
        counted = [rows for rows in run.batch if rows.payload.open_question.question.counted]
        if not counted:
            return
        waits = [(started_seconds - rows.payload.trip.since_seconds, rows.count) for rows in counted]
        tasks: list[list[str]] = [rows.payload.branch.tasks for rows in counted]
        if len(counted) == 1:
            shape = _Shape(computed_seconds, counted[0].count, 1, len(tasks[0]), waits)
        else:
            num_questions = len({rows.claim.request for rows in counted})
            shape = _Shape(computed_seconds, sum(rows.count for rows in counted), num_questions, len(set().union(*tasks)), waits)
        with self._lock:
            self._shapes.append(shape)
            if len(self._shapes) >= self.NUM_SHAPES:
                self._fold()

    def distributions(self) -> SegmentDistributions | None:
        """Returns what batches were like; none before the first."""
        with self._lock:
            self._fold()
            return (
                SegmentDistributions(*(histogram.distribution() for histogram in self._histograms)) if self._histograms else None
            )

    def _fold(self) -> None:
        if not self._shapes:
            return
        if not self._histograms:
            self._histograms = tuple(map(Histogram, (_SECONDS, _SECONDS, _COUNTS, _COUNTS, _COUNTS)))
        queue, *others = self._histograms
        computed, rows, questions, tasks, waits = zip(*self._shapes, strict=True)
        waited, times = zip(*(wait for one in waits for wait in one), strict=True)
        queue.add_all(waited, times)
        for histogram, values in zip(others, (computed, rows, questions, tasks), strict=True):
            histogram.add_all(values)
        self._shapes = []
