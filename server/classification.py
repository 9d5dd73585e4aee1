"""Questions by task name, from images to probabilities: what every front door asks, free of protos and gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from munet.names import similar_names
from server.access import current_grant
from server.config import Limits
from server.engine import Engine, Logits, Question
from server.errors import ImageRefusedError, LimitError, UnknownTaskError, UnknownVersionError
from server.generation import Generation, Task
from server.preprocessing import Preprocessor, SentImage
from server.reload import Reloader
from server.task_counts import TaskCounts

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


class Classifier:
    """Answers questions by task name. For one event loop.

    Args:
        reloader: which generation answers.
        engine: what computes.
        preprocessor: what decodes.
        limits: what is accepted.

    Attributes:
        counts: what each task was asked.
    """

    def __init__(self, reloader: Reloader, engine: Engine, preprocessor: Preprocessor, limits: Limits) -> None:
        self._reloader = reloader
        self._engine = engine
        self._preprocessor = preprocessor
        self._limits = limits
        self.counts = TaskCounts()

    async def classify(
        self, task_name: str, images: SentImages, top_k: int, deadline_seconds: float | None, version: str = ""
    ) -> TaskAnswer:
        """Asks one task about one or more images.

        Args:
            task_name: which.
            images: at least one.
            top_k: how many classes to order; 0 means 1, more than there are means all.
            deadline_seconds: when the answer is of no more use, on the clock of `time.monotonic`.
            version: number of the generation that must answer; empty means whichever serves.

        Raises:
            UnknownTaskError, UnknownVersionError, LimitError, ImageRefusedError: the request cannot be answered as it stands.
            ServerError: whatever `Engine.answer` says, or nothing is served.
        """
        check_count("images", len(images), self._limits.max_images, "send the rest in further requests")
        with self._reloader.lease() as generation:
            task = find_task(generation, task_name, version)
            with self.counts.counted([task.name], len(images)):
                rows = await self._to_rows(images, task)
                question = Question(generation, rows, (task.name,), deadline_seconds)
                logits = await asyncio.wrap_future(self._engine.answer(question))
                return _to_answer(task, generation, logits[task.name], top_k)

    async def _to_rows(self, images: SentImages, task: Task) -> npt.NDArray[np.uint8]:
        if isinstance(images, np.ndarray):
            size = task.image_size
            if images.shape[1:] != (size, size, 3):
                raise ImageRefusedError("images", f"found pixels {list(images.shape)}, expected [images, {size}, {size}, 3]")
            return images
        (rows,) = await self._preprocessor.to_rows(images, [task.image_size], "images[{index}]")
        return rows

    async def classify_tasks(
        self, image: SentImage, task_names: Sequence[str], top_k: int, deadline_seconds: float | None
    ) -> TaskAnswers:
        """Asks several tasks about one image; what their routes share is computed once.

        Args:
            image: which.
            task_names: which; none means every task that is served and exists for the caller.
            top_k: as in `classify`.
            deadline_seconds: as in `classify`.

        Raises:
            UnknownTaskError, LimitError, ImageRefusedError: the request cannot be answered as it stands.
            ServerError: whatever `Engine.answer` says, or nothing is served.
        """
        if task_names:
            check_count("tasks", len(task_names), self._limits.max_tasks, "ask for the rest in further requests")
        with self._reloader.lease() as generation:
            tasks = [find_task(generation, name) for name in task_names] or visible_tasks(generation)
            if not tasks:
                return TaskAnswers(generation.number, ())
            # Named twice, a task is asked once and answers twice.
            by_size: dict[int, dict[str, None]] = {}
            for task in tasks:
                by_size.setdefault(task.image_size, {})[task.name] = None
            with self.counts.counted({task.name for task in tasks}, 1):
                images = await self._preprocessor.to_rows([image], list(by_size), "image")
                questions = [
                    Question(generation, rows, tuple(names), deadline_seconds)
                    for rows, names in zip(images, by_size.values(), strict=True)
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
        """Returns the number of the generation that serves and one of its tasks.

        Raises:
            UnknownTaskError: no such task is served.
            UnknownVersionError: it is, but not of the generation with this number.
        """
        with self._reloader.lease() as generation:
            return generation.number, find_task(generation, name, version)


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
