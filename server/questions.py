"""What a question becomes inside an engine: the tree of its tasks' routes, an answer that fills up, and the books of what is open."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from server.config import EngineSettings
from server.engine import Logits, Question
from server.errors import DeadlineError, NotLoadedError, OverloadedError, ServerError
from server.generation import Generation

Settlement = Callable[[], object]
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
        branches: all places in it.
    """

    roots: tuple[Branch, ...]
    branches: tuple[Branch, ...]

    @property
    def num_branches(self) -> int:
        """How often some segment runs on each image."""
        return len(self.branches)

    @classmethod
    def build(cls, generation: Generation, tasks: Sequence[str]) -> RouteTree:
        """Returns the tree of these tasks' routes."""
        roots: dict[str, Branch] = {}
        branches = []
        for name in tasks:
            children = roots
            branch = None
            for segment in generation.tasks[name].route:
                branch = children.get(segment)
                if branch is None:
                    branch = children[segment] = Branch(segment)
                    branches.append(branch)
                branch.num_tasks += 1
                children = branch.children
            if branch is not None:
                branch.leaves.append(name)
        return cls(tuple(roots.values()), tuple(branches))


class LoadedGeneration:
    """A generation that an engine holds, with the number of questions open on it."""

    NUM_TREES = 256

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.num_open = 0
        self.retired = False
        # Building the tree of a thousand tasks costs milliseconds; few sets of tasks are asked for over and over.
        self.tree = functools.lru_cache(maxsize=self.NUM_TREES)(functools.partial(RouteTree.build, generation))

    @property
    def is_over(self) -> bool:
        """Whether it was unloaded and its last question is done."""
        return self.retired and not self.num_open


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


Opened = TypeVar("Opened", bound=OpenQuestion)
Loaded = TypeVar("Loaded", bound=LoadedGeneration)


class OpenQuestions(Generic[Opened, Loaded]):
    """The questions that an engine has open, and how much work they are. Whoever calls holds the engine's lock.

    Args:
        kind: makes a question on its way, from its number, the question, the generation that answers, and when its rows are due.
        settings: how much may wait, and how long.
        clock: seconds that only go forward, the clock of questions' deadlines.
        on_end: called with each question that is open no longer, whichever way it went.
    """

    def __init__(
        self,
        kind: Callable[[int, Question, Loaded, float], Opened],
        settings: EngineSettings,
        clock: Callable[[], float],
        on_end: Callable[[Opened], None],
    ) -> None:
        self._kind = kind
        self._settings = settings
        self._clock = clock
        self._on_end = on_end
        self._open: dict[int, Opened] = {}
        self._numbers = itertools.count(1)
        self._num_planned = 0

    @property
    def num_planned(self) -> int:
        """Rows of open questions: the work that the bound counts."""
        return self._num_planned

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, opened: Opened) -> bool:
        return opened.number in self._open

    def admit(self, question: Question, loaded: Loaded | None) -> Opened:
        """Opens a question.

        Args:
            question: what is asked.
            loaded: the generation that answers; None if the engine does not hold it.

        Raises:
            NotLoadedError: it does not.
            DeadlineError: it is too late.
            OverloadedError: too much waits.
        """
        now = self._clock()
        if loaded is None:
            raise NotLoadedError(question.generation.number)
        if question.deadline_seconds is not None and question.deadline_seconds <= now:
            raise DeadlineError
        due_seconds = now + self._settings.patience_seconds
        if question.deadline_seconds is not None:
            due_seconds = min(due_seconds, question.deadline_seconds)
        opened = self._kind(next(self._numbers), question, loaded, due_seconds)
        # A question larger than the bound is answered when nothing else is open: the front door's limits bound its size. Rehearsals, few
        # and small, are always let in: a server that is busy must not refuse a good generation for that.
        if question.counted and self._num_planned and self._num_planned + opened.num_planned > self._settings.max_waiting_rows:
            raise OverloadedError("rows of open questions", self._num_planned, self._settings.max_waiting_rows)
        self._open[opened.number] = opened
        self._num_planned += opened.num_planned
        loaded.num_open += 1
        return opened

    def end(self, opened: Opened) -> None:
        """Takes a question out; completing its future is up to the caller."""
        del self._open[opened.number]
        self._num_planned -= opened.num_planned
        opened.loaded.num_open -= 1
        self._on_end(opened)

    def abandon(self, number: int) -> None:
        """Takes a question out that its caller cancelled, if it is still open."""
        opened = self._open.get(number)
        if opened is not None:
            self.end(opened)

    def fail(self, number: int, error: ServerError) -> list[Settlement]:
        """Takes a question out and returns what fails it; nothing if it is not open any more."""
        opened = self._open.get(number)
        if opened is None:
            return []
        self.end(opened)
        return [failure(opened, error)]

    def fail_all(self, make_error: Callable[[], ServerError]) -> list[Settlement]:
        """Takes all questions out and returns what fails them."""
        return [settle for number in list(self._open) for settle in self.fail(number, make_error())]


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
