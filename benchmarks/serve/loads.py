"""Putting load on something, and counting what it does with it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable

from benchmarks.serve.processes import Server


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast one side was.

    Attributes:
        per_second: what was counted.
        own_cpu: seconds of CPU time of this process for each.
        server_cpu: the same of the server's processes.
    """

    per_second: float
    own_cpu: float
    server_cpu: float


class Counter:
    """Counts what is done in some seconds, once everything is under way.

    From one completion to the first that is so many seconds later: a batch that is half done at either end spoils nothing, and a machine
    that stands still for a while makes the time longer instead of the count meaningless.

    Args:
        seconds: how long it counts, at least; half of that goes before.
        server: whose CPU time counts too.
    """

    def __init__(self, seconds: float, server: Server | None = None) -> None:
        self._seconds = seconds
        self._server = server
        self._begin = time.perf_counter() + seconds / 2
        self._num = 0
        self._first: tuple[float, float, float] | None = None
        self._last: tuple[float, float, float] | None = None
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether nothing counts any more."""
        return self._last is not None

    def count(self, num: int = 1) -> None:
        """Counts what was done just now."""
        with self._lock:
            now = time.perf_counter()
            if now < self._begin or self._last is not None:
                return
            if self._first is None:
                self._first = self._moment(now)
                return
            self._num += num
            if now >= self._first[0] + self._seconds:
                self._last = self._moment(now)

    @property
    def rate(self) -> Rate:
        """How fast that was, once it is over.

        Raises:
            RuntimeError: it is not over.
        """
        if self._first is None or self._last is None:
            raise RuntimeError("found a measurement under way, expected one that is over")
        wall, own, server = (last - first for last, first in zip(self._last, self._first, strict=True))
        return Rate(self._num / wall, own / self._num, server / self._num)

    def _moment(self, now: float) -> tuple[float, float, float]:
        """Returns the time and the CPU time of this process and the server's."""
        return now, time.process_time(), self._server.cpu_seconds() if self._server is not None else 0.0


def rate_of_threads(work: Callable[[], int], num_threads: int, seconds: float) -> Rate:
    """Returns how fast threads work that do nothing else; `work` says how much it did."""
    counter = Counter(seconds)

    def keep_working() -> None:
        while not counter.is_over:
            counter.count(work())

    threads = [threading.Thread(target=keep_working) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counter.rate


async def rate_of_requests(
    ask: Callable[[], Awaitable[object]], at_a_time: int, seconds: float, server: Server
) -> tuple[Rate, list[float]]:
    """Returns how fast a server answers with so many requests open, each begun as another ends, and how long each took, in seconds."""
    counter = Counter(seconds, server)
    latencies: list[float] = []

    async def keep_asking() -> None:
        while not counter.is_over:
            started = time.perf_counter()
            await ask()
            latencies.append(time.perf_counter() - started)
            counter.count()

    await asyncio.gather(*(keep_asking() for _ in range(at_a_time)))
    return counter.rate, latencies
