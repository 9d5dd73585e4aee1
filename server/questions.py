"""What a question becomes inside an engine: the tree of its tasks' routes, and an answer that fills up."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine import Logits, Question
from server.errors import ServerError
from server.generation import Generation

Settlement = Callable[[], None]
"""Completes a future; called without an engine's lock, because futures call back."""


@dataclasses.dataclass(slots=True, eq=False)
class Branch:
    """A place in the tree of some tasks' routes: reached by all tasks whose routes begin alike up to here.

    Attributes:
        segment: name of the segment that runs here.
        num_tasks: how many of the tasks come through.
        children: where rows go from here.
        leaves: the tasks whose logits come out here.
    """

    segment: str
    num_tasks: int = 0
    children: dict[str, Branch] = dataclasses.field(default_factory=dict)
    leaves: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RouteTree:
    """The routes of some tasks with what they share from the image on folded together.

    Attributes:
        roots: first segments; more than one if some tasks share not even that.
        num_branches: how often some segment runs on each image.
    """

    roots: tuple[Branch, ...]
    num_branches: int

    @classmethod
    def build(cls, generation: Generation, tasks: Sequence[str]) -> RouteTree:
        """Returns the tree of these tasks' routes."""
        roots: dict[str, Branch] = {}
        num_branches = 0
        for name in tasks:
            children = roots
            branch = None
            for segment in generation.tasks[name].route:
                branch = children.get(segment)
                if branch is None:
                    branch = children[segment] = Branch(segment)
                    num_branches += 1
                branch.num_tasks += 1
                children = branch.children
            if branch is not None:
                branch.leaves.append(name)
        return cls(tuple(roots.values()), num_branches)


class LoadedGeneration:
    """A generation that an engine holds, with the number of questions open on it."""

    NUM_TREES = 256

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.num_open = 0
        self.retired = False
        # Building the tree of a thousand tasks costs milliseconds; few sets of tasks are asked for over and over.
        self.tree = functools.lru_cache(maxsize=self.NUM_TREES)(functools.partial(RouteTree.build, generation))


class OpenQuestion:
    """A question on its way.

    Attributes:
        number: counts questions.
        question: what was asked.
        loaded: the generation that answers.
        future: where the answer goes.
        tree: the routes of its tasks.
        num_planned: rows times segments that it takes in all.
        due_seconds: when its rows are due.
    """

    def __init__(self, number: int, question: Question, loaded: LoadedGeneration, due_seconds: float) -> None:
        self.number = number
        self.question = question
        self.loaded = loaded
        self.future: concurrent.futures.Future[Logits] = concurrent.futures.Future()
        self.tree = loaded.tree(question.tasks)
        self.num_planned = self.tree.num_branches * len(question.images)
        self.due_seconds = due_seconds
        self._logits: dict[str, npt.NDArray[np.float32]] = {}
        self._num_missing = len(question.tasks) * len(question.images)

    def put(self, task: str, first: int, logits: npt.NDArray[Any]) -> bool:
        """Takes rows of a task's logits in.

        Args:
            task: whose.
            first: index of the image that the first row belongs to.
            logits: [rows, classes].

        Returns:
            Whether the answer is complete now.
        """
        whole = self._logits.get(task)
        if whole is None:
            whole = self._logits[task] = np.empty((len(self.question.images), logits.shape[1]), dtype=np.float32)
        whole[first : first + len(logits)] = logits
        self._num_missing -= len(logits)
        return self._num_missing == 0

    @property
    def logits(self) -> Logits:
        """The answer, once complete, tasks in the order asked for."""
        return {name: self._logits[name] for name in self.question.tasks}


def completion(opened: OpenQuestion) -> Settlement:
    """Returns what answers a question whose logits are complete."""

    def settle() -> None:
        if opened.future.set_running_or_notify_cancel():
            opened.future.set_result(opened.logits)

    return settle


def failure(opened: OpenQuestion, error: ServerError) -> Settlement:
    """Returns what fails a question."""

    def settle() -> None:
        if opened.future.set_running_or_notify_cancel():
            opened.future.set_exception(error)

    return settle


def settle_all(settlements: Iterable[Settlement]) -> None:
    """Completes futures."""
    for settle in settlements:
        settle()
