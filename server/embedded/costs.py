"""What batches cost, learnt from those that ran: a pure object, clock and observations in, predictions out.

A batch of a segment is taken to cost `a + b * rows` seconds, both at least 0, by least squares over the batches that ran, each
counting less than the one after it. What has not been seen costs nothing, so that predictions refuse nobody for want of knowledge;
and what has not been seen for a while is believed less and less, so that no wrong prediction can keep from running what would
prove it wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from server.admission import Forecast
from server.questions import Branch, RouteTree

MEMORY_BATCHES = 16
"""An observation counts half as much after about so many more of the same kind."""

HALF_LIFE_SECONDS = 10.0
"""What has not been seen for so long is believed half."""

MOST_SURPRISE = 4.0
"""An observation counts as at most so many times what was expected: a machine that stood still for a moment says nothing of a segment."""

HARDLY_CHEAPER = 1.1
"""A batch is large enough if a row of it costs no more than so many times what it costs in the largest batch."""

HARDLY_LONGER = 1.1
"""Further rows in a batch are free as long as it takes no more than so many times what it takes with one."""

_KEPT = 0.5 ** (1 / MEMORY_BATCHES)


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """Batches that cost alike.

    Attributes:
        segment: name of the segment.
        image_size: of the images that the rows come from, in pixels; it says how many tokens a row has.
    """

    segment: str
    image_size: int


class _Fit:
    """Sums over the batches of one kind, and the line through them."""

    __slots__ = ("fixed", "is_line", "per_row", "rows", "rows_squared", "rows_times_seconds", "seconds", "seen_seconds", "weight")

    def __init__(self) -> None:
        self.weight = self.rows = self.seconds = self.rows_squared = self.rows_times_seconds = 0.0
        self.fixed = self.per_row = self.seen_seconds = 0.0
        self.is_line = False

    def observe(self, rows: int, seconds: float) -> None:
        expected = self.fixed + self.per_row * rows
        if self.weight > 1 and expected > 0:
            seconds = min(seconds, MOST_SURPRISE * expected)
        self.weight = _KEPT * self.weight + 1
        self.rows = _KEPT * self.rows + rows
        self.seconds = _KEPT * self.seconds + seconds
        self.rows_squared = _KEPT * self.rows_squared + rows * rows
        self.rows_times_seconds = _KEPT * self.rows_times_seconds + rows * seconds
        self._draw()

    def _draw(self) -> None:
        spread = self.weight * self.rows_squared - self.rows * self.rows
        # Batches of one size alone do not say which part is fixed: then all of it is taken to grow with the rows.
        slope = self.seconds / self.rows
        self.is_line = spread > 1e-6 * self.rows * self.rows
        if self.is_line:
            slope = min(slope, (self.weight * self.rows_times_seconds - self.rows * self.seconds) / spread)
        self.per_row = max(0.0, slope)
        self.fixed = max(0.0, (self.seconds - self.per_row * self.rows) / self.weight)


class Costs:
    """Seconds of computing by kind of batch. Not thread-safe.

    Args:
        num_workers: batches that run at once.
    """

    UNKNOWN_ROW_SECONDS = 1e-3
    """What a row of an unknown kind counts in fair shares: there, nothing may be free."""

    def __init__(self, num_workers: int = 1) -> None:
        self._num_workers = num_workers
        self._fits: dict[Kind, _Fit] = {}

    def __len__(self) -> int:
        """How many kinds are known."""
        return len(self._fits)

    def observe(self, kind: Kind, rows: int, seconds: float, now_seconds: float) -> None:
        """Learns from a batch that ran.

        Args:
            kind: of it.
            rows: in it, at least 1.
            seconds: that it took.
            now_seconds: the clock.
        """
        fit = self._fits.setdefault(kind, _Fit())
        fit.observe(rows, max(0.0, seconds))
        fit.seen_seconds = now_seconds

    def batch_seconds(self, kind: Kind, rows: float, now_seconds: float) -> float:
        """Returns what a batch of so many rows will take; 0 if nothing is known."""
        fit = self._fits.get(kind)
        return 0.0 if fit is None else _belief(fit, now_seconds) * (fit.fixed + fit.per_row * rows)

    def row_seconds(self, kind: Kind, now_seconds: float) -> float:
        """Returns what a row takes in batches as they have been; 0 if nothing is known."""
        fit = self._fits.get(kind)
        return 0.0 if fit is None else _belief(fit, now_seconds) * fit.seconds / fit.rows

    def share_seconds(self, kind: Kind) -> float:
        """Returns what a row counts in fair shares: what it took when it last ran, and never nothing."""
        fit = self._fits.get(kind)
        return self.UNKNOWN_ROW_SECONDS if fit is None else max(1e-9, fit.seconds / fit.rows)

    def enough_rows(self, kind: Kind, most: int) -> int:
        """Returns how many rows make a batch in which a row costs hardly more than in the largest.

        Args:
            kind: of the batch.
            most: rows of the largest; also what is returned as long as batches of one size alone were seen.
        """
        fit = self._fits.get(kind)
        if fit is None or not fit.is_line:
            return most
        # What a row may cost, less what it costs however many there are, is what is left for its part of what is fixed.
        part = (HARDLY_CHEAPER - 1) * fit.per_row + HARDLY_CHEAPER * fit.fixed / most
        return max(1, min(most, math.ceil(fit.fixed / part))) if part > 0 else most

    def free_rows(self, kind: Kind, most: int) -> int:
        """Returns how many rows make a batch that takes hardly longer than one of a single row.

        Args:
            kind: of the batch.
            most: rows of the largest. As long as batches of one size alone were seen, 1 is returned.
        """
        fit = self._fits.get(kind)
        if fit is None or not fit.is_line:
            return 1
        if not fit.per_row:
            return most
        extra_seconds = (HARDLY_LONGER - 1) * (fit.fixed + fit.per_row)
        return max(1, min(most, 1 + math.floor(extra_seconds / fit.per_row)))

    def forecast(self, tree: RouteTree, num_images: int, image_size: int, now_seconds: float) -> Forecast:
        """Predicts what a question costs.

        Args:
            tree: routes of its tasks.
            num_images: that it has.
            image_size: of these, in pixels.
            now_seconds: the clock.
        """
        row_seconds = sum(self.row_seconds(Kind(branch.segment, image_size), now_seconds) for branch in tree.branches)
        work_seconds = num_images * row_seconds
        needs = max(self.needs_seconds(branch, num_images, image_size, now_seconds) for branch in tree.roots)
        return Forecast(work_seconds, max(needs, work_seconds / self._num_workers))

    def needs_seconds(self, branch: Branch, num_images: int, image_size: int, now_seconds: float) -> float:
        """Returns how long rows take at least from here to the end of the longest of their routes, if nothing else runs."""
        rows = max(1.0, num_images / self._num_workers)
        own = self.batch_seconds(Kind(branch.segment, image_size), rows, now_seconds)
        further = (self.needs_seconds(child, num_images, image_size, now_seconds) for child in branch.children.values())
        return own + max(further, default=0.0)

    def keep(self, segments: Collection[str]) -> None:
        """Forgets all segments but these."""
        self._fits = {kind: fit for kind, fit in self._fits.items() if kind.segment in segments}


def _belief(fit: _Fit, now_seconds: float) -> float:
    return float(0.5 ** (max(0.0, now_seconds - fit.seen_seconds) / HALF_LIFE_SECONDS))
