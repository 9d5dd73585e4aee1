from __future__ import annotations

import math

import hypothesis
import pytest
from hypothesis import strategies as st

from server.admission import LEAST_RETRY_SECONDS, MOST_RETRY_SECONDS, UNKNOWN, Admission, Forecast
from server.errors import DeadlineError, OverloadedError

SECOND = Forecast(work_seconds=1.0, alone_seconds=1.0)


def busy(num_workers: int = 1, **work_seconds: float) -> Admission:
    """Returns an admission with a question of one row open for each flow."""
    admission = Admission(1000, num_workers)
    for flow, seconds in work_seconds.items():
        admission.enter(flow, 1, seconds)
    return admission


def test_what_is_past_its_deadline_is_refused_always() -> None:
    for admission in (busy(), busy(a=1.0)):
        with pytest.raises(DeadlineError, match="passed"):
            admission.check("a", 1, UNKNOWN, 0.0)


def test_where_nothing_is_open_everything_is_tried() -> None:
    busy().check("a", 10**9, Forecast(100.0, 100.0), 0.001)


def test_what_takes_longer_than_is_left_is_told_so() -> None:
    with pytest.raises(DeadlineError, match=r"found 0.500 seconds left, expected at least 1.000") as caught:
        busy(b=0.001).check("a", 1, SECOND, 0.5)
    assert (caught.value.left_seconds, caught.value.needs_seconds) == (0.5, 1.0)


def test_what_would_be_late_for_what_is_ahead_is_told_when_to_come_back() -> None:
    admission = busy(a=6.0)
    admission.check("a", 1, SECOND, 10.0)
    with pytest.raises(OverloadedError, match="seconds of work ahead of this question: found 6.0 waiting") as caught:
        admission.check("a", 1, SECOND, 5.0)
    # Of the 4 seconds that it could wait, 3 may be taken.
    assert caught.value.retry_after_seconds == pytest.approx(3.0)
    # Without a deadline nothing is too long.
    admission.check("a", 1, SECOND, None)
    # Two workers are twice as fast.
    busy(2, a=6.0).check("a", 1, SECOND, 5.1)


def test_a_quiet_flow_waits_for_its_turn_and_not_for_the_flood() -> None:
    admission = busy(loud=100.0, other=0.1)
    admission.check("quiet", 1, SECOND, 3.0)
    with pytest.raises(OverloadedError, match=r"found 1.1 waiting"):
        admission.check("quiet", 1, SECOND, 2.0)


def test_unknown_costs_refuse_nobody() -> None:
    admission = Admission(1000, 1)
    for _ in range(500):
        admission.check("a", 1, UNKNOWN, 0.001)
        admission.enter("a", 1, 0.0)


def test_a_full_room_says_when_there_will_be_some() -> None:
    admission = Admission(100, 2)
    admission.enter("a", 80, 8.0)
    with pytest.raises(OverloadedError, match="rows of open questions: found 80 waiting, expected at most 100") as caught:
        admission.check("b", 40, UNKNOWN, None)
    assert caught.value.retry_after_seconds == pytest.approx(2.0)
    admission.enter("a", 10, 1.0)
    with pytest.raises(OverloadedError, match="rows of open questions to the same task: found 90 waiting, expected at most 80"):
        admission.check("a", 10, UNKNOWN, None)
    admission.check("b", 10, UNKNOWN, None)


AMOUNTS = st.floats(0, 1e6, allow_nan=False)


@hypothesis.given(
    st.dictionaries(st.sampled_from("abcdef"), AMOUNTS), st.sampled_from("abcdef"), AMOUNTS, AMOUNTS,
    st.one_of(st.none(), st.floats(-1, 1e6)), st.integers(1, 8),
)  # fmt: skip
def test_a_refusal_is_always_one_of_two_and_bounded(
    open_seconds: dict[str, float], flow: str, work: float, alone: float, left: float | None, num_workers: int
) -> None:
    admission = busy(num_workers, **open_seconds)
    refusal: DeadlineError | OverloadedError | None = None
    try:
        admission.check(flow, 1, Forecast(work, alone), left)
    except (DeadlineError, OverloadedError) as error:
        refusal = error
    hopeless = left is not None and (left <= 0 or (alone > left and bool(open_seconds)))
    assert isinstance(refusal, DeadlineError) == hopeless
    if isinstance(refusal, OverloadedError):
        assert LEAST_RETRY_SECONDS <= refusal.retry_after_seconds <= MOST_RETRY_SECONDS
        assert left is not None
        # Less before it would have done.
        busy(num_workers, **dict.fromkeys(open_seconds, 0.0)).check(flow, 1, Forecast(0.0, alone), left)


@hypothesis.given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.floats(0, 100), st.floats(0, 1)), max_size=40))
def test_what_comes_and_goes_leaves_nothing(questions: list[tuple[str, int, float, float]]) -> None:
    admission = Admission(10**6, 1)
    for flow, rows, seconds, _ in questions:
        admission.enter(flow, rows, seconds)
    assert admission.work_seconds() == pytest.approx(math.fsum(question[2] for question in questions), abs=1e-6)
    for flow, _, seconds, share in questions:
        admission.done(flow, seconds * share)
    for flow, rows, seconds, share in questions:
        admission.leave(flow, rows, seconds - seconds * share)
    assert admission.num_rows == 0
    assert admission.work_seconds() == 0
