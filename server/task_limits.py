"""What the operator allows each task at most, whoever else is there: the table `task_limits` of the settings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from server.config import TaskLimits
from server.errors import OverloadedError

BURST_SECONDS = 1.0
"""A task that was quiet may have as much at once as it may have in so long."""


class _Use:
    """What one task has in flight, and how many images it may have at once now."""

    __slots__ = ("images", "left", "limits", "requests", "seen_seconds")

    def __init__(self, limits: TaskLimits, now_seconds: float) -> None:
        self.limits = limits
        self.requests = self.images = 0
        self.left = self.burst
        self.seen_seconds = now_seconds

    @property
    def burst(self) -> float:
        return max(1.0, BURST_SECONDS * (self.limits.max_images_per_second or 0.0))

    def refill(self, now_seconds: float) -> None:
        self.left = min(self.burst, self.left + (now_seconds - self.seen_seconds) * (self.limits.max_images_per_second or 0.0))
        self.seen_seconds = now_seconds


class TaskLimiter:
    """Refuses what is beyond a task's own limits. For one event loop.

    Args:
        limits: by name of the task; tasks that are not served now may be among them.
        clock: seconds that only go forward.
    """

    def __init__(self, limits: Mapping[str, TaskLimits], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses = {name: _Use(limit, clock()) for name, limit in limits.items()}

    @contextlib.contextmanager
    def within(self, tasks: Iterable[str], num_images: int) -> Iterator[None]:
        """Lets the block be a question to these tasks, which each of them must allow.

        Raises:
            OverloadedError: one of them does not; nothing is counted then.
        """
        uses = [(name, self._uses[name]) for name in tasks if name in self._uses]
        for name, use in uses:
            self._check(name, use, num_images)
        for _, use in uses:
            use.requests += 1
            use.images += num_images
            use.left -= num_images
        try:
            yield
        except OverloadedError:
            # Refused for what else waits, these were not taken.
            for _, use in uses:
                use.left += num_images
            raise
        finally:
            for _, use in uses:
                use.requests -= 1
                use.images -= num_images

    def strangers(self, served: Collection[str]) -> list[str]:
        """Returns the names that have limits and are not served."""
        return sorted(self._uses.keys() - set(served))

    def _check(self, name: str, use: _Use, num_images: int) -> None:
        limits = use.limits
        if limits.max_requests_in_flight is not None and use.requests >= limits.max_requests_in_flight:
            raise OverloadedError(f"requests to task {name!r} in flight", use.requests, limits.max_requests_in_flight)
        # A question larger than the limit is let in when it is the only one: the limit of images in a request bounds its size.
        most = limits.max_images_in_flight
        if most is not None and use.images and use.images + num_images > most:
            raise OverloadedError(f"images to task {name!r} in flight", use.images, most)
        rate = limits.max_images_per_second
        if rate is not None:
            use.refill(self._clock())
            missing = min(float(num_images), use.burst) - use.left
            if missing > 1e-9:
                raise OverloadedError(f"images to task {name!r} in a second", round(use.burst - use.left), rate, missing / rate)
