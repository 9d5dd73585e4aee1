"""Sessions within a limit of memory: `Residency` says which, threads of their own load them, and workers never wait for a load.

Rows that come to a segment which is not in memory are put aside; once it is there, they go where all rows go.
"""

from __future__ import annotations

import collections
import heapq
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence

from server.embedded.batches import Cargo
from server.embedded.memory import MemoryStatistics, SegmentMemory, count_tasks, resident_bytes
from server.embedded.residency import Load, Residency
from server.embedded.scheduler import Rows
from server.embedded.sessions import SegmentSession
from server.errors import Finding, GenerationRefusedError, SegmentUnavailableError
from server.generation import Generation, Segment
from server.questions import OpenQuestion, Settlement, settle_all

_log = logging.getLogger(__name__)

NUM_LOADERS = 2
"""Threads that load: a large segment on its way does not hold up a small one."""

LONGEST_WAIT_SECONDS = 3600.0
"""Deadlines come from strangers, and Python refuses to wait for thousands of years."""


class LimitedMemory(SegmentMemory):
    """Segments in memory within a limit, others on demand. Whoever calls holds the engine's lock, unless a method says otherwise.

    Each load reads the file anew and compares its checksum: what answers is what was verified.

    Args:
        device: of the sessions.
        lock: the engine's.
        limit_bytes: what the segments in memory may take.
        clock: seconds that only go forward.
        on_ready: called, with the lock, with rows that were put aside and may run now.
        on_failure: called, with the lock, with the numbers of questions and the segment that they need and cannot have; returns what
            completes their futures.
    """

    def __init__(
        self,
        device: str,
        lock: threading.Lock,
        limit_bytes: int,
        clock: Callable[[], float],
        on_ready: Callable[[Sequence[Rows[Cargo]]], None],
        on_failure: Callable[[Sequence[int], str], list[Settlement]],
    ) -> None:
        super().__init__(device, lock)
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._residency = Residency(limit_bytes)
        self._num_tasks: dict[Generation, collections.Counter[str]] = {}
        self._aside: dict[str, dict[int, list[Rows[Cargo]]]] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._most_deadlines = 64
        self._wanted = threading.Condition(lock)
        self._loaders = [
            threading.Thread(target=self._run_loader, name=f"engine-loader-{index}", daemon=True) for index in range(NUM_LOADERS)
        ]
        for loader in self._loaders:
            loader.start()

    def load(self, generation: Generation) -> None:
        """Opens and verifies each segment that is missing of a generation; it stays if there is room. See `SegmentMemory.load`."""
        check_limit(generation, self._limit_bytes)
        super().load(generation)
        num_tasks = count_tasks(generation)
        with self._lock:
            self._num_tasks[generation] = num_tasks
            self._share()

    def keep(self, generations: Collection[Generation]) -> None:
        """Says which generations are held. See `SegmentMemory.keep`."""
        if self._num_tasks.keys() - generations:
            self._num_tasks = {known: num_tasks for known, num_tasks in self._num_tasks.items() if known in generations}
            self._share()

    def drop(self, name: str) -> None:
        """Frees a segment that no open question needs."""
        super().drop(name)
        self._aside.pop(name, None)
        self._residency.remove(name)
        self._wake_loader()

    def need(self, opened: OpenQuestion) -> None:
        """Has what a question will run loaded before its rows come to it. See `SegmentMemory.need`."""
        now = self._clock()
        names = [branch.segment for branch in opened.tree.branches]
        for name in names:
            if self._residency.is_failing(name, now):
                raise SegmentUnavailableError(name)
        num_images = len(opened.question.images)
        self._residency.need(opened.number, opened.due_seconds, ((name, num_images) for name in names))
        self._wake_loader()

    def end(self, opened: OpenQuestion) -> None:
        """Says that a question is open no longer. See `SegmentMemory.end`."""
        names = {branch.segment for branch in opened.tree.branches}
        self._residency.end(opened.number, names)
        for name in names & self._aside.keys():
            self._aside[name].pop(opened.number, None)
            if not self._aside[name]:
                del self._aside[name]
        self._wake_loader()

    def put_aside(self, rows: Rows[Cargo]) -> bool:
        """Puts rows aside until their segment is in memory; returns False if it is there."""
        name = rows.lane.segment
        if name in self.sessions:
            return False
        opened = rows.payload.open_question
        self._aside.setdefault(name, {}).setdefault(opened.number, []).append(rows)
        if opened.question.deadline_seconds is not None:
            heapq.heappush(self._deadlines, (opened.question.deadline_seconds, opened.number))
            if len(self._deadlines) > self._most_deadlines:
                self._forget_deadlines()
        return True

    def expired(self, now_seconds: float) -> Sequence[int]:
        """Returns questions that had rows put aside and whose deadline has passed. See `SegmentMemory.expired`."""
        numbers = []
        while self._deadlines and self._deadlines[0][0] <= now_seconds:
            numbers.append(heapq.heappop(self._deadlines)[1])
        return numbers

    def seconds_to_deadline(self, now_seconds: float) -> float | None:
        """Returns after how long what was put aside may expire, an hour at most; none if nothing does."""
        return min(max(0.0, self._deadlines[0][0] - now_seconds), LONGEST_WAIT_SECONDS) if self._deadlines else None

    def enter(self, batch: Sequence[Rows[Cargo]]) -> SegmentSession | None:
        """Returns the session for a batch, or puts its rows aside. See `SegmentMemory.enter`."""
        name = batch[0].lane.segment
        session = self.sessions.get(name)
        if session is not None:
            self._residency.enter(name)
            return session
        for rows in batch:
            self.put_aside(rows)
        return None

    def leave(self, batch: Sequence[Rows[Cargo]]) -> None:
        """Says that a batch has run, well or not; without the lock."""
        name = batch[0].lane.segment
        with self._lock:
            now = self._clock()
            self._residency.leave(name)
            for rows in batch:
                self._residency.ran(rows.payload.open_question.number, rows.payload.branch.position, name, rows.count, now)
            self._wake_loader()

    def statistics(self) -> MemoryStatistics:
        """Returns what is in memory, and what came and went."""
        return MemoryStatistics(
            limit_bytes=self._limit_bytes,
            resident_bytes=self._residency.used_bytes,
            num_segments=len(self._segments),
            num_resident=len(self.sessions),
            num_loads=self._residency.num_loads,
            num_failures=self._residency.num_failures,
            num_evictions=self._residency.num_evictions,
        )

    def close(self) -> None:
        """Loads nothing any more."""
        super().close()
        self._wanted.notify_all()

    def join(self) -> None:
        """Waits until nothing is being loaded for questions; without the lock."""
        for loader in self._loaders:
            loader.join()

    def _share(self) -> None:
        # A canary may use by one task what all tasks use of the generation beside it.
        most: collections.Counter[str] = collections.Counter()
        for num_tasks in self._num_tasks.values():
            most |= num_tasks
        self._residency.share(most)

    def _forget_deadlines(self) -> None:
        """Forgets the deadlines of what is not aside any more: they may be far off."""
        aside = {number for of_segment in self._aside.values() for number in of_segment}
        self._deadlines = [entry for entry in self._deadlines if entry[1] in aside]
        heapq.heapify(self._deadlines)
        self._most_deadlines = 2 * len(self._deadlines) + 64

    def _has_room(self, name: str, num_tasks: int, load_seconds: float) -> bool:
        return self._residency.add(name, self._num_bytes[name], num_tasks, load_seconds)

    def _wake_loader(self) -> None:
        if self._residency.is_wanting:
            self._wanted.notify()

    def _run_loader(self) -> None:
        while True:
            with self._lock:
                load = self._residency.next_load()
                while load is None and not self._closed:
                    self._wanted.wait()
                    load = self._residency.next_load()
                if load is None or self._closed:
                    return
                segment = self._segments[load.name]
                evicted = [self.sessions.pop(name) for name in load.evicted]
                self._wake_loader()
            # Without the lock: ONNX Runtime takes a while to free a session.
            evicted.clear()
            self._load(load, segment)

    def _load(self, load: Load, segment: Segment) -> None:
        started = time.perf_counter()
        try:
            session = SegmentSession(segment, self._device, is_inspected=True)
        except Exception as error:
            # The edge of the thread: without its loaders the engine would answer less and less.
            _log.warning("segment %s could not be loaded again: %s", segment.name, error)
            with self._lock:
                self._residency.failed(load, self._clock())
                settlements = self._on_failure(self._residency.waiting_for(load.name), load.name)
                self._wake_loader()
            settle_all(settlements)
            return
        seconds = time.perf_counter() - started
        with self._lock:
            if self._residency.arrived(load, seconds):
                self.sessions[load.name] = session
                aside = self._aside.pop(load.name, {})
                self._on_ready([rows for of_question in aside.values() for rows in of_question])


def check_limit(generation: Generation, limit_bytes: int) -> None:
    """Checks that each task can be answered within a limit.

    Raises:
        GenerationRefusedError: the largest route is larger.
        SegmentLoadError: a segment has no file.
    """
    num_bytes = {name: resident_bytes(segment) for name, segment in generation.segments.items()}
    routes = {task.name: sum(num_bytes[name] for name in set(task.route)) for task in generation.tasks.values()}
    largest = max(routes, key=lambda name: routes[name], default="")
    if largest and routes[largest] > limit_bytes:
        expected = f"at least {routes[largest]}, the size of the segments of task {largest!r}"
        advice = "serve with a larger --memory-limit"
        raise GenerationRefusedError(
            generation.number, [Finding("engine.memory_limit_bytes", f"{limit_bytes} bytes", expected, advice)]
        )
