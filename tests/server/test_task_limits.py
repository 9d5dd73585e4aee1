from __future__ import annotations

import contextlib

import pytest

from server.config import TaskLimits
from server.errors import OverloadedError
from server.task_limits import TaskLimiter
from tests.support.serving import ManualClock


def test_requests_in_flight() -> None:
    limiter = TaskLimiter({"digits": TaskLimits(max_requests_in_flight=2)})
    with limiter.within(["digits"], 1), limiter.within(["digits", "greek"], 1):
        with pytest.raises(OverloadedError, match="requests to task 'digits' in flight: found 2 waiting, expected at most 2"):
            limiter.within(["digits"], 1).__enter__()
        with limiter.within(["greek"], 1):
            pass
    with limiter.within(["digits"], 1):
        pass


def test_images_in_flight() -> None:
    limiter = TaskLimiter({"digits": TaskLimits(max_images_in_flight=4)})
    with limiter.within(["digits"], 9), pytest.raises(OverloadedError, match="images to task 'digits' in flight: found 9"):
        limiter.within(["digits"], 1).__enter__()
    with limiter.within(["digits"], 3), limiter.within(["digits"], 1):
        pass


def test_images_per_second() -> None:
    clock = ManualClock()
    limiter = TaskLimiter({"digits": TaskLimits(max_images_per_second=8)}, clock)

    def num_let_in(count: int) -> int:
        done = 0
        for _ in range(count):
            with contextlib.suppress(OverloadedError), limiter.within(["digits"], 1):
                done += 1
        return done

    assert num_let_in(20) == 8
    clock.now_seconds += 0.5
    with pytest.raises(OverloadedError) as caught:
        limiter.within(["digits"], 5).__enter__()
    assert caught.value.retry_after_seconds == pytest.approx(1 / 8)
    assert num_let_in(20) == 4
    # What a quiet hour saved up is one second's.
    clock.now_seconds += 3600
    assert num_let_in(20) == 8
    # More at once than a second has: when all of that is there, and the rest is owed.
    clock.now_seconds += 1
    with limiter.within(["digits"], 16):
        pass
    clock.now_seconds += 1
    assert num_let_in(20) == 0
    clock.now_seconds += 1
    assert num_let_in(20) == 8


def test_what_is_refused_further_on_was_not_taken() -> None:
    clock = ManualClock()
    limiter = TaskLimiter({"digits": TaskLimits(max_images_per_second=8)}, clock)
    for _ in range(20):
        with pytest.raises(OverloadedError, match="rows"), limiter.within(["digits"], 8):
            raise OverloadedError("rows of open questions", 9, 9)
    # Nor is it saved up.
    clock.now_seconds += 1
    with limiter.within(["digits"], 8), pytest.raises(OverloadedError, match="in a second"):
        limiter.within(["digits"], 1).__enter__()


def test_what_one_task_refuses_counts_for_none() -> None:
    limiter = TaskLimiter({"digits": TaskLimits(max_requests_in_flight=1), "greek": TaskLimits(max_requests_in_flight=1)})
    with limiter.within(["greek"], 1), pytest.raises(OverloadedError, match="greek"):
        limiter.within(["digits", "greek"], 1).__enter__()
    with limiter.within(["digits", "greek"], 1):
        pass


def test_limits_of_tasks_that_are_not_served_are_named() -> None:
    limiter = TaskLimiter({"digits": TaskLimits(), "gone": TaskLimits()})
    assert limiter.strangers({"digits": None}) == ["gone"]
    assert limiter.strangers(["digits", "gone"]) == []
