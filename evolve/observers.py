"""Who is told what goes on: of sentences anybody, of a search several observers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evolve.documents import TaskRecord
from evolve.generation import ChildPlan, GenerationPlan
from evolve.journal import Record
from evolve.path import Path
from evolve.search import Observer

Tell = Callable[[str], None]
"""Takes a sentence about what is going on, for a person to read."""


class Observers:
    """Tells each of several observers what happens, in their order; see evolve.search.Observer."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        """Tells these; none is fine."""
        self._observers = tuple(observers)

    def search_opened(self, task: str, round_number: int, seeds: Sequence[Path], num_children: int, reused: int) -> None:
        """Tells them."""
        for observer in self._observers:
            observer.search_opened(task, round_number, seeds, num_children, reused)

    def generation_planned(self, plan: GenerationPlan) -> None:
        """Tells them."""
        for observer in self._observers:
            observer.generation_planned(plan)

    def child_finished(self, plan: ChildPlan, record: Record) -> None:
        """Tells them."""
        for observer in self._observers:
            observer.child_finished(plan, record)

    def search_closed(self, task: str, path: Path, record: TaskRecord) -> None:
        """Tells them."""
        for observer in self._observers:
            observer.search_closed(task, path, record)
