"""What trainers have in common whose packs are trained by workers elsewhere: processes of this machine, or of a cluster.

Packs are formed as a single process forms them, whatever the number of workers, and the search does not depend on the order in which
they come back: the lineage is the same for one worker and for many. A worker that dies costs what it was at, nothing else: that runs again.
So it is with one that hangs, which shows by what others, or the same one, took for the like before.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from evolve.config import TrainingSettings
from evolve.data.task import TaskData
from evolve.generation import Examples, GenerationPlan, PackResult, Trainer
from evolve.objects import is_url, patience_seconds
from evolve.observers import Tell
from evolve.path import Path
from evolve.store import System

MOST_DEATHS = 3
"""So many workers in a row may die at the same work before it is an error."""

GIVE_UP_FACTOR = 10.0
"""A worker is ended, and what it was at runs again, once that took so many times the longest that any took before, twice that the next
time, and so on, ..."""

GIVE_UP_SECONDS = 600.0
"""... and at least so long, and by what a worker may wait for a store longer. The first order of all has nothing to be compared with: after
so long it is only told."""

START_SECONDS = 1800.0
"""A worker prepares within this time: opens the system, waits for a store, gets the task's data."""

UNKNOWN = "nothing has been done yet that would tell whether it hangs: end this search if it does, and run it again"

Order = GenerationPlan | Path
"""What a worker does at a time: a pack to train, or a path to examine."""


class SpreadTrainer(abc.ABC):
    """A Trainer (evolve.generation) whose work is done by workers, each with a trainer of its own."""

    def __init__(self, system: System, data: TaskData, settings: TrainingSettings, tell: Tell) -> None:
        """Prepares to give out work.

        Args:
            system: gives the layers; workers open it themselves.
            data: of the task.
            settings: the pack size matters here, the rest to workers.
            tell: told what becomes of workers.
        """
        self._task = data.name
        self._pack_size = settings.pack_size
        self._tell = tell
        self._longest = 0.0
        self._store_seconds = patience_seconds() if is_url(system.location) else 0.0

    def train(self, plan: GenerationPlan) -> Iterator[PackResult]:
        """See Trainer.train. Yields packs as they finish.

        Raises:
            WorkersDiedError: workers die again and again.
            MemoryShortageError: a child does not fit into memory, not even one image at a time.
            ValueError: the plan is of another task, or a child cannot be built.
        """
        starts = range(0, len(plan.children), self._pack_size)
        packs = [dataclasses.replace(plan, children=plan.children[start : start + self._pack_size]) for start in starts]
        for results in self._answers(packs):
            yield from results

    def examine(self, path: Path) -> Examples:
        """See Trainer.examine.

        Raises:
            WorkersDiedError: workers die again and again.
            MemoryShortageError: the path does not fit into memory, not even for one image.
        """
        (examples,) = self._answers([path])
        found: Examples = examples
        return found

    @abc.abstractmethod
    def _answers(self, orders: Sequence[Order]) -> Iterator[Any]:
        """Has orders carried out and yields the answer to each once, as they come."""

    def _most_seconds(self, size: int, given_up: int) -> float:
        """Returns how long a worker may be at an order before it is given up, once there is something to tell that by.

        Args:
            size: of the order.
            given_up: how often it was before.
        """
        return max(GIVE_UP_SECONDS, GIVE_UP_FACTOR * 2.0**given_up * self._longest * size) + self._store_seconds

    def _note_duration(self, order: Order, seconds: float) -> None:
        """Remembers how long the longest order took, for each child."""
        self._longest = max(self._longest, seconds / size_of(order))

    def _described(self, orders: Sequence[Order]) -> str:
        """Says in words what workers were at."""
        children = sorted(child.index for order in orders if isinstance(order, GenerationPlan) for child in order.children)
        return f"children {children} of {self._task!r}" if children else f"the test of {self._task!r}"


def size_of(order: Order) -> int:
    """Returns how many children an order has, or 1 for a path."""
    return len(order.children) if isinstance(order, GenerationPlan) else 1


def carry_out(trainer: Trainer, order: Order) -> list[PackResult] | Examples:
    """Does what a worker is told; see Order."""
    return list(trainer.train(order)) if isinstance(order, GenerationPlan) else trainer.examine(order)


def make_trainer(system: System, data: TaskData, settings: TrainingSettings) -> Trainer:
    """Returns the trainer that one process uses: children one by one, or in packs if the settings say so."""
    from evolve.training.one_by_one import OneByOneTrainer
    from evolve.training.together import TogetherTrainer

    kind = OneByOneTrainer if settings.pack_size == 1 else TogetherTrainer
    return kind(data, system.tensors, settings)
