from __future__ import annotations

import asyncio

import pytest

from server.errors import OverloadedError
from server.task_counts import TaskCounts


def test_a_question_counts_for_each_of_its_tasks() -> None:
    counts = TaskCounts()
    with counts.counted(["a", "b"], 3):
        pass
    with counts.counted(["a"], 2):
        pass
    assert (counts.of("a").num_answered, counts.of("a").num_images, counts.of("a").num_failed) == (2, 5, 0)
    assert (counts.of("b").num_answered, counts.of("b").num_images) == (1, 3)
    assert counts.of("a").last_ms > 1.7e12
    assert counts.of("never asked").num_answered == counts.of("never asked").last_ms == 0


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_what_raises_has_failed(error: type[BaseException]) -> None:
    counts = TaskCounts()
    with pytest.raises(error), counts.counted(["a"], 3):
        raise error
    count = counts.of("a")
    assert (count.num_answered, count.num_images, count.num_failed, count.last_ms) == (0, 0, 1, 0)
    assert count.failed_ns > 0


def test_a_task_waited_and_was_computed_as_long_as_its_slowest_rows() -> None:
    counts = TaskCounts()
    with counts.counted(["a", "b"], 1) as times:
        for told in (("a", 0.004, 0.3), ("a", 0.03, 0.4), ("b", 0.03, 0.4), ("b", 0.0, 0.1)):
            times.note(*told)
    for name in ("a", "b"):
        count = counts.of(name)
        assert (count.queue.distribution().sum, count.compute.distribution().sum) == (0.03, 0.4)
        assert count.latency.distribution().count == 1
    with counts.counted(["a"], 1):
        pass
    assert counts.of("a").queue.distribution().count == 1


def test_failures_have_reasons() -> None:
    counts = TaskCounts()
    for error in (OverloadedError("rows", 2, 1), OverloadedError("rows", 2, 1), asyncio.CancelledError(), KeyError("bug")):
        with pytest.raises(type(error)), counts.counted(["a"], 1):
            raise error
    assert counts.of("a").failed == {"overloaded": 2, "cancelled": 1, "bug": 1}
    assert counts.of("a").num_failed == 4


def test_a_task_that_is_gone_is_forgotten_and_not_counted_again() -> None:
    counts = TaskCounts()
    with counts.counted(["b", "a"], 1):
        counts.keep({"a": None, "c": None}.keys())
    assert [name for name, _ in counts.items()] == ["a"]
    counts.keep({"b"})
    with counts.counted(["a", "b"], 1):
        pass
    assert [name for name, _ in counts.items()] == ["b"]
