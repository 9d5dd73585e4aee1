"""Who is let in: by what waits before it, what it costs and when it must be done. Pure: what it knows it has been told.

| a question that | is refused with |
|---|---|
| is past its deadline | `DeadlineError` |
| takes longer than its deadline leaves, even if nothing else ran | `DeadlineError` |
| would be late because of what waits before it | `OverloadedError`, with when to try again |
| finds the room for waiting rows full, or its flow's share of it | `OverloadedError`, with when to try again |
| finds nothing else open, and is not past its deadline | nothing |

Before a question waits what its own flow has open, and of each other flow as much as that and itself: flows take turns
(`server.fairness`). Costs that are not known count as nothing. Where nothing is open a question is tried whatever is predicted, so
that a wrong prediction is found out.
"""

from __future__ import annotations

import dataclasses

from server.errors import DeadlineError, OverloadedError
from server.fairness import Flow, SharedRoom

WAITED_SHARE = 0.75
"""Of the time that a question can wait, how much the predicted wait may take. Without a margin every question that is let in under overload
would be done just about at its deadline, half of them after it, and those would have been computed for nothing."""

LEAST_RETRY_SECONDS = 0.05
MOST_RETRY_SECONDS = 5.0
"""Bounds of what callers are told to wait: below, their calls would be the load; above, nobody can foresee anything."""


@dataclasses.dataclass(frozen=True, slots=True)
class Forecast:
    """What a question is predicted to cost; 0 where nothing is known.

    Attributes:
        work_seconds: computing, of all workers together.
        alone_seconds: how long it takes if nothing else runs.
    """

    work_seconds: float = 0.0
    alone_seconds: float = 0.0


UNKNOWN = Forecast()


class Admission:
    """What is open and how much work is left of it. Not thread-safe.

    Args:
        max_rows: rows of open questions.
        num_workers: that share the work.
    """

    def __init__(self, max_rows: int, num_workers: int) -> None:
        self._num_workers = num_workers
        self._room = SharedRoom(max_rows)
        self._seconds: dict[Flow, float] = {}

    @property
    def num_rows(self) -> int:
        """Rows of open questions."""
        return self._room.total

    def work_seconds(self, flow: Flow | None = None) -> float:
        """Returns the work left of a flow's open questions, or of all."""
        return sum(self._seconds.values()) if flow is None else self._seconds.get(flow, 0.0)

    def check(self, flow: Flow, num_rows: int, forecast: Forecast, left_seconds: float | None) -> None:
        """Checks whether a question can be let in now.

        Args:
            flow: its flow.
            num_rows: that it takes.
            forecast: what it costs.
            left_seconds: until its deadline; none if it has none.

        Raises:
            DeadlineError: the deadline cannot be met.
            OverloadedError: it could be, or there could be room for it, at another time.
        """
        if left_seconds is not None and left_seconds <= 0:
            raise DeadlineError
        if not self._room.total:
            return
        if left_seconds is not None:
            self._check_time(flow, forecast, left_seconds)
        if not self._room.has_room(flow, num_rows):
            self._refuse(flow, num_rows)

    def enter(self, flow: Flow, num_rows: int, work_seconds: float) -> None:
        """Lets a question in."""
        self._room.take(flow, num_rows)
        self._seconds[flow] = self._seconds.get(flow, 0.0) + work_seconds

    def done(self, flow: Flow, work_seconds: float) -> None:
        """Notes that some of a flow's work is done, or will not be."""
        left = self._seconds.get(flow, 0.0) - work_seconds
        # What is left of sums and differences of fractions is no work.
        if left > 1e-9 and self._room.held_by(flow):
            self._seconds[flow] = left
        else:
            self._seconds.pop(flow, None)

    def leave(self, flow: Flow, num_rows: int, work_seconds: float) -> None:
        """Lets a question out.

        Args:
            flow: its flow.
            num_rows: that it took, all of them.
            work_seconds: that are left of it.
        """
        self._room.give_back(flow, num_rows)
        self.done(flow, work_seconds)

    def _check_time(self, flow: Flow, forecast: Forecast, left_seconds: float) -> None:
        spare_seconds = left_seconds - forecast.alone_seconds
        if spare_seconds < 0:
            raise DeadlineError(left_seconds, forecast.alone_seconds)
        own = self._seconds.get(flow, 0.0)
        turn = own + forecast.work_seconds
        ahead = own + sum(min(turn, work) for other, work in self._seconds.items() if other != flow)
        wait_seconds = ahead / self._num_workers
        if wait_seconds > WAITED_SHARE * spare_seconds:
            most_seconds = WAITED_SHARE * spare_seconds
            raise OverloadedError(
                "seconds of work ahead of this question",
                round(wait_seconds, 3),
                round(most_seconds, 3),
                bounded(wait_seconds - most_seconds),
            )

    def _refuse(self, flow: Flow, num_rows: int) -> None:
        held, total, size = self._room.held_by(flow), self._room.total, self._room.size
        retry_seconds = bounded(self.work_seconds() / self._num_workers * min(1.0, num_rows / total))
        if total + num_rows > size:
            raise OverloadedError("rows of open questions", total, size, retry_seconds)
        raise OverloadedError("rows of open questions to the same task", held, self._room.bound_of(flow), retry_seconds)


def bounded(seconds: float) -> float:
    """Returns what a caller is told to wait."""
    return min(MOST_RETRY_SECONDS, max(LEAST_RETRY_SECONDS, seconds))
