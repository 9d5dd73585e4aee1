"""What each task was asked and how it went, whichever front door asked."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(slots=True)
class TaskCount:
    """How questions to one task went.

    Attributes:
        num_answered: questions answered.
        num_failed: questions that failed after the task was found; those whose callers left are among them.
        num_images: images in the questions answered.
        answered_ns: time that the answered ones took, together, in nanoseconds.
        failed_ns: time that the failed ones took.
        last_ms: when the last one was answered, in milliseconds since 1970; 0 if none was.
    """

    num_answered: int = 0
    num_failed: int = 0
    num_images: int = 0
    answered_ns: int = 0
    failed_ns: int = 0
    last_ms: int = 0


class TaskCounts:
    """Counts by task name, since the server started. For one event loop."""

    def __init__(self) -> None:
        self._counts: dict[str, TaskCount] = collections.defaultdict(TaskCount)

    @contextlib.contextmanager
    def counted(self, tasks: Iterable[str], num_images: int) -> Iterator[None]:
        """Counts the block as one question to each of these tasks: answered if it ends, failed if it raises."""
        started_ns = time.monotonic_ns()
        answered = False
        try:
            yield
            answered = True
        finally:
            took_ns = time.monotonic_ns() - started_ns
            for name in tasks:
                self._count(self._counts[name], answered, num_images, took_ns)

    def of(self, task: str) -> TaskCount:
        """Returns the counts of a task, all of them 0 if it was never asked."""
        return self._counts.get(task) or TaskCount()

    @staticmethod
    def _count(count: TaskCount, answered: bool, num_images: int, took_ns: int) -> None:
        if answered:
            count.num_answered += 1
            count.num_images += num_images
            count.answered_ns += took_ns
            count.last_ms = time.time_ns() // 1_000_000
        else:
            count.num_failed += 1
            count.failed_ns += took_ns
