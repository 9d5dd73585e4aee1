"""A generation that is tried beside the one that serves: which requests it answers."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Collection, Mapping

from server.generation import Generation, is_told_alike


class Label(enum.Enum):
    """Which generation a request wants to be answered by."""

    ANY = ""
    STABLE = "stable"
    CANARY = "canary"


@dataclasses.dataclass(frozen=True, slots=True)
class CanaryPointer:
    """What the file CANARY says.

    Attributes:
        number: of the generation.
        percent: so many of a hundred requests about a task go to it, 0 to 100.
        percent_of_task: where it is another part, by the task's name.
    """

    number: int
    percent: float
    percent_of_task: Mapping[str, float]

    def percent_of(self, task: str) -> float:
        """How many of a hundred requests about a task go to the canary."""
        return self.percent_of_task.get(task, self.percent)


class Canary:
    """A canary as one server sees it. For one event loop.

    Args:
        pointer: what the repository says of it.
        refusal: why it answers nothing; empty if it answers.

    Attributes:
        num_requests: requests that it was given.
    """

    def __init__(self, pointer: CanaryPointer, refusal: str = "") -> None:
        self.pointer = pointer
        self.refusal = refusal
        self.num_requests = 0
        self._num_drawn: dict[str, int] = {}

    def draw(self, tasks: Collection[str]) -> bool:
        """Whether the next request is the canary's.

        Of the first n requests about a task alone it gets n times the task's percentage, rounded: not a draw by chance, so that ten
        requests show what ten percent are.

        Args:
            tasks: tasks of the request that the canary answers otherwise; at least one. The one of the smallest percentage counts, so that
                none gets more than it may.
        """
        percent, task = min((self.pointer.percent_of(task), task) for task in tasks)
        num_before = self._num_drawn.get(task, 0)
        self._num_drawn[task] = num_before + 1
        return _part(num_before + 1, percent) > _part(num_before, percent)


def _part(count: int, percent: float) -> int:
    return math.floor(count * percent / 100 + 0.5)


def differing_tasks(stable: Generation, canary: Generation) -> frozenset[str]:
    """Returns the names of the tasks that both have and that are not told alike."""
    return frozenset(
        name for name, task in stable.tasks.items() if name in canary.tasks and not is_told_alike(task, canary.tasks[name])
    )
