"""Which rows run next: a pure function of what waits and the clock, without threads, arrays or ONNX Runtime.

Rows wait in lanes. A lane holds all that can run in one batch: rows for the same segment and of the same shape, whichever task, request,
generation or history they come from. Whose turn it is goes by flow (`server.fairness`): the flow for which least has been done is next, and
within a flow the row that is due first. The next batch comes from that row's lane, and is filled with rows of that lane by the same rule,
row by row; so one row of a quiet task is in the next batch, however many rows of others wait. A row is due at its deadline, but never later
than `patience` after its request arrived, so that nothing waits for ever behind others that are in a hurry.

As many batches run at once as there are workers. One more may run for a flow of which nothing runs, while all that runs is of flows
that have `MANY_TIMES` as many rows waiting: otherwise it would have to wait until a batch of a task that floods is through. A request
of it begins when it is its turn, and then goes on from segment to segment. And where larger batches cost no less by the row, as on a CPU,
batches are small while there is more than one flow.

A flow that has many rows waiting for each worker, while there are others, floods. Its batches are to give way to what else computes, and
its rows ride in a batch of others only if that takes hardly longer for it: its own callers wait for those before them anyway.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import math
import sys
from collections.abc import Callable
from typing import Generic, TypeVar

from server.fairness import FairLine, Flow, VirtualTimes

P = TypeVar("P")

MOST_AHEAD_SECONDS = 1.0
"""What a flow that filled up others' batches may have had more than others, in seconds of computing, before it counts no more."""


SHORT_BATCHES_SECONDS = 10.0
"""For so long after more than one flow was there batches are no larger than they need to be: who comes next waits for what runs."""

MANY_TIMES = 4
"""A flow that has so many times as many rows waiting as another floods beside it."""


class Priority(enum.Enum):
    """How what computes a batch competes with other threads.

    Attributes:
        USUAL: like any other.
        LOW: it gives way to those that do not.
    """

    USUAL = enum.auto()
    LOW = enum.auto()


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
class Claim:
    """What a request may expect.

    Attributes:
        request: its number.
        flow: whose share it uses.
        due_seconds: when its rows are due.
        deadline_seconds: when they are of no more use; infinite if never.
    """

    request: int
    flow: Flow
    due_seconds: float
    deadline_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Rows(Generic[P]):
    """Some consecutive rows of one request that wait for one segment.

    Attributes:
        claim: of the request.
        lane: where they wait.
        first: index of the first of them within the payload.
        count: how many they are; at least 1.
        payload: what the caller needs to run them.
        row_seconds: what one of them counts in fair shares; above 0.
        needs_seconds: how long the request takes from here if nothing else runs, as far as is known.
        enough_rows: in a batch of which more would hardly make it cheaper by the row; at least 1.
        free_rows: in a batch that takes hardly longer than with one alone; at least 1.
        has_begun: whether they come from another segment.
    """

    claim: Claim
    lane: Lane
    first: int
    count: int
    payload: P
    row_seconds: float = 1.0
    needs_seconds: float = 0.0
    enough_rows: int = sys.maxsize
    free_rows: int = sys.maxsize
    has_begun: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Decision(Generic[P]):
    """What to do next.

    Attributes:
        batch: rows to run together, all of one lane; empty if nothing waits, or nothing more may run at once.
        expired: requests whose deadline has passed or cannot be met any more, in the order found; all they had waiting is dropped.
    """

    batch: tuple[Rows[P], ...]
    expired: tuple[int, ...]

    @property
    def flows(self) -> frozenset[Flow]:
        """The flows of the batch."""
        return frozenset(rows.claim.flow for rows in self.batch)


