from __future__ import annotations

import asyncio

import pytest

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
