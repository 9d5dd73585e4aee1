"""The sessions that an engine runs its segments on, and what they take of memory: here all of them, for as long as they are held.

`server.embedded.limited_memory` has the other kind, which keeps to a limit.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Collection, Sequence

from server.embedded.batches import Cargo
from server.embedded.scheduler import Rows
from server.embedded.sessions import SegmentSession
from server.errors import EngineClosedError, SegmentLoadError
from server.generation import Generation, Segment
from server.questions import OpenQuestion

SESSION_BYTES = 96 * 1024
"""What a session of ONNX Runtime takes beside weights: docs/decisions/0023."""

WEIGHTS_FACTOR = 1.1
"""What its weights take, over the size of their file."""


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """What segments take of memory, and what came and went since the engine was made.

    Attributes:
        limit_bytes: what they may take; none without a limit.
        resident_bytes: what those take that are in memory or on their way there.
        num_segments: how many the engine answers with, in memory or not.
        num_resident: how many are in memory.
        num_loads: segments that were loaded because a question needed them.
        num_failures: loads that failed, beside those.
        num_evictions: segments that went to make room.
    """

    limit_bytes: int | None
    resident_bytes: int
    num_segments: int
    num_resident: int
    num_loads: int = 0
    num_failures: int = 0
    num_evictions: int = 0


def resident_bytes(segment: Segment) -> int:
    """Returns what a segment takes while it is in memory.

    Raises:
        SegmentLoadError: it has no file.
    """
    try:
        return round(segment.model.stat().st_size * WEIGHTS_FACTOR) + SESSION_BYTES
    except OSError as error:
        raise SegmentLoadError(segment.name, error.strerror or str(error)) from error


class SegmentMemory:
    """All segments in memory. Whoever calls holds the engine's lock, unless a method says otherwise.

    Args:
        device: of the sessions.
        lock: the engine's.

    Attributes:
        sessions: those in memory, by the segment's name.
    """

    def __init__(self, device: str, lock: threading.Lock) -> None:
        self.sessions: dict[str, SegmentSession] = {}
        self._device = device
        self._lock = lock
        self._segments: dict[str, Segment] = {}
        self._num_bytes: dict[str, int] = {}
        self._closed = False

    # Generations

    @property
    def names(self) -> frozenset[str]:
        """The segments that are held, in memory or not."""
        return frozenset(self._segments)

    def load(self, generation: Generation) -> None:
        """Loads and verifies what is missing of a generation; without the lock, one call at a time.

        If this raises, `drop` frees what it had loaded by then.

        Raises:
            SegmentLoadError: a segment cannot be loaded.
            GenerationRefusedError: a task's route is larger than the limit.
            EngineClosedError: the engine is closed.
        """
        num_tasks = count_tasks(generation)
        # What most tasks need comes first: room may end.
        for name in sorted(generation.segments, key=lambda name: -num_tasks[name]):
            if name not in self._segments:
                segment = generation.segments[name]
                started = time.perf_counter()
                session = SegmentSession(segment, self._device)
                self._take_in(session, resident_bytes(segment), num_tasks[name], time.perf_counter() - started)
                del session

    def drop(self, name: str) -> None:
        """Frees a segment that no open question needs."""
        del self._segments[name]
        del self._num_bytes[name]
        self.sessions.pop(name, None)

    def keep(self, generations: Collection[Generation]) -> None:
        """Says which generations are held or being loaded, after `drop` of what they do not use."""

    # Questions

    def need(self, opened: OpenQuestion) -> None:
        """Has what a question will run loaded before its rows come to it.

        Raises:
            SegmentUnavailableError: some of it could not be loaded just now.
        """

    def end(self, opened: OpenQuestion) -> None:
        """Says that a question is open no longer: it needs nothing any more, and what it had put aside is dropped."""

    def put_aside(self, rows: Rows[Cargo]) -> bool:
        """Puts rows aside until their segment is in memory; returns False if it is there."""
        return False

    def expired(self, now_seconds: float) -> Sequence[int]:
        """Returns the numbers of questions, open or not any more, which had rows put aside and whose deadline has passed."""
        return ()

    def seconds_to_deadline(self, now_seconds: float) -> float | None:
        """Returns after how long to ask `expired` again; none if nothing was put aside that may expire."""
        return None

    # Batches

    def enter(self, batch: Sequence[Rows[Cargo]]) -> SegmentSession | None:
        """Returns the session for a batch, which stays until `leave`; None if it went meanwhile, and then the rows are put aside."""
        return self.sessions[batch[0].lane.segment]

    def leave(self, batch: Sequence[Rows[Cargo]]) -> None:
        """Says that a batch has run, well or not; without the lock."""

    # The whole

    def statistics(self) -> MemoryStatistics:
        """Returns what is in memory, and what came and went."""
        return MemoryStatistics(None, sum(self._num_bytes.values()), len(self._segments), len(self.sessions))

    def close(self) -> None:
        """Loads nothing any more."""
        self._closed = True

    def join(self) -> None:
        """Waits until nothing is being loaded for questions; without the lock."""

    def _take_in(self, session: SegmentSession, num_bytes: int, num_tasks: int, load_seconds: float) -> None:
        with self._lock:
            if self._closed:
                raise EngineClosedError
            segment = session.segment
            self._segments[segment.name] = segment
            self._num_bytes[segment.name] = num_bytes
            if self._has_room(segment.name, num_tasks, load_seconds):
                self.sessions[segment.name] = session

    def _has_room(self, name: str, num_tasks: int, load_seconds: float) -> bool:
        """Whether a segment that was loaded with its generation stays in memory."""
        return True


def count_tasks(generation: Generation) -> collections.Counter[str]:
    """Returns how many tasks use each segment of a generation, by its name."""
    return collections.Counter(name for task in generation.tasks.values() for name in set(task.route))
