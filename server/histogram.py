"""Histograms: how many values lay in which range, cheap to add to; for Prometheus and for `munet-server top`."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram holds at one moment.

    Attributes:
        bounds: upper bounds of the ranges, ascending; a value that equals a bound lies below it.
        counts: values in each range; one more than there are bounds, for what is above the last.
        sum: of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Their mean; NaN if there are none."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """Returns the value that a share of all values does not exceed, as if values lay evenly within their ranges.

        Args:
            share: 0 to 1.

        Returns:
            NaN if there are no values; the last bound if it lies above that.
        """
        wanted = share * self.count
        below, lower = 0, 0.0
        for upper, count in zip(self.bounds, self.counts, strict=False):
            if count and below + count >= wanted:
                return lower + (upper - lower) * max(0.0, wanted - below) / count
            below, lower = below + count, upper
        return self.bounds[-1] if self.count else math.nan

    def since(self, earlier: Distribution | None) -> Distribution:
        """Returns what came after an earlier moment; all of it if that is none, or of a histogram that began anew since."""
        if earlier is None or earlier.bounds != self.bounds or any(map(int.__gt__, earlier.counts, self.counts)):
            return self
        counts = tuple(map(int.__sub__, self.counts, earlier.counts))
        return Distribution(self.bounds, counts, self.sum - earlier.sum)


class Histogram:
    """Counts values by range. One thread at a time may add; any may look.

    Args:
        bounds: upper bounds of the ranges, ascending.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Counts a value, once or several times."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_all(self, values: Sequence[float], times: Sequence[int] | None = None) -> None:
        """Counts many values, each once or as often as `times` say, in less time than one by one."""
        array = np.asarray(values, dtype=np.float64)
        weights = None if times is None else np.asarray(times, dtype=np.int64)
        ranges = np.searchsorted(self._bounds, array)
        added = np.bincount(ranges, weights, len(self._counts)).astype(np.int64).tolist()
        self._counts = [count + more for count, more in zip(self._counts, added, strict=True)]
        self._sum += float(array.sum() if weights is None else array @ weights)

    def distribution(self) -> Distribution:
        """Returns what it holds now."""
        return Distribution(self._bounds, tuple(self._counts), self._sum)
