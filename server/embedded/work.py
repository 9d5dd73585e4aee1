"""What waits for the embedded engine's workers, and who of them takes it.

Workers come in three roles: those that compute like any other thread, and two that give way to them (`server.background`), one for the
batches that the scheduler says are a flood's, one for rehearsals, for which no caller waits. Each role is woken for what it may take, and
whoever finds that it is another's turn wakes that one. There are so many of each that a batch that may run never waits for a worker.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable

from server.embedded.batches import Cargo
from server.embedded.scheduler import Decision, Priority, Rows, Scheduler


class Role(enum.Enum):
    """Which batches a worker takes.

    Attributes:
        QUESTIONS: of questions, but those of a flood beside others.
        FLOODS: those.
        REHEARSALS: of rehearsals.
    """

    QUESTIONS = "questions"
    FLOODS = "floods"
    REHEARSALS = "rehearsals"

    @property
    def gives_way(self) -> bool:
        """Whether its threads have low priority."""
        return self is not Role.QUESTIONS


_ROLE_OF_PRIORITY = {Priority.USUAL: Role.QUESTIONS, Priority.LOW: Role.FLOODS}
_PRIORITY_OF_ROLE = {role: priority for priority, role in _ROLE_OF_PRIORITY.items()}


def roles(num_workers: int) -> list[Role]:
    """Returns the role of each worker of an engine that runs so many batches at once."""
    # One more of the first, for the batch that the scheduler lets run beside those of a flood.
    return [*[Role.QUESTIONS] * (num_workers + 1), *[Role.FLOODS] * num_workers, *[Role.REHEARSALS] * num_workers]


class Work:
    """Rows that wait. Whoever calls holds the engine's lock.

    Args:
        lock: the engine's.
        num_workers: batches that run at once, of questions and of rehearsals each.
        clock: seconds that only go forward.
    """

    def __init__(self, lock: threading.Lock, num_workers: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._questions: Scheduler[Cargo] = Scheduler(num_workers)
        self._rehearsals: Scheduler[Cargo] = Scheduler(num_workers)
        self._idle = {role: threading.Condition(lock) for role in Role}

    def add(self, rows: Rows[Cargo]) -> None:
        """Lets rows wait; `wake` comes after."""
        self._of(rows).add(rows)

    def drop(self, number: int) -> None:
        """Drops all that a question has waiting; `wake` comes after."""
        self._questions.drop(number)
        self._rehearsals.drop(number)

    def take(self, role: Role) -> Decision[Cargo]:
        """Takes a batch out for a worker, and who turned out to be too late. It runs until `finished` is told."""
        if role is Role.REHEARSALS:
            return self._rehearsals.next_batch(self._clock())
        return self._questions.next_batch(self._clock(), _PRIORITY_OF_ROLE[role])

    def finished(self, decision: Decision[Cargo]) -> None:
        """Notes that a batch that was taken, if it was one, runs no more."""
        if decision.batch:
            self._of(decision.batch[0]).finished(decision.flows)

    def wake(self) -> None:
        """Wakes a worker for whatever may run now."""
        now = self._clock()
        turn = self._questions.turn(now)
        if turn is not None:
            self._idle[_ROLE_OF_PRIORITY[turn]].notify()
        if self._rehearsals.turn(now) is not None:
            self._idle[Role.REHEARSALS].notify()

    def watch(self) -> None:
        """Wakes a worker, so that one knows of a deadline that is new."""
        self._idle[Role.QUESTIONS].notify()

    def wake_all(self) -> None:
        """Wakes all workers."""
        for idle in self._idle.values():
            idle.notify_all()

    def wait(self, role: Role, seconds: float | None) -> None:
        """Waits until there may be something for a worker, or so many seconds. It had better have looked before."""
        # Whoever was woken for what is another's turn by now passes it on.
        self.wake()
        self._idle[role].wait(seconds)

    def _of(self, rows: Rows[Cargo]) -> Scheduler[Cargo]:
        return self._questions if rows.payload.open_question.question.counted else self._rehearsals
