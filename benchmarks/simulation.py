"""What searches take on many devices: a discrete event simulation, with packs of children as its unit.

Pure: it knows no clock and no file; seconds are given and chance is passed in. What it has of the real thing (evolve.search,
evolve.training.workers):

- a generation's packs wait in one queue and go to whichever worker is free; the next generation is planned when all are back;
- the process that searches takes one result after another: it scores, stores and journals them; with a single worker it is that worker;
- a worker that dies loses the pack it was at, or, where workers share one fate, all of theirs; those packs run again first;
- opening and closing a search each hold a lock that all searches of a system share, first come, first served.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
import random
from collections.abc import Sequence

MOST_DEATHS = 10_000
"""So many deaths in a row without one pack finished: the simulation would not end."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """What trains the packs of one search.

    Attributes:
        speeds: of each worker, above 0; at 1 a pack takes the seconds that are given for it.
        mean_life_seconds: of a worker until it dies, exponentially distributed; infinite: it never does.
        restart_seconds: from a death until the worker takes packs again.
        one_fate: whether all workers of a search die when one does, as those of a process pool.
    """

    speeds: tuple[float, ...]
    mean_life_seconds: float = math.inf
    restart_seconds: float = 0.0
    one_fate: bool = False

    @staticmethod
    def alike(count: int) -> Workers:
        """Returns so many workers of speed 1 that never die."""
        return Workers((1.0,) * count)


@dataclasses.dataclass(frozen=True)
class Search:
    """One search and what it takes, in seconds.

    Attributes:
        generations: of each generation its packs, of each the seconds on a worker of speed 1.
        start: before it opens, such as starting processes and reading data.
        open: while it opens, holding the lock.
        read: after that, without it.
        plan: before each generation.
        handle: to take up the result of one pack.
        examine: after the last generation, on one worker of speed 1.
        close: while it closes, holding the lock.
    """

    generations: tuple[tuple[float, ...], ...]
    start: float = 0.0
    open: float = 0.0
    read: float = 0.0
    plan: float = 0.0
    handle: float = 0.0
    examine: float = 0.0
    close: float = 0.0

    @property
    def work(self) -> float:
        """Seconds of all packs and of the examination: what devices are there for."""
        return sum(map(sum, self.generations)) + self.examine


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a simulation gave, in seconds.

    Attributes:
        wall: from the first start to the last end.
        busy: of all workers together, at packs that were finished and at examinations.
        lost: of all workers together, at packs that deaths cut short.
        waited: of all searches together, for the lock.
        num_workers: in all.
        num_deaths: of workers; those that share a fate count as one.
    """

    wall: float
    busy: float
    lost: float
    waited: float
    num_workers: int
    num_deaths: int

    @property
    def efficiency(self) -> float:
        """Share of the workers' time that was of use."""
        return self.busy / (self.wall * self.num_workers) if self.wall else 1.0


def simulate(searches: Sequence[Search], slots: Sequence[Workers], chance: random.Random | None = None) -> Outcome:
    """Returns what it takes to run searches, each on the workers of one slot, in their order as slots become free.

    Args:
        searches: all that there are.
        slots: each runs one search at a time.
        chance: when workers die; needed only if they do.

    Raises:
        ValueError: workers die faster than packs end.
    """
    chance = chance or random.Random(0)
    crews = [_Crew(workers, chance) for workers in slots]
    waiting = collections.deque(searches)
    # Time, place in the order of requests, slot, and the search that wants the lock: to open, or to close.
    requests: list[tuple[float, int, int, Search, bool]] = []
    number = 0
    lock_free = waited = wall = 0.0

    def ask(at: float, slot: int, search: Search, *, closes: bool) -> None:
        nonlocal number
        heapq.heappush(requests, (at, number, slot, search, closes))
        number += 1

    for slot in range(len(slots)):
        if waiting:
            search = waiting.popleft()
            ask(search.start, slot, search, closes=False)
    while requests:
        at, _, slot, search, closes = heapq.heappop(requests)
        granted = max(at, lock_free)
        waited += granted - at
        lock_free = granted + (search.close if closes else search.open)
        if not closes:
            ask(crews[slot].run(search, lock_free + search.read), slot, search, closes=True)
            continue
        wall = max(wall, lock_free)
        if waiting:
            following = waiting.popleft()
            ask(lock_free + following.start, slot, following, closes=False)
    return Outcome(
        wall=wall,
        busy=sum(crew.busy for crew in crews),
        lost=sum(crew.lost for crew in crews),
        waited=waited,
        num_workers=sum(len(workers.speeds) for workers in slots),
        num_deaths=sum(crew.num_deaths for crew in crews),
    )


