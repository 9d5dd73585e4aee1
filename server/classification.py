"""Questions by task name, from images to probabilities: what every front door asks, free of protos and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from munet.names import similar_names
from server.access import current_grant
from server.call_context import current_call
from server.canary import Label
from server.config import Limits
from server.engine import Engine, Logits, OnRun, Question
from server.errors import ImageRefusedError, LimitError, UnknownTaskError, UnknownVersionError
from server.fairness import flow_of
from server.generation import Generation, Task, is_told_alike
from server.preprocessing import Preprocessor, SentImage
from server.reload import Reloader
from server.task_counts import TaskCounts
from server.task_limits import TaskLimiter

SentImages = Sequence[SentImage] | npt.NDArray[np.uint8]
"""Images one by one, or the pixels that a task's route takes: [images, size, size, 3] uint8, RGB."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TaskAnswer:
    """What a task says of some images.

    Attributes:
        task: who answers.
        generation: number of the generation that it answered from.
        logits: [images, classes] float32.
        probabilities: [images, classes] float64, softmax of the logits.
        order: [images, k], indices of the most probable classes, most probable first; the smaller index on ties.
    """

    task: Task
    generation: int
    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float64]
    order: npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TaskAnswers:
    """What several tasks say of one image.

    Attributes:
        generation: number of the generation that all of them answered from.
        answers: in the order asked for.
    """

    generation: int
    answers: tuple[TaskAnswer, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TaskChanges:
    """What is different when another generation serves.

    Attributes:
        generation: its number.
        added: tasks that were not there.
        changed: tasks of which something is told otherwise than before.
        removed: names of those that are there no longer.
        num_unchanged: all others.
    """

    generation: int
    added: tuple[Task, ...]
    changed: tuple[Task, ...]
    removed: tuple[str, ...]
    num_unchanged: int

    @classmethod
    def between(cls, before: Mapping[str, Task], after: Mapping[str, Task], generation: int) -> TaskChanges:
        """Returns what became of some tasks, by name, in a generation."""
        added = tuple(task for name, task in after.items() if name not in before)
        changed = tuple(task for name, task in after.items() if name in before and not is_told_alike(task, before[name]))
        removed = tuple(name for name in before if name not in after)
        return cls(generation, added, changed, removed, len(after) - len(added) - len(changed))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Who answers a question about one task. Good within `Classifier.choose`.

    Attributes:
        generation: the generation that answers.
        task: the task, of this generation.
    """

    generation: Generation
    task: Task


class Classifier:
    """Answers questions by task name. For one event loop.

    Args:
        reloader: which generation answers.
        engine: what computes.
        preprocessor: what decodes.
        limits: what is accepted.
        counts: where it is counted what each task is asked.
        limiter: what each task may have; by default there are no such limits.
    """

    def __init__(
        self,
        reloader: Reloader,
        engine: Engine,
        preprocessor: Preprocessor,
        limits: Limits,
        counts: TaskCounts,
        limiter: TaskLimiter | None = None,
    ) -> None:
        self._reloader = reloader
        self._engine = engine
        self._preprocessor = preprocessor
        self._limits = limits
        self.counts = counts
        self._limiter = limiter or TaskLimiter({})

    @contextlib.contextmanager
    def choose(self, task_name: str, label: Label = Label.ANY, version: str = "") -> Iterator[Choice]:
        """Chooses who answers a question about one task, and keeps that answerable within the block.

        Args:
            task_name: which.
            label: which generation is to answer.
            version: number of the generation that must answer, whatever the label; empty means any.

        Raises:
            UnknownTaskError, UnknownVersionError, NoCanaryError: nobody can.
            UnavailableError: nothing is served.
        """
        trial = self._reloader.trial
        if version:
            label = Label.CANARY if trial is not None and version == str(trial.number) else Label.STABLE
        with self._reloader.lease(label, [task_name]) as generation:
            yield Choice(generation, find_task(generation, task_name, version))

    def label_for_pixels(self, task_name: str) -> Label:
        """Returns which generation may answer whoever sends a task's pixels without saying whose: any, if all take images of one size."""
        generations = (self._reloader.generation, self._reloader.trial)
        tasks = [generation.tasks.get(task_name) for generation in generations if generation is not None]
        return Label.ANY if len({task.image_size for task in tasks if task is not None}) == 1 else Label.STABLE

    async def classify(
        self, task_name: str, images: SentImages, top_k: int, deadline_seconds: float | None, label: Label = Label.ANY
    ) -> TaskAnswer:
        """Asks one task about one or more images.

        Args:
            task_name: which.
            images: at least one.
            top_k: how many classes to order; 0 means 1, more than there are means all.
            deadline_seconds: when the answer is of no more use, on the clock of `time.monotonic`.
            label: which generation is to answer.

        Raises:
            UnknownTaskError, NoCanaryError, LimitError, ImageRefusedError: the request cannot be answered as it stands.
            ServerError: whatever `Engine.answer` says, or nothing is served.
        """
        with self.choose(task_name, label) as choice:
            return await self.ask(choice, images, top_k, deadline_seconds)

    async def ask(self, choice: Choice, images: SentImages, top_k: int, deadline_seconds: float | None) -> TaskAnswer:
        """Asks whom `choose` chose, as `classify` does.

        Raises:
            LimitError, ImageRefusedError: the request cannot be answered as it stands.
            ServerError: whatever `Engine.answer` says.
        """
        generation, task = choice.generation, choice.task
        check_count("images", len(images), self._limits.max_images, "send the rest in further requests")
        with self.counts.counted([task.name], len(images)) as times, self._limiter.within([task.name], len(images)):
            on_run = _noted([task.name])
            # Before images are decoded for nothing.
            self._engine.check(generation, (task.name,), len(images), deadline_seconds)
            rows = await self._to_rows(images, task)
            question = Question(generation, rows, (task.name,), deadline_seconds, times=times, on_run=on_run)
            logits = await asyncio.wrap_future(self._engine.answer(question))
            return _to_answer(task, generation, logits[task.name], top_k)

    async def _to_rows(self, images: SentImages, task: Task) -> npt.NDArray[np.uint8]:
        if isinstance(images, np.ndarray):
            size = task.image_size
            if images.shape[1:] != (size, size, 3):
                raise ImageRefusedError("images", f"found pixels {list(images.shape)}, expected [images, {size}, {size}, 3]")
            return images
        (rows,) = await self._preprocessor.to_rows(images, [task.image_size], "images[{index}]", task.name)
        return rows

    async def classify_tasks(
        self,
        image: SentImage,
        task_names: Sequence[str],
        top_k: int,
        deadline_seconds: float | None,
        label: Label = Label.ANY,
    ) -> TaskAnswers:
        """Asks several tasks about one image; what their routes share is computed once.

        Args:
            image: which.
            task_names: which; none means every task that is served and exists for the caller.
            top_k: as in `classify`.
            deadline_seconds: as in `classify`.
            label: which generation is to answer, all of it.

        Raises:
            UnknownTaskError, NoCanaryError, LimitError, ImageRefusedError: the request cannot be answered as it stands.
            ServerError: whatever `Engine.answer` says, or nothing is served.
        """
        if task_names:
            check_count("tasks", len(task_names), self._limits.max_tasks, "ask for the rest in further requests")
        asked = task_names or [task.name for task in self.tasks()[1]]
        with self._reloader.lease(label, asked) as generation:
            tasks = [find_task(generation, name) for name in task_names] or visible_tasks(generation)
            if not tasks:
                return TaskAnswers(generation.number, ())
            # Named twice, a task is asked once and answers twice.
            by_size: dict[int, dict[str, None]] = {}
            for task in tasks:
                by_size.setdefault(task.image_size, {})[task.name] = None
            names = {task.name for task in tasks}
            with self.counts.counted(names, 1) as times, self._limiter.within(names, 1):
                on_run = _noted([task.name for task in tasks])
                for of_size in by_size.values():
                    self._engine.check(generation, tuple(of_size), 1, deadline_seconds)
                images = await self._preprocessor.to_rows([image], list(by_size), "image", flow_of(names))
                questions = [
                    Question(generation, rows, tuple(of_size), deadline_seconds, times=times, on_run=on_run)
                    for rows, of_size in zip(images, by_size.values(), strict=True)
                ]
                logits = await self._ask_all(questions)
            answers = tuple(_to_answer(task, generation, logits[task.name], top_k) for task in tasks)
            return TaskAnswers(generation.number, answers)

    async def _ask_all(self, questions: Sequence[Question]) -> Logits:
        """Asks questions together; if one fails or the caller leaves, the others are cancelled."""
        futures = [asyncio.wrap_future(self._engine.answer(question)) for question in questions]
        try:
            return {name: rows for logits in await asyncio.gather(*futures) for name, rows in logits.items()}
        finally:
            for future in futures:
                future.cancel()

    def tasks(self) -> tuple[int, list[Task]]:
        """Returns the number of the generation that serves and its tasks that exist for the caller, in ascending order of name."""
        with self._reloader.lease() as generation:
            return generation.number, visible_tasks(generation)

    def task(self, name: str, version: str = "") -> tuple[int, Task]:
        """Returns a task of the generation that serves, or of the canary if that has the number asked for; the generation's number first.

        Raises:
            UnknownTaskError: no such task is served.
            UnknownVersionError: it is, but not of the generation with this number.
        """
        trial = self._reloader.trial
        if trial is not None and version == str(trial.number):
            # No lease: the canary's would count as a request to it.
            return trial.number, find_task(trial, name)
        with self._reloader.lease() as generation:
            return generation.number, find_task(generation, name, version)

    def answers(self, name: str, version: str = "") -> bool:
        """Whether `task` would return one."""
        stable, trial = self._reloader.generation, self._reloader.trial
        generation = trial if trial is not None and version == str(trial.number) else stable
        if generation is None or version not in ("", str(generation.number)):
            return False
        return name in generation.tasks and current_grant().sees(name)

    async def watch_tasks(self) -> AsyncIterator[TaskChanges]:
        """Gives the tasks that exist for the caller, and then, for ever, what another generation changes.

        Whoever takes long to come back is told of the newest generation alone: everything between it and what it was told last.
        """
        known: Generation | None = None
        told: Mapping[str, Task] = {}
        while True:
            known = await self._reloader.other_than(known)
            tasks = current_grant().visible(known.tasks)
            yield TaskChanges.between(told, tasks, known.number)
            told = tasks


def visible_tasks(generation: Generation) -> list[Task]:
    """Returns a generation's tasks that exist for the caller, in ascending order of name."""
    return list(current_grant().visible(generation.tasks).values())


def find_task(generation: Generation, name: str, version: str = "") -> Task:
    """Returns a generation's task by name.

    Args:
        generation: whose.
        name: the task's.
        version: the generation's number, in digits; empty means any.

    Raises:
        UnknownTaskError: it has no such task, or none that exists for the caller; the error names similar ones.
        UnknownVersionError: the generation has another number.
    """
    grant = current_grant()
    task = generation.tasks.get(name)
    if task is None or not grant.sees(name):
        visible = grant.visible(generation.tasks)
        # Likeness costs time that grows with the name's length, and no task's name is longer than 64.
        raise UnknownTaskError(name, similar_names(name[:64], visible), len(visible))
    if version and version != str(generation.number):
        raise UnknownVersionError(version, generation.number)
    return task


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Returns probabilities, [images, classes], in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def _noted(tasks: Sequence[str]) -> OnRun | None:
    """Notes in the call under way what it asks, and returns what is to hear of each run of a segment for it."""
    call = current_call()
    if call is None:
        return None
    call.tasks = tuple(tasks)
    return call.on_run


def _to_answer(task: Task, generation: Generation, logits: npt.NDArray[np.float32], top_k: int) -> TaskAnswer:
    order = np.argsort(-logits, axis=1, kind="stable")[:, : max(1, min(top_k, logits.shape[1]))]
    return TaskAnswer(task, generation.number, logits, softmax(logits), order)


def check_count(what: str, found: int, most: int, advice: str) -> None:
    """Checks how many of something a request has.

    Raises:
        LimitError: none, or more than are accepted.
    """
    if found < 1:
        raise LimitError(what, found, "at least one", f"add {what}")
    if found > most:
        raise LimitError(what, found, f"at most {most}", advice)
