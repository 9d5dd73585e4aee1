from __future__ import annotations

import bisect
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from server.histogram import Distribution, Histogram

BOUNDS = (0.5, 1.0, 2.0, 8.0)
VALUES = st.lists(st.floats(0, 10, allow_nan=False), max_size=50)


def histogram_of(values: list[float]) -> Histogram:
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.add(value)
    return histogram


def test_a_value_that_equals_a_bound_lies_below_it() -> None:
    found = histogram_of([0.5, 0.6, 8.0, 8.1]).distribution()
    assert found.counts == (1, 1, 0, 1, 1)
    assert (found.count, found.mean) == (4, pytest.approx(4.3))


def test_a_value_may_count_several_times() -> None:
    histogram = Histogram(BOUNDS)
    histogram.add(1.5, 3)
    assert histogram.distribution() == Distribution(BOUNDS, (0, 0, 3, 0, 0), 4.5)


@given(
    VALUES.flatmap(
        lambda values: st.tuples(st.just(values), st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values)))
    )
)
def test_many_at_once_are_as_many_one_by_one(counted: tuple[list[float], list[int]]) -> None:
    values, times = counted
    together, one_by_one = Histogram(BOUNDS), Histogram(BOUNDS)
    together.add_all(values, times)
    for value, count in zip(values, times, strict=True):
        one_by_one.add(value, count)
    assert together.distribution().counts == one_by_one.distribution().counts
    assert together.distribution().sum == pytest.approx(one_by_one.distribution().sum)


@given(VALUES.filter(len), st.floats(0, 1))
def test_a_quantile_lies_in_the_range_of_the_value_it_stands_for(values: list[float], share: float) -> None:
    found = histogram_of(values).distribution().quantile(share)
    exact = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    index = bisect.bisect_left(BOUNDS, exact)
    lower = BOUNDS[index - 1] if index else 0.0
    upper = BOUNDS[index] if index < len(BOUNDS) else BOUNDS[-1]
    assert min(lower, upper) - 1e-9 <= found <= upper + 1e-9


def test_of_nothing_there_is_no_quantile() -> None:
    found = Histogram(BOUNDS).distribution()
    assert math.isnan(found.quantile(0.5))
    assert math.isnan(found.mean)


@given(VALUES, VALUES)
def test_what_came_since_an_earlier_moment(before: list[float], after: list[float]) -> None:
    histogram = histogram_of(before)
    earlier = histogram.distribution()
    for value in after:
        histogram.add(value)
    since = histogram.distribution().since(earlier)
    assert since.counts == histogram_of(after).distribution().counts
    assert since.sum == pytest.approx(sum(after), abs=1e-9)


def test_a_histogram_that_began_anew_has_nothing_before() -> None:
    now = histogram_of([1.0]).distribution()
    assert now.since(None) == now
    assert now.since(histogram_of([1.0, 1.0]).distribution()) == now
