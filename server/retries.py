"""Whether a call that failed is sent again, and when. Free of gRPC; chance and clock are passed in."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable

from server.errors import CallError, ServerBusyError, ServerUnreachableError


@dataclasses.dataclass(frozen=True, slots=True)
class Retry:
    """How a client sends calls again that failed because of the server's state: nobody answers, or too much waits there.

    Attributes:
        max_attempts: how often a call is sent at most; 1 means never again.
        first_pause_seconds: before the second attempt, if the server does not say how long to wait; twice as long before each further one.
        max_pause_seconds: no such pause is longer.
        max_told_seconds: a server that says to wait longer than this is not asked again.

    Raises:
        ValueError: fewer than one attempt, or a negative time.
    """

    max_attempts: int = 4
    first_pause_seconds: float = 0.25
    max_pause_seconds: float = 5.0
    max_told_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: found {self.max_attempts!r}, expected at least 1, which sends every call once")
        for name in ("first_pause_seconds", "max_pause_seconds", "max_told_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected 0 or more seconds")

    def pause_seconds(self, num_failed: int, told_seconds: float | None, chance: float) -> float | None:
        """Returns how long to wait before the next attempt; None if there is to be none.

        Callers that failed together do not come back together: chance makes a pause up to a half shorter than the longest, or, where the
        server said how long to wait, up to a quarter longer than that.

        Args:
            num_failed: attempts that failed, 1 or more.
            told_seconds: how long the server said to wait, if it did.
            chance: 0 to 1.
        """
        if num_failed >= self.max_attempts:
            return None
        if told_seconds is not None:
            return None if told_seconds > self.max_told_seconds else max(told_seconds, 0.0) * (1 + chance / 4)
        # A power that grows without bound would be no number of seconds any more.
        longest = min(self.max_pause_seconds, self.first_pause_seconds * 2.0 ** min(num_failed - 1, 60))
        return longest * (1 - chance / 2)


DEFAULT_RETRY = Retry()
"""What a client does if it is not told otherwise: four attempts, within 1.75 seconds if the server does not say when to come back."""


class Attempts:
    """The attempts of one call, which have one deadline together.

    Args:
        retry: how often and when; none means one attempt.
        timeout_seconds: for all of them and the pauses between; none means for ever.
        clock: in seconds, never going back.
        chance: a number from 0 to 1, another one each time.
    """

    def __init__(
        self,
        retry: Retry | None,
        timeout_seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._retry = retry or Retry(max_attempts=1)
        self._clock = clock
        self._chance = chance
        self._deadline_seconds = None if timeout_seconds is None else clock() + timeout_seconds
        self._num_failed = 0

    @property
    def remaining_seconds(self) -> float | None:
        """What is left of the timeout; none if there is no end to it."""
        return None if self._deadline_seconds is None else self._deadline_seconds - self._clock()

    def pause_after(self, error: CallError) -> float | None:
        """Counts an attempt that failed and returns how long to wait before the next; None if there is none.

        Without a word on when to come back, a server that is too busy is not asked again: what was sent may be too large for it.

        Args:
            error: what the attempt came to.
        """
        self._num_failed += 1
        told_seconds = error.retry_after_seconds
        if not isinstance(error, ServerUnreachableError | ServerBusyError):
            return None
        if isinstance(error, ServerBusyError) and told_seconds is None:
            return None
        pause = self._retry.pause_seconds(self._num_failed, told_seconds, self._chance())
        remaining = self.remaining_seconds
        return None if pause is None or (remaining is not None and pause >= remaining) else pause
