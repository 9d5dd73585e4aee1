from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import (
    CallError,
    CallRefusedError,
    CallTimeoutError,
    ServerBusyError,
    ServerFailedError,
    ServerUnreachableError,
)
from server.retries import Attempts, Retry
from tests.support.serving import ManualClock

RETRY = Retry(max_attempts=4, first_pause_seconds=0.25, max_pause_seconds=0.75, max_told_seconds=10)


def failed(kind: type[CallError], told_seconds: float | None = None) -> CallError:
    return kind("127.0.0.1:1", "Classify", "STATUS", "words", told_seconds)


def pauses(
    retry: Retry | None, *errors: CallError, timeout_seconds: float | None = None, chance: float = 0.0
) -> list[float | None]:
    """Returns the pauses after failures, all of which are waited out."""
    clock = ManualClock()
    attempts = Attempts(retry, timeout_seconds, clock, lambda: chance)
    found = []
    for error in errors:
        found.append(attempts.pause_after(error))
        clock.now_seconds += found[-1] or 0.0
    return found


GONE = failed(ServerUnreachableError)


def test_pauses_double_up_to_a_bound_until_the_last_attempt() -> None:
    assert pauses(RETRY, *[GONE] * 4) == [0.25, 0.5, 0.75, None]
    assert pauses(RETRY, *[GONE] * 4, chance=1.0) == [0.125, 0.25, 0.375, None]


def test_what_the_server_says_comes_first() -> None:
    assert pauses(RETRY, failed(ServerBusyError, 2.0), failed(ServerUnreachableError, 3.0), GONE) == [2.0, 3.0, 0.75]
    assert pauses(RETRY, failed(ServerBusyError, 2.0), chance=1.0) == [2.5]
    assert pauses(RETRY, failed(ServerBusyError, 0.0)) == [0.0]
    assert pauses(RETRY, failed(ServerBusyError, 10.1)) == [None]


@pytest.mark.parametrize("kind", [CallRefusedError, CallTimeoutError, ServerFailedError])
def test_only_what_passes_by_itself_is_tried_again(kind: type[CallError]) -> None:
    assert pauses(RETRY, failed(kind, 0.1)) == [None]


def test_a_server_that_is_too_busy_without_a_hint_is_not_asked_again() -> None:
    assert pauses(RETRY, failed(ServerBusyError)) == [None]


def test_retries_can_be_left_out() -> None:
    assert pauses(None, GONE) == [None]
    assert pauses(Retry(max_attempts=1), GONE) == [None]


def test_nobody_sleeps_past_the_deadline() -> None:
    assert pauses(RETRY, GONE, GONE, timeout_seconds=0.75) == [0.25, None]
    assert pauses(RETRY, failed(ServerBusyError, 1.0), timeout_seconds=1.0) == [None]


def test_all_attempts_have_one_deadline() -> None:
    clock = ManualClock()
    attempts = Attempts(RETRY, 2.0, clock)
    assert attempts.remaining_seconds == 2.0
    clock.now_seconds += 1.5
    assert attempts.remaining_seconds == 0.5
    assert Attempts(RETRY, None, clock).remaining_seconds is None


@given(
    st.builds(
        Retry,
        max_attempts=st.integers(1, 10_000),
        first_pause_seconds=st.floats(0, 1e6),
        max_pause_seconds=st.floats(0, 1e6),
        max_told_seconds=st.floats(0, 1e6),
    ),
    st.integers(1, 10_000),
    st.none() | st.floats(-1e9, 1e9),
    st.floats(0, 1),
)
def test_a_pause_is_never_shorter_than_told_nor_longer_than_allowed(
    retry: Retry, num_failed: int, told_seconds: float | None, chance: float
) -> None:
    pause = retry.pause_seconds(num_failed, told_seconds, chance)
    if num_failed >= retry.max_attempts:
        assert pause is None
    elif told_seconds is None:
        assert pause is not None
        assert 0 <= pause <= retry.max_pause_seconds
    elif told_seconds > retry.max_told_seconds:
        assert pause is None
    else:
        assert pause is not None
        assert max(told_seconds, 0) <= pause <= retry.max_told_seconds * 1.25


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_attempts": 0}, "max_attempts: found 0, expected at least 1"),
        ({"first_pause_seconds": -1.0}, "first_pause_seconds: found -1.0, expected 0 or more seconds"),
        ({"max_told_seconds": float("nan")}, "max_told_seconds: found nan, expected 0 or more seconds"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Retry(**values)  # type: ignore[arg-type]