class Scheduler(Generic[P]):
    """What waits, and what runs next. Not thread-safe.

    Args:
        num_workers: batches that run at once, but for the one more.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self._num_workers = num_workers
        self._times = VirtualTimes(MOST_AHEAD_SECONDS)
        self._waiting: dict[int, Rows[P]] = {}
        self._all = FairLine(self._waiting, self._times)
        self._lanes: dict[Lane, FairLine] = {}
        self._requests: dict[int, set[int]] = {}
        self._begun: dict[int, Rows[P]] = {}
        self._flows: collections.Counter[Flow] = collections.Counter()
        self._running: list[frozenset[Flow]] = []
        self._next_ticket = 0
        self._num_rows = 0
        self._last_flow: Flow | None = None
        self._mixed_until_seconds = -math.inf

    @property
    def num_rows(self) -> int:
        """How many rows wait."""
        return self._num_rows

    @property
    def num_tickets(self) -> int:
        """How much the scheduler remembers: grows with what waits, never with what has been."""
        return self._all.size + sum(line.size for line in self._lanes.values()) + len(self._times)

    def turn(self, now_seconds: float) -> Priority | None:
        """Returns how the batch would run whose turn it is; none if nothing waits, or nothing more may run at once.

        Args:
            now_seconds: the clock.
        """
        ticket = self._leader()
        return None if ticket is None else self._priority(self._waiting[ticket].claim.flow, now_seconds)

    def add(self, rows: Rows[P]) -> None:
        """Lets rows wait.

        Raises:
            ValueError: no rows, or a time that is no number, or rows that count nothing.
        """
        claim = rows.claim
        if rows.count < 1 or math.isnan(claim.due_seconds) or math.isnan(claim.deadline_seconds) or not rows.row_seconds > 0:
            raise ValueError(f"found {rows!r}, expected at least one row, times that are numbers and rows that count")
        if not self._num_rows and not self._running:
            self._times.begin_anew()
        ticket = self._next_ticket
        self._next_ticket += 1
        self._waiting[ticket] = rows
        if rows.has_begun:
            self._begun[ticket] = rows
        self._requests.setdefault(claim.request, set()).add(ticket)
        self._flows[claim.flow] += rows.count
        line = self._lanes.get(rows.lane)
        if line is None:
            line = self._lanes[rows.lane] = FairLine(self._waiting, self._times)
        line.add(ticket, claim.flow, claim.due_seconds)
        self._all.add(ticket, claim.flow, claim.due_seconds)
        self._num_rows += rows.count

    def drop(self, request: int) -> None:
        """Drops all that a request has waiting; a request that has nothing waiting is no error."""
        for ticket in self._requests.pop(request, ()):
            self._leave(ticket)

    def next_batch(self, now_seconds: float, priority: Priority | None = None) -> Decision[P]:
        """Takes the next batch out. What it returns runs until `finished` is told.

        Args:
            now_seconds: the clock.
            priority: of whoever asks: only a batch that is to run like that is taken. None stands for any.
        """
        expired: list[int] = []
        batch: tuple[Rows[P], ...] = ()
        leader = self._not_late(self._leader, now_seconds, expired)
        if leader is not None:
            rows = self._waiting[leader]
            flow = rows.claim.flow
            if priority in (None, self._priority(flow, now_seconds)):
                # What runs beside a full house is by itself, and its time may be above that of others.
                is_beside = len(self._running) >= self._num_workers
                if not is_beside:
                    self._times.reach(flow)
                room = min(rows.lane.max_rows, rows.enough_rows) if self._is_mixed(flow, now_seconds) else rows.lane.max_rows
                if self._is_new(flow):
                    self._mixed_until_seconds = now_seconds + SHORT_BATCHES_SECONDS
                self._last_flow = flow
                batch = self._fill(leader, room, is_beside, now_seconds, expired)
        decision = Decision(batch, tuple(expired))
        if batch:
            self._running.append(decision.flows)
        return decision

    def finished(self, flows: frozenset[Flow]) -> None:
        """Notes that a batch of these flows runs no more."""
        self._running.remove(flows)

    def _leader(self) -> int | None:
        """Returns the ticket whose turn it is; none if nothing waits, or nothing more may run."""
        if len(self._running) < self._num_workers:
            return self._all.first()
        if len(self._running) > self._num_workers:
            return None
        most = min(max(self._flows[flow] for flow in flows) for flows in self._running) / MANY_TIMES
        if most < 1:
            return None

        def is_able(ticket: int) -> bool:
            flow = self._waiting[ticket].claim.flow
            return self._flows[flow] <= most and all(flow not in flows for flows in self._running)

        ticket = self._all.first()
        if ticket is None or is_able(ticket):
            return ticket
        # What has begun goes on, whosever turn it is: otherwise a route would wait for the flood at each of its segments.
        begun = filter(is_able, self._begun)
        return min(begun, key=lambda ticket: (self._begun[ticket].claim.due_seconds, ticket), default=None)

    def _not_late(self, first: Callable[[], int | None], now_seconds: float, expired: list[int]) -> int | None:
        """Returns the ticket that is first; those that are too late are dropped on the way."""
        while (ticket := first()) is not None:
            rows = self._waiting[ticket]
            if not self._is_late(rows, now_seconds):
                return ticket
            expired.append(rows.claim.request)
            self.drop(rows.claim.request)
        return None

    def _is_late(self, rows: Rows[P], now_seconds: float) -> bool:
        left_seconds = rows.claim.deadline_seconds - now_seconds
        # What a prediction says is believed only if others have a use for the time: that is how a wrong one is found out.
        return left_seconds <= 0 or (left_seconds < rows.needs_seconds and len(self._requests) > 1)

    def _priority(self, flow: Flow, now_seconds: float) -> Priority:
        """Returns how a batch runs that this flow's turn begins: one of a flood gives way to others, unless all workers are busy."""
        is_beside = len(self._running) >= self._num_workers
        return Priority.LOW if not is_beside and self._is_many(flow) and self._is_mixed(flow, now_seconds) else Priority.USUAL

    def _is_many(self, flow: Flow) -> bool:
        """Tells whether a flow floods if there are others."""
        return self._flows[flow] >= MANY_TIMES * self._num_workers

    def _is_mixed(self, flow: Flow, now_seconds: float) -> bool:
        """Tells whether more than one flow is there, or was lately, if it is this one's turn."""
        return self._is_new(flow) or now_seconds < self._mixed_until_seconds

    def _is_new(self, flow: Flow) -> bool:
        """Tells whether it is another flow's turn than last time, or will be."""
        return len(self._flows) > 1 or self._last_flow not in (None, flow)

    def _fill(self, leader: int, room: int, is_alone: bool, now_seconds: float, expired: list[int]) -> tuple[Rows[P], ...]:
        """Takes a batch of so many rows at most out of the leader's lane; of its flow alone if it says so."""
        taken: dict[int, Rows[P]] = {}
        num_taken = 0
        flow, free_rows = self._waiting[leader].claim.flow, self._waiting[leader].free_rows
        carries_many = self._is_many(flow)
        line = self._lanes[self._waiting[leader].lane]
        first = functools.partial(line.first_of, flow) if is_alone else line.first
        while num_taken < room and (ticket := self._not_late(first, now_seconds, expired)) is not None:
            rows = self._waiting[ticket]
            if num_taken >= free_rows and rows.claim.flow != flow and self._is_many(rows.claim.flow) and not carries_many:
                break
            # Row by row: after each of them it may be another flow's turn.
            is_whole = is_alone or line.num_live == 1 or len(self._flows) == 1
            count = min(room - num_taken, rows.count) if is_whole else 1
            num_taken += count
            self._times.charge(rows.claim.flow, count * rows.row_seconds)
            before = taken.get(ticket)
            if before is not None:
                taken[ticket] = dataclasses.replace(before, count=before.count + count)
            else:
                taken[ticket] = rows if count == rows.count else dataclasses.replace(rows, count=count)
            self._take(ticket, rows, count)
        # Of a request that turned out too late after some of its rows were taken nothing is to be computed.
        return tuple(rows for rows in taken.values() if rows.claim.request not in expired)

    def _take(self, ticket: int, rows: Rows[P], count: int) -> None:
        """Takes some of these rows; the rest keeps its place."""
        if rows.count > count:
            self._waiting[ticket] = dataclasses.replace(rows, first=rows.first + count, count=rows.count - count)
            self._num_rows -= count
            self._flows[rows.claim.flow] -= count
            return
        of_request = self._requests[rows.claim.request]
        of_request.remove(ticket)
        if not of_request:
            del self._requests[rows.claim.request]
        self._leave(ticket)

    def _leave(self, ticket: int) -> None:
        rows = self._waiting.pop(ticket)
        self._begun.pop(ticket, None)
        self._num_rows -= rows.count
        flow = rows.claim.flow
        self._flows[flow] -= rows.count
        if not self._flows[flow]:
            del self._flows[flow]
        self._all.leave()
        line = self._lanes[rows.lane]
        line.leave()
        if not line.num_live:
            del self._lanes[rows.lane]
