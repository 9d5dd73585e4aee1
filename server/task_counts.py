"""What each task was asked and how it went, whichever front door asked."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator

from server.engine import RouteTimes
from server.errors import reason_of
from server.histogram import Histogram

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


def _new_histogram() -> Histogram:
    return Histogram(_SECONDS)


@dataclasses.dataclass(slots=True)
class TaskCount:
    """How questions to one task went.

    Attributes:
        num_answered: questions answered.
        num_images: images in the questions answered.
        failed: questions that failed after the task was found, by `server.errors.reason_of`.
        answered_ns: time that the answered ones took, together, in nanoseconds.
        failed_ns: time that the failed ones took.
        last_ms: when the last one was answered, in milliseconds since 1970; 0 if none was.
        latency: seconds that each answered question took.
        queue: seconds that it waited on its route of segments.
        compute: seconds that it was computed there. Neither is known where a Triton computes.
    """

    num_answered: int = 0
    num_images: int = 0
    failed: dict[str, int] = dataclasses.field(default_factory=dict)
    answered_ns: int = 0
    failed_ns: int = 0
    last_ms: int = 0
    latency: Histogram = dataclasses.field(default_factory=_new_histogram)
    queue: Histogram = dataclasses.field(default_factory=_new_histogram)
    compute: Histogram = dataclasses.field(default_factory=_new_histogram)

    @property
    def num_failed(self) -> int:
        """Questions that failed after the task was found; those whose callers left are among them."""
        return sum(self.failed.values())


class TaskCounts:
    """Counts by task name, since the server started or the task was last served anew. For one event loop; `items` for any thread."""

    def __init__(self) -> None:
        self._counts: dict[str, TaskCount] = collections.defaultdict(TaskCount)
        self._kept: frozenset[str] | None = None

    @contextlib.contextmanager
    def counted(self, tasks: Iterable[str], num_images: int) -> Iterator[RouteTimes]:
        """Counts the block as one question to each of these tasks: answered if it ends, failed if it raises.

        Yields:
            Where the block notes what the engine tells of the question.
        """
        started_ns = time.monotonic_ns()
        times = RouteTimes()
        reason = ""
        try:
            yield times
        except BaseException as error:
            reason = reason_of(error)
            raise
        finally:
            took_ns = time.monotonic_ns() - started_ns
            for name in tasks if self._kept is None else self._kept.intersection(tasks):
                self._count(self._counts[name], reason, num_images, took_ns, times.of(name))

    def of(self, task: str) -> TaskCount:
        """Returns the counts of a task, all of them 0 if it was never asked."""
        return self._counts.get(task) or TaskCount()

    def items(self) -> list[tuple[str, TaskCount]]:
        """Returns every task that was asked, with its counts, in ascending order of name."""
        # Sorting copies first, at once: another thread may be here while a task is asked for the first time.
        return sorted(self._counts.items(), key=lambda item: item[0])

    def keep(self, tasks: Collection[str]) -> None:
        """Forgets all tasks but these, and counts no others until it is called again."""
        self._kept = frozenset(tasks)
        for name in self._counts.keys() - self._kept:
            del self._counts[name]

    @staticmethod
    def _count(count: TaskCount, reason: str, num_images: int, took_ns: int, times: tuple[float, float] | None) -> None:
        if reason:
            count.failed[reason] = count.failed.get(reason, 0) + 1
            count.failed_ns += took_ns
            return
        count.num_answered += 1
        count.num_images += num_images
        count.answered_ns += took_ns
        count.last_ms = time.time_ns() // 1_000_000
        count.latency.add(took_ns / 1e9)
        if times is not None:
            count.queue.add(times[0])
            count.compute.add(times[1])
