"""What the segments of one Triton ran, from what Triton itself counted.

Triton counts from a model's loading to its unloading or to its own end, and counts everybody's rows. Here counting goes on across restarts,
begins when this server began to use a segment, and leaves out what is not counted.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Iterable, Mapping

from server.questions import RouteTree
from server.triton.endpoint import ModelCounts

_NOTHING = ModelCounts(0, 0, 0)


@dataclasses.dataclass(slots=True)
class _Count:
    """Of one segment. `kept` is from its earlier lives, the rest of this one.

    `exempt` is what of `seen` does not count, `exempt_then` what did not when it was seen. `answered` are requests that Triton must have
    counted by now.
    """

    kept: tuple[int, int] = (0, 0)
    exempt: tuple[int, int] = (0, 0)
    exempt_then: tuple[int, int] = (0, 0)
    seen: ModelCounts = _NOTHING
    answered: int = 0

    @property
    def total(self) -> tuple[int, int]:
        rows = max(0, self.seen.rows - self.exempt[0])
        # Rows that do not count may have run together with rows that do: then their batch counts all the same.
        executions = max(int(rows > 0), self.seen.executions - self.exempt[1])
        return self.kept[0] + rows, self.kept[1] + executions

    def see(self, now: ModelCounts) -> bool:
        if now.requests < self.seen.requests:
            # Triton counts from 0 again. What it ran since it was seen last is lost, and with it what of that did not count.
            self.exempt = self.exempt_then
            self.kept, self.exempt, self.answered = self.total, (0, 0), 0
        self.seen, self.exempt_then = now, self.exempt
        return now.requests >= self.answered


class Counters:
    """Counts the segments of one Triton. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, _Count] = {}

    def begin(self, segments: Iterable[str], counts: Mapping[str, ModelCounts]) -> None:
        """Begins to count segments; those that are counted already go on.

        Args:
            segments: their names.
            counts: what Triton says of them now; what others had it run before does not count here.
        """
        with self._lock:
            for name in segments:
                if name not in self._counts:
                    before = counts.get(name, _NOTHING)
                    exempt = (before.rows, before.executions)
                    self._counts[name] = _Count(exempt=exempt, exempt_then=exempt, seen=before, answered=before.requests)

    def keep(self, segments: Collection[str]) -> None:
        """Forgets all segments but these."""
        with self._lock:
            self._counts = {name: count for name, count in self._counts.items() if name in segments}

    def answered(self, tree: RouteTree, rows: int, exempt_rows: int = 0) -> None:
        """Notes that rows ran together, in every place of a tree, for an answer that came.

        Args:
            tree: where they ran.
            rows: how many.
            exempt_rows: of these, so many do not count. If it is all of them, neither does their batch.
        """
        with self._lock:
            for branch in tree.branches:
                count = self._counts.get(branch.segment)
                if count is not None:
                    count.answered += 1
                    count.exempt = (count.exempt[0] + exempt_rows, count.exempt[1] + (exempt_rows == rows))

    def see(self, counts: Mapping[str, ModelCounts]) -> bool:
        """Takes in what Triton says now.

        Returns:
            Whether it has counted everything that it answered; it does so a moment after the answer.
        """
        with self._lock:
            whole = [count.see(counts.get(name, _NOTHING)) for name, count in self._counts.items()]
        return all(whole)

    def totals(self) -> dict[str, tuple[int, int]]:
        """Returns rows and executions that count, by segment."""
        with self._lock:
            return {name: count.total for name, count in self._counts.items()}
