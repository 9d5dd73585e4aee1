"""Which segments are in memory: a pure function of what questions need, what has run and the clock, without threads or ONNX Runtime.

A segment is needed by the questions that have yet to run it. Needs have an order: that of the questions' due times and, within a question,
of its routes. The segment that is needed first is loaded first, and to make room for it others go: none that runs, and none that is needed
earlier. So whatever is due first gets what it needs, however little room there is, and nothing waits for ever behind what came later.

Which of them goes, in this order:

1. For a segment of one task, such as a head, others of one task. A shared one goes for it only when none of those is left; those that
   run now are waited for instead. For a shared segment, any goes.
2. One that no question needs now, before those that are needed, of which the one needed last goes.
3. The one that saves least: rows that it ran in the last minutes times the seconds that loading it takes, for each byte. This is
   compared in powers of two, since clocks and counts are noisy.
4. Of those that save alike, the one that came last. Tasks that are asked in turn, more than there is room for, would otherwise push out
   whatever is asked next, and nothing would ever be found in memory.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

HALF_LIFE_SECONDS = 60.0
"""A row that ran so long ago counts half."""

RETRY_SECONDS = 1.0
"""A segment that could not be loaded is not tried again sooner."""

Need = tuple[float, int, int]
"""When a question's rows are due, its number, and the place of the segment in its routes: the smaller, the sooner."""


class Place(enum.Enum):
    """Where a segment is."""

    ABSENT = "absent"
    COMING = "coming"
    RESIDENT = "resident"


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """A segment to load. Room for it is kept until `Residency.arrived` or `failed`.

    Attributes:
        name: the segment's.
        number: counts what comes into memory.
        evicted: segments that are resident no longer, to be freed first.
    """

    name: str
    number: int
    evicted: tuple[str, ...]


@dataclasses.dataclass(slots=True, eq=False)
class _Pending:
    """What a question has yet to run of a segment at one place of its routes."""

    need: Need
    num_rows: int


@dataclasses.dataclass(slots=True, eq=False)
class _Segment:
    """What is known of a segment.

    Attributes:
        pending: what questions have yet to run of it, by their numbers and the places in their routes.
        queued: its best entry in the queue of what to load.
        saves: what keeping it saves, as a power of two.
    """

    name: str
    num_bytes: int
    num_tasks: int
    load_seconds: float
    place: Place = Place.ABSENT
    load_number: int = 0
    num_running: int = 0
    num_rows: float = 0.0
    counted_seconds: float = 0.0
    saves: float = -math.inf
    retry_seconds: float = -math.inf
    pending: dict[int, dict[int, _Pending]] = dataclasses.field(default_factory=dict)
    queued: Need | None = None

    @property
    def is_shared(self) -> bool:
        return self.num_tasks > 1

    def first_need(self) -> Need | None:
        return min((pending.need for places in self.pending.values() for pending in places.values()), default=None)

    def count_rows(self, num_rows: int, now_seconds: float) -> None:
        age = max(0.0, now_seconds - self.counted_seconds)
        self.num_rows = self.num_rows * 0.5 ** (age / HALF_LIFE_SECONDS) + num_rows
        self.counted_seconds = now_seconds
        # What all of them lose with time is added up instead: so the order stays as it is between two rows.
        self.saves = math.floor(math.log2(self.num_rows * self.load_seconds / self.num_bytes) + now_seconds / HALF_LIFE_SECONDS)


