"""Fair shares: who is next, and who may still come in. Pure, without clocks, threads or what is waited for.

Whatever asks the same task, or the same tasks together, is one flow. Flows share what computes, what decodes and the room to wait.
Who is next follows start-time fair queueing: each flow has a virtual time, the work done for it, and the flow that has had least is
next. A flow that comes back after a while begins where the others are: it has not saved anything up.

Source: Goyal, Vin & Cheng, Start-time Fair Queueing, SIGCOMM 1996; for room, Choudhury & Hahne, Dynamic Queue Length Thresholds,
INFOCOM 1996.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable

Flow = str
"""Names the questions that share one share; `flow_of` says how."""


def flow_of(tasks: Iterable[str]) -> Flow:
    """Returns the flow of what asks these tasks together, in whatever order they are named."""
    return "+".join(sorted(tasks))


MOST_FLOWS = 8192
"""Of more that are ahead nothing is remembered: names are made by strangers, and any number of sets of tasks can be asked."""


class VirtualTimes:
    """How much work has been done for each flow, in seconds or whatever work is counted in. Not thread-safe.

    Whoever uses it serves, of the flows that wait, the one whose time is the least, says so with `reach`, and charges each flow for what
    is done for it.

    Args:
        most_ahead: a flow that is so far ahead is not charged for more: what it had was work that nobody else wanted then, and whoever
            comes later must not wait for the difference.
    """

    def __init__(self, most_ahead: float) -> None:
        self._most_ahead = most_ahead
        self._now = 0.0
        self._ahead: dict[Flow, float] = {}
        self._look_at = 64

    def __len__(self) -> int:
        """How many flows are remembered: those that are ahead of the others, and some that were until lately."""
        return len(self._ahead)

    def of(self, flow: Flow) -> float:
        """Returns a flow's time: what was done for it, or where the others are if that is more."""
        return max(self._ahead.get(flow, 0.0), self._now)

    def reach(self, flow: Flow) -> None:
        """Notes that this flow is served, and that of those that wait its time is the least."""
        self._now = self.of(flow)
        if len(self._ahead) > self._look_at:
            self._ahead = {flow: time for flow, time in self._ahead.items() if time > self._now}
            self._look_at = 2 * len(self._ahead) + 64

    def charge(self, flow: Flow, work: float) -> None:
        """Notes that so much is done for a flow."""
        self._ahead[flow] = min(self.of(flow) + work, self._now + self._most_ahead)
        if len(self._ahead) > MOST_FLOWS:
            self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets who is ahead, as when nobody waits."""
        if self._ahead:
            self._now = max(self._now, *self._ahead.values())
            self._ahead.clear()


class FairLine:
    """Tickets in the order of their turns: the flow that has had least first, within it what is due first. Not thread-safe.

    The order of flows is a heap of bounds: a flow's time only grows, so an entry that is not true any more comes up too early, never
    too late, and is put right then.
    """

    __slots__ = ("_flows", "_num_tickets", "_order", "_times", "_waiting", "num_live")

    def __init__(self, waiting: Container[int], times: VirtualTimes) -> None:
        self._waiting = waiting
        self._times = times
        self._flows: dict[Flow, list[tuple[float, int]]] = {}
        self._order: list[tuple[float, float, int, Flow]] = []
        self.num_live = 0
        self._num_tickets = 0

    @property
    def size(self) -> int:
        """How much it remembers."""
        return self._num_tickets + len(self._order)

    def add(self, ticket: int, flow: Flow, due: float) -> None:
        """Puts what waits in line.

        Args:
            ticket: its number; of two that are due alike, the smaller one is first.
            flow: whose it is.
            due: when it should be served, on any scale.
        """
        tickets = self._flows.setdefault(flow, [])
        heapq.heappush(tickets, (due, ticket))
        self.num_live += 1
        self._num_tickets += 1
        if tickets[0][1] == ticket:
            heapq.heappush(self._order, (self._times.of(flow), due, ticket, flow))

    def first(self) -> int | None:
        """Returns the ticket whose turn it is; none if nothing waits."""
        while self._order:
            known = self._order[0]
            true = self._entry(known[3])
            if true is None:
                heapq.heappop(self._order)
            elif true == known:
                return true[2]
            else:
                heapq.heapreplace(self._order, true)
        return None

    def first_of(self, flow: Flow) -> int | None:
        """Returns the ticket of one flow whose turn it is."""
        entry = self._entry(flow)
        return None if entry is None else entry[2]

    def leave(self) -> None:
        """Notes that something of it waits no more, and forgets the tickets of such if they are many."""
        self.num_live -= 1
        if self.size <= 4 * self.num_live + 64:
            return
        for flow, tickets in list(self._flows.items()):
            tickets[:] = [entry for entry in tickets if entry[1] in self._waiting]
            heapq.heapify(tickets)
            if not tickets:
                del self._flows[flow]
        self._num_tickets = self.num_live
        self._order = [entry for flow in list(self._flows) if (entry := self._entry(flow)) is not None]
        heapq.heapify(self._order)

    def _entry(self, flow: Flow) -> tuple[float, float, int, Flow] | None:
        tickets = self._flows.get(flow)
        while tickets:
            due, ticket = tickets[0]
            if ticket in self._waiting:
                return self._times.of(flow), due, ticket, flow
            heapq.heappop(tickets)
            self._num_tickets -= 1
        self._flows.pop(flow, None)
        return None


class SharedRoom:
    """A bounded room that no flow can fill so that others find it full. Not thread-safe.

    A flow may hold at most `GREED` times what is free. One flow alone holds eight ninths at most, two that want all hold eight
    seventeenths each, and some is free always for whoever comes next.

    Args:
        size: of the room.
    """

    GREED = 8

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: dict[Flow, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        """How much is held."""
        return self._total

    def held_by(self, flow: Flow) -> int:
        """Returns how much a flow holds."""
        return self._held.get(flow, 0)

    def bound_of(self, flow: Flow) -> int:
        """Returns how much a flow may hold now, what it holds included."""
        free = max(0, self.size - self._total)
        return min(self.held_by(flow) + free, self.GREED * free)

    def has_room(self, flow: Flow, amount: int) -> bool:
        """Tells whether a flow may take more. What is larger than the room is let in when nobody else is there."""
        return not self._total or self.held_by(flow) + amount <= self.bound_of(flow)

    def take(self, flow: Flow, amount: int) -> None:
        """Takes some for a flow, whether or not there is room."""
        self._held[flow] = self.held_by(flow) + amount
        self._total += amount

    def give_back(self, flow: Flow, amount: int) -> None:
        """Gives back what was taken for a flow."""
        self._total -= amount
        left = self._held.pop(flow, 0) - amount
        if left:
            self._held[flow] = left