class _Crew:
    """The workers of one slot, from search to search."""

    def __init__(self, workers: Workers, chance: random.Random) -> None:
        self._workers = workers
        self._chance = chance
        self._deaths = [self._life() for _ in workers.speeds]
        self.busy = 0.0
        self.lost = 0.0
        self.num_deaths = 0

    def run(self, search: Search, now: float) -> float:
        """Runs a search that is open, and returns when it wants to close."""
        if len(self._deaths) == 1 and math.isinf(self._workers.mean_life_seconds):
            # Nothing happens beside anything else: the sum, without an event for each pack.
            trained = sum(map(sum, search.generations)) / self._workers.speeds[0]
            handled = search.handle * sum(map(len, search.generations))
            now += search.plan * len(search.generations) + trained + handled
            self.busy += trained
        else:
            for packs in search.generations:
                now = self._train(packs, search.handle, now + search.plan)
        self.busy += search.examine
        return now + search.examine

    def _train(self, packs: Sequence[float], handle: float, now: float) -> float:
        """Trains a generation, and returns when the last result was taken up."""
        waiting = collections.deque(packs)
        free = [now] * len(self._workers.speeds)
        # By worker: when it ends, when it began, the pack.
        running: dict[int, tuple[float, float, float]] = {}
        taken_up, deaths = now, 0
        while waiting or running:
            ends, worker = min(((end, index) for index, (end, _, _) in running.items()), default=(math.inf, 0))
            idle = (index for index in range(len(free)) if index not in running) if waiting else ()
            begins, following = min(((max(free[index], now), index) for index in idle), default=(math.inf, 0))
            dies = min(self._deaths)
            if dies < min(ends, begins):
                now = max(now, dies)
                deaths += 1
                if deaths > MOST_DEATHS:
                    raise ValueError(
                        f"found {MOST_DEATHS} deaths without one finished pack, expected shorter packs or longer lives"
                    )
                self._die(self._deaths.index(dies), dies, running, waiting, free)
            elif ends <= begins:
                now, deaths = ends, 0
                _, began, _ = running.pop(worker)
                self.busy += ends - began
                taken_up = max(taken_up, ends) + handle
                free[worker] = taken_up if len(free) == 1 else ends
            else:
                now = begins
                pack = waiting.popleft()
                running[following] = (begins + pack / self._workers.speeds[following], begins, pack)
        return taken_up

    def _die(
        self,
        worker: int,
        at: float,
        running: dict[int, tuple[float, float, float]],
        waiting: collections.deque[float],
        free: list[float],
    ) -> None:
        self.num_deaths += 1
        for index in range(len(free)) if self._workers.one_fate else (worker,):
            self._deaths[index] = at + self._workers.restart_seconds + self._life()
            free[index] = max(free[index], at + self._workers.restart_seconds)
            if index in running:
                _, began, pack = running.pop(index)
                self.lost += at - began
                waiting.appendleft(pack)

    def _life(self) -> float:
        mean = self._workers.mean_life_seconds
        return math.inf if math.isinf(mean) else self._chance.expovariate(1 / mean)
