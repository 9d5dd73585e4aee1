"""Which rows run next: a pure function of what waits and the clock, without threads, arrays or ONNX Runtime.

Rows wait in lanes. A lane holds all that can run in one batch: rows for the same segment and of the same shape, whichever task, request,
generation or history they come from. The next batch comes from the lane of the row that is due first, and is filled with that lane's rows
in the order they are due. A row is due at its deadline, but never later than `patience` after its request arrived, so that nothing
waits for ever behind others that are in a hurry.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from typing import Generic, TypeVar

P = TypeVar("P")


@dataclasses.dataclass(frozen=True, slots=True)
class Lane:
    """What can run in one batch.

    Attributes:
        segment: name of the segment.
        shape: of one row.
        max_rows: in one batch, at most.
    """

    segment: str
    shape: tuple[int, ...]
    max_rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class Rows(Generic[P]):
    """Some consecutive rows of one request that wait for one segment.

    Attributes:
        request: number of the request.
        lane: where they wait.
        first: index of the first of them within the payload.
        count: how many they are; at least 1.
        due_seconds: when they are due.
        deadline_seconds: when they are of no more use; infinite if never.
        payload: what the caller needs to run them.
    """

    request: int
    lane: Lane
    first: int
    count: int
    due_seconds: float
    deadline_seconds: float
    payload: P


@dataclasses.dataclass(frozen=True, slots=True)
class Decision(Generic[P]):
    """What to do next.

    Attributes:
        batch: rows to run together, all of one lane; empty if nothing waits.
        expired: requests whose deadline has passed, in the order found; all they had waiting is dropped.
    """

    batch: tuple[Rows[P], ...]
    expired: tuple[int, ...]


class _Queue:
    """The tickets of one lane, due first first; those of dropped rows are passed over when they come up."""

    __slots__ = ("num_live", "tickets")

    def __init__(self) -> None:
        self.tickets: list[tuple[float, int]] = []
        self.num_live = 0


class Scheduler(Generic[P]):
    """What waits, and what runs next. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[int, Rows[P]] = {}
        self._requests: dict[int, set[int]] = {}
        self._lanes: dict[Lane, _Queue] = {}
        self._order: list[tuple[float, int]] = []
        self._next_ticket = 0
        self._num_rows = 0

    @property
    def num_rows(self) -> int:
        """How many rows wait."""
        return self._num_rows

    @property
    def num_tickets(self) -> int:
        """How much the scheduler remembers: grows with what waits, never with what has been."""
        return len(self._order) + sum(len(queue.tickets) for queue in self._lanes.values())

    def add(self, rows: Rows[P]) -> None:
        """Lets rows wait.

        Raises:
            ValueError: no rows, or a due time that is no number.
        """
        if rows.count < 1 or math.isnan(rows.due_seconds) or math.isnan(rows.deadline_seconds):
            raise ValueError(f"found {rows!r}, expected at least one row and times that are numbers")
        ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting[ticket] = rows
        self._requests.setdefault(rows.request, set()).add(ticket)
        queue = self._lanes.setdefault(rows.lane, _Queue())
        heapq.heappush(queue.tickets, (rows.due_seconds, ticket))
        queue.num_live += 1
        heapq.heappush(self._order, (rows.due_seconds, ticket))
        self._num_rows += rows.count

    def drop(self, request: int) -> None:
        """Drops all that a request has waiting; a request that has nothing waiting is no error."""
        for ticket in self._requests.pop(request, ()):
            rows = self._waiting.pop(ticket)
            self._num_rows -= rows.count
            self._leave_lane(rows.lane)
        self._forget_dead_tickets()

    def next_batch(self, now_seconds: float) -> Decision[P]:
        """Takes the next batch out.

        Args:
            now_seconds: the clock.
        """
        expired: list[int] = []
        batch: list[Rows[P]] = []
        lane = self._first_lane(now_seconds, expired)
        if lane is not None:
            room = lane.max_rows
            tickets = self._lanes[lane].tickets
            while room and tickets:
                ticket = tickets[0][1]
                rows = self._waiting.get(ticket)
                if rows is None:
                    heapq.heappop(tickets)
                elif rows.deadline_seconds <= now_seconds:
                    self._expire(rows.request, expired)
                else:
                    taken = self._take(ticket, rows, room)
                    batch.append(taken)
                    room -= taken.count
        self._forget_dead_tickets()
        return Decision(tuple(batch), tuple(expired))

    def _first_lane(self, now_seconds: float, expired: list[int]) -> Lane | None:
        while self._order:
            rows = self._waiting.get(self._order[0][1])
            if rows is None:
                heapq.heappop(self._order)
            elif rows.deadline_seconds <= now_seconds:
                self._expire(rows.request, expired)
            else:
                return rows.lane
        return None

    def _expire(self, request: int, expired: list[int]) -> None:
        expired.append(request)
        for ticket in self._requests.pop(request):
            rows = self._waiting.pop(ticket)
            self._num_rows -= rows.count
            self._leave_lane(rows.lane)

    def _take(self, ticket: int, rows: Rows[P], room: int) -> Rows[P]:
        """Takes as many of these rows as there is room for; the rest keeps its place."""
        if rows.count > room:
            self._waiting[ticket] = dataclasses.replace(rows, first=rows.first + room, count=rows.count - room)
            self._num_rows -= room
            return dataclasses.replace(rows, count=room)
        heapq.heappop(self._lanes[rows.lane].tickets)
        del self._waiting[ticket]
        of_request = self._requests[rows.request]
        of_request.remove(ticket)
        if not of_request:
            del self._requests[rows.request]
        self._num_rows -= rows.count
        self._leave_lane(rows.lane)
        return rows

    def _leave_lane(self, lane: Lane) -> None:
        queue = self._lanes[lane]
        queue.num_live -= 1
        if not queue.num_live:
            del self._lanes[lane]
        elif len(queue.tickets) > 2 * queue.num_live + 64:
            queue.tickets[:] = [entry for entry in queue.tickets if entry[1] in self._waiting]
            heapq.heapify(queue.tickets)

    def _forget_dead_tickets(self) -> None:
        if len(self._order) > 2 * len(self._waiting) + 64:
            self._order = [entry for entry in self._order if entry[1] in self._waiting]
            heapq.heapify(self._order)