class Residency:
    """What is in memory, and what comes and goes next. Not thread-safe.

    Args:
        limit_bytes: what all resident segments may take.

    Attributes:
        limit_bytes: the same.
        num_loads: segments that questions had loaded.
        num_failures: loads that failed.
        num_evictions: segments that went to make room.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_loads = 0
        self.num_failures = 0
        self.num_evictions = 0
        self._segments: dict[str, _Segment] = {}
        self._used_bytes = 0
        self._numbers = itertools.count(1)
        self._queue: list[tuple[Need, str]] = []
        self._spare: list[tuple[float, int, str]] = []

    @property
    def used_bytes(self) -> int:
        """What resident and coming segments take."""
        return self._used_bytes

    @property
    def is_wanting(self) -> bool:
        """Whether something may be needed that is absent."""
        return bool(self._queue)

    def place(self, name: str) -> Place:
        """Returns where a segment is that is known."""
        return self._segments[name].place

    def add(self, name: str, num_bytes: int, num_tasks: int, load_seconds: float) -> bool:
        """Makes a segment known, resident if there is room without any other going.

        Args:
            name: the segment's.
            num_bytes: what it takes in memory; at least 1.
            num_tasks: tasks whose routes use it.
            load_seconds: how long loading it took.

        Returns:
            Whether it is resident.
        """
        segment = self._segments[name] = _Segment(name, num_bytes, num_tasks, load_seconds)
        if self._used_bytes + num_bytes > self.limit_bytes:
            return False
        self._start(segment)
        self._settle(segment)
        return True

    def share(self, num_tasks: Mapping[str, int]) -> None:
        """Says anew how many tasks use segments; those that are not known are passed over."""
        for name, count in num_tasks.items():
            if name in self._segments:
                self._segments[name].num_tasks = count
        self._list_spare()

    def remove(self, name: str) -> None:
        """Forgets a segment, which no open question needs."""
        segment = self._segments.pop(name)
        if segment.place is not Place.ABSENT:
            self._used_bytes -= segment.num_bytes

    def need(self, number: int, due_seconds: float, segments: Iterable[tuple[str, int]]) -> None:
        """Says what a question will run.

        Args:
            number: the question's.
            due_seconds: when its rows are due.
            segments: names and rows, in the order of its routes; a name may come several times.
        """
        for position, (name, num_rows) in enumerate(segments):
            segment = self._segments[name]
            need = (due_seconds, number, position)
            # Each place for itself: what has run at one of them and waits for others to run before the next makes room for those.
            segment.pending.setdefault(number, {})[position] = _Pending(need, num_rows)
            if segment.place is Place.ABSENT:
                self._enqueue(segment, need)

    def ran(self, number: int, position: int, name: str, num_rows: int, now_seconds: float) -> None:
        """Says that rows of a question have run, well or not, at a place of its routes as `need` counts them."""
        segment = self._segments.get(name)
        if segment is None:
            return
        saved = segment.saves
        segment.count_rows(num_rows, now_seconds)
        if segment.saves != saved:
            self._note_spare(segment)
        places = segment.pending.get(number)
        if places is not None and position in places:
            places[position].num_rows -= num_rows
            if places[position].num_rows <= 0:
                del places[position]
            if not places:
                del segment.pending[number]

    def end(self, number: int, names: Iterable[str]) -> None:
        """Says that a question is over, which needed these segments."""
        for name in names:
            segment = self._segments.get(name)
            if segment is not None:
                segment.pending.pop(number, None)

    def waiting_for(self, name: str) -> list[int]:
        """Returns the numbers of the questions that need a segment."""
        segment = self._segments.get(name)
        return list(segment.pending) if segment is not None else []

    def enter(self, name: str) -> None:
        """Says that a resident segment runs, once more at the same time."""
        self._segments[name].num_running += 1

    def leave(self, name: str) -> None:
        """Says that it runs no more, once."""
        segment = self._segments.get(name)
        if segment is not None:
            # A batch may outlive the segment that it ran on, and another of its name come meanwhile.
            segment.num_running = max(0, segment.num_running - 1)

    def next_load(self) -> Load | None:
        """Returns what to load now; none if nothing is needed that is absent, or what is needed first finds no room yet."""
        segment = self._first_absent()
        if segment is None:
            return None
        evicted = self._make_room(segment)
        if evicted is None:
            return None
        for victim in evicted:
            victim.place = Place.ABSENT
            self._used_bytes -= victim.num_bytes
            need = victim.first_need()
            if need is not None:
                self._enqueue(victim, need)
        self.num_evictions += len(evicted)
        self._start(segment)
        return Load(segment.name, segment.load_number, tuple(victim.name for victim in evicted))

    def arrived(self, load: Load, load_seconds: float) -> bool:
        """Says that a segment is loaded.

        Args:
            load: which.
            load_seconds: how long that took.

        Returns:
            Whether it is resident now. If not, it was forgotten meanwhile and is to be freed.
        """
        segment = self._coming(load)
        if segment is None:
            return False
        # The least of all times: others were spent waiting for a disk or a core.
        segment.load_seconds = min(segment.load_seconds, load_seconds)
        self._settle(segment)
        self.num_loads += 1
        return True

    def failed(self, load: Load, now_seconds: float) -> None:
        """Says that a segment could not be loaded: it is absent again, and for a while not tried again."""
        segment = self._coming(load)
        if segment is None:
            return
        segment.place = Place.ABSENT
        segment.retry_seconds = now_seconds + RETRY_SECONDS
        self._used_bytes -= segment.num_bytes
        self.num_failures += 1

    def is_failing(self, name: str, now_seconds: float) -> bool:
        """Whether a segment could not be loaded just now."""
        return now_seconds < self._segments[name].retry_seconds

    def _coming(self, load: Load) -> _Segment | None:
        segment = self._segments.get(load.name)
        return segment if segment is not None and (segment.place, segment.load_number) == (Place.COMING, load.number) else None

    def _start(self, segment: _Segment) -> None:
        segment.place = Place.COMING
        segment.load_number = next(self._numbers)
        self._used_bytes += segment.num_bytes

    def _settle(self, segment: _Segment) -> None:
        segment.place = Place.RESIDENT
        self._note_spare(segment)

    def _note_spare(self, segment: _Segment) -> None:
        """Puts a resident segment of one task where those that may go are found without looking at all of them."""
        if segment.place is Place.RESIDENT and not segment.is_shared:
            heapq.heappush(self._spare, (segment.saves, -segment.load_number, segment.name))
            if len(self._spare) > 2 * len(self._segments) + 64:
                self._list_spare()

    def _list_spare(self) -> None:
        self._spare.clear()
        for segment in self._segments.values():
            self._note_spare(segment)

    def _enqueue(self, segment: _Segment, need: Need) -> None:
        if segment.queued is None or need < segment.queued:
            segment.queued = need
            heapq.heappush(self._queue, (need, segment.name))

    def _first_absent(self) -> _Segment | None:
        while self._queue:
            need, name = self._queue[0]
            segment = self._segments.get(name)
            if segment is None or segment.queued != need:
                heapq.heappop(self._queue)
                continue
            first = segment.first_need() if segment.place is Place.ABSENT else None
            if first == need:
                return segment
            # The question that it was needed for is over; others may need it later.
            heapq.heappop(self._queue)
            segment.queued = None
            if first is not None:
                self._enqueue(segment, first)
        return None

    def _make_room(self, coming: _Segment) -> list[_Segment] | None:
        """Returns what goes for a segment; None if it has to wait until others have run."""
        missing = self._used_bytes + coming.num_bytes - self.limit_bytes
        victims: list[_Segment] = []
        if missing <= 0:
            return victims
        spare = None if coming.is_shared else self._take_spare(missing)
        if spare is not None:
            return spare
        for victim in sorted(self._candidates(coming), key=lambda segment: _order(segment, coming)):
            if victim.is_shared and not coming.is_shared and self._any_own_but(victims):
                break
            victims.append(victim)
            missing -= victim.num_bytes
            if missing <= 0:
                break
        else:
            return None
        return _only_needed(victims, missing) if missing <= 0 else None

    def _take_spare(self, missing: int) -> list[_Segment] | None:
        """Returns segments of one task each that nobody needs, in their order, if they are enough."""
        victims: list[_Segment] = []
        back: list[tuple[float, int, str]] = []
        while self._spare and missing > 0:
            entry = heapq.heappop(self._spare)
            segment = self._segments.get(entry[2])
            if segment is None or segment.place is not Place.RESIDENT or entry[:2] != (segment.saves, -segment.load_number):
                continue
            back.append(entry)
            if not segment.num_running and not segment.pending:
                victims.append(segment)
                missing -= segment.num_bytes
        # Entries of what goes are passed over next time.
        for entry in back:
            heapq.heappush(self._spare, entry)
        return _only_needed(victims, missing) if missing <= 0 else None

    def _candidates(self, coming: _Segment) -> Iterator[_Segment]:
        first = coming.first_need()
        for segment in self._segments.values():
            if segment.place is not Place.RESIDENT or segment.num_running:
                continue
            need = segment.first_need() if segment.pending else None
            if need is None or (first is not None and need > first):
                yield segment

    def _any_own_but(self, victims: list[_Segment]) -> bool:
        gone = set(map(id, victims))
        return any(
            not segment.is_shared and segment.place is not Place.ABSENT and id(segment) not in gone
            for segment in self._segments.values()
        )


def _only_needed(victims: list[_Segment], missing: int) -> list[_Segment]:
    """Leaves out what went before something large and is not needed for the room any more; `missing` is 0 or less."""
    needed = list(victims)
    for victim in victims[:-1]:
        if missing + victim.num_bytes <= 0:
            missing += victim.num_bytes
            needed.remove(victim)
    return needed


def _order(segment: _Segment, coming: _Segment) -> tuple[bool, bool, float, float, int]:
    """What goes first comes first."""
    need = segment.first_need()
    return (
        segment.is_shared and not coming.is_shared,
        need is not None,
        -need[0] if need is not None else 0.0,
        segment.saves,
        -segment.load_number,
    )
