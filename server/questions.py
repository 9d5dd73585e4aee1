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

from server.admission import UNKNOWN, Admission, Forecast
from server.config import EngineSettings
from server.engine import Logits, Question
from server.errors import DeadlineError, NotLoadedError, ServerError
from server.fairness import Flow, flow_of
from server.generation import Generation

Settlement = Callable[[], object]
"""Completes a future; called without an engine's lock, because futures call back."""


@dataclasses.dataclass(slots=True, eq=False)
class Branch:
    """A place in the tree of some tasks' routes: reached by all tasks whose routes begin alike up to here.

    Attributes:
        segment: name of the segment that runs here.
        position: its place among all branches of the tree.
        tasks: the tasks that come through.
        children: where rows go from here.
        leaves: the tasks whose logits come out here.
    """

    segment: str
    position: int = 0
    tasks: list[str] = dataclasses.field(default_factory=list)
    children: dict[str, Branch] = dataclasses.field(default_factory=dict)
    leaves: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_tasks(self) -> int:
        """How many tasks come through."""
        return len(self.tasks)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RouteTree:
    """The routes of some tasks with what they share from the image on folded together.

    Attributes:
        roots: first segments; more than one if some tasks share not even that.
        branches: all places in it, each behind the one that its rows come from.
        flow: of the questions to these tasks; empty if it is none that anybody asked.
    """

    roots: tuple[Branch, ...]
    branches: tuple[Branch, ...]
    flow: Flow = ""

    @property
    def num_branches(self) -> int:
        """How often some segment runs on each image."""
        return len(self.branches)

    @classmethod
    def build(cls, generation: Generation, tasks: Sequence[str]) -> RouteTree:
        """Returns the tree of these tasks' routes."""
        roots: dict[str, Branch] = {}
        branches: list[Branch] = []
        for name in tasks:
            children = roots
            branch = None
            for segment in generation.tasks[name].route:
                branch = children.get(segment)
                if branch is None:
                    branch = children[segment] = Branch(segment, len(branches))
                    branches.append(branch)
                branch.tasks.append(name)
                children = branch.children
            if branch is not None:
                branch.leaves.append(name)
        return cls(tuple(roots.values()), tuple(branches), flow_of(tasks))


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
        work_seconds: of computing that are left of it, as far as is known.
    """

    def __init__(self, number: int, question: Question, loaded: LoadedGeneration, due_seconds: float) -> None:
        self.number = number
        self.question = question
        self.loaded = loaded
        self.future: concurrent.futures.Future[Logits] = concurrent.futures.Future()
        self.tree = loaded.tree(question.tasks)
        self.num_planned = self.tree.num_branches * len(question.images)
        self.due_seconds = due_seconds
        self.work_seconds = 0.0
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


Forecaster = Callable[[RouteTree, int, int], Forecast]
"""Predicts what a question costs, from its tree, the number of its images and their size in pixels."""


Opened = TypeVar("Opened", bound=OpenQuestion)
Loaded = TypeVar("Loaded", bound=LoadedGeneration)


class OpenQuestions(Generic[Opened, Loaded]):
    """The questions that an engine has open, and how much work they are. Whoever calls holds the engine's lock.

    Args:
        kind: makes a question on its way, from its number, the question, the generation that answers, and when its rows are due.
        settings: how much may wait, and how long.
        clock: seconds that only go forward, the clock of questions' deadlines.
        on_end: called with each question that is open no longer, whichever way it went.
        forecast: predicts what questions cost; by default nothing is known of it.
    """

    def __init__(
        self,
        kind: Callable[[int, Question, Loaded, float], Opened],
        settings: EngineSettings,
        clock: Callable[[], float],
        on_end: Callable[[Opened], None],
        forecast: Forecaster = lambda *_: UNKNOWN,
    ) -> None:
        self._kind = kind
        self._settings = settings
        self._clock = clock
        self._on_end = on_end
        self._forecast = forecast
        self._open: dict[int, Opened] = {}
        self._numbers = itertools.count(1)
        self._admission = Admission(settings.max_waiting_rows, settings.num_workers)

    @property
    def num_planned(self) -> int:
        """Rows of open questions, without rehearsals: the work that the bound counts."""
        return self._admission.num_rows

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, opened: Opened) -> bool:
        return opened.number in self._open

    def check(self, loaded: Loaded | None, tasks: tuple[str, ...], num_images: int, deadline_seconds: float | None) -> None:
        """Checks whether a question would be let in now. See `Engine.check`, which says what it takes and raises."""
        if loaded is None:
            # Asked on, it fails with the words for it.
            return
        image_size = loaded.generation.tasks[tasks[0]].image_size
        self._check(loaded.tree(tasks), num_images, image_size, deadline_seconds)

    def admit(self, question: Question, loaded: Loaded | None) -> Opened:
        """Opens a question.

        Args:
            question: what is asked.
            loaded: the generation that answers; None if the engine does not hold it.

        Raises:
            NotLoadedError: it does not.
            DeadlineError: it is too late, or will be.
            OverloadedError: too much waits.
        """
        now = self._clock()
        if loaded is None:
            raise NotLoadedError(question.generation.number)
        due_seconds = now + self._settings.patience_seconds
        if question.deadline_seconds is not None:
            due_seconds = min(due_seconds, question.deadline_seconds)
        opened = self._kind(next(self._numbers), question, loaded, due_seconds)
        num_images, image_size = question.images.shape[:2]
        # Rehearsals are always let in: a server that is busy must not refuse a good generation for that, nor a question for a rehearsal.
        if question.counted:
            forecast = self._check(opened.tree, num_images, image_size, question.deadline_seconds)
            opened.work_seconds = forecast.work_seconds
            self._admission.enter(opened.tree.flow, opened.num_planned, opened.work_seconds)
        self._open[opened.number] = opened
        loaded.num_open += 1
        return opened

    def _check(self, tree: RouteTree, num_images: int, image_size: int, deadline_seconds: float | None) -> Forecast:
        left_seconds = None if deadline_seconds is None else deadline_seconds - self._clock()
        forecast = self._forecast(tree, num_images, image_size)
        self._admission.check(tree.flow, tree.num_branches * num_images, forecast, left_seconds)
        return forecast

    def progress(self, opened: Opened, work_seconds: float) -> None:
        """Notes that so much work was done for an open question."""
        if opened not in self:
            return
        done = min(opened.work_seconds, work_seconds)
        opened.work_seconds -= done
        self._admission.done(opened.tree.flow, done)

    def complete(self, opened: Opened) -> Settlement:
        """Takes a question out whose logits are complete, and returns what answers it; if it is late, what fails it."""
        self.end(opened)
        deadline_seconds = opened.question.deadline_seconds
        if deadline_seconds is not None and deadline_seconds <= self._clock():
            return failure(opened, DeadlineError())
        return completion(opened)

    def end(self, opened: Opened) -> None:
        """Takes a question out; completing its future is up to the caller."""
        del self._open[opened.number]
        if opened.question.counted:
            self._admission.leave(opened.tree.flow, opened.num_planned, opened.work_seconds)
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
