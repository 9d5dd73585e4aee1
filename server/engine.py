"""What an inference engine is: `Engine`, whose docstring is the specification that every implementation is tested against."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from server.generation import Generation
from server.histogram import Distribution

Logits = Mapping[str, npt.NDArray[np.float32]]
"""[images, classes] float32 for each task asked for, by its name."""


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentRun:
    """What one batch of a segment was for one question. Seconds are on the clock of `time.monotonic`.

    Attributes:
        segment: name of the segment.
        num_rows: rows of the question in the batch.
        batch_rows: rows in the batch.
        batch_questions: questions in the batch.
        started_seconds: when it began to run.
        ended_seconds: when it had run.
        waited_seconds: how long the question's rows had waited for it.
    """

    segment: str
    num_rows: int
    batch_rows: int
    batch_questions: int
    started_seconds: float
    ended_seconds: float
    waited_seconds: float


OnRun: TypeAlias = Callable[[SegmentRun], None]
"""Hears of a run of a segment; called in threads of the engine, before the question's future completes. Quick, and raises nothing."""


class RouteTimes:
    """How long the rows of a question waited and were computed on the way to each task's logits. An engine fills it in."""

    __slots__ = ("_of_task",)

    def __init__(self) -> None:
        self._of_task: dict[str, tuple[float, float]] = {}

    def note(self, task: str, waited_seconds: float, computed_seconds: float) -> None:
        """Notes that rows of a task have reached their end."""
        known = self._of_task.get(task)
        # Of several batches, the one that took longest is what the caller waited for.
        if known is None or sum(known) < waited_seconds + computed_seconds:
            self._of_task[task] = (waited_seconds, computed_seconds)

    def of(self, task: str) -> tuple[float, float] | None:
        """Returns seconds waited and computed; none if the engine did not tell."""
        return self._of_task.get(task)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What an engine is asked.

    Attributes:
        generation: the generation that answers, whole.
        images: [images, size, size, 3] uint8, RGB; at least one; not changed while the question is open.
        tasks: names of tasks of the generation, each once, all of them taking images of this size; at least one.
        deadline_seconds: when the answer is of no more use, on the clock of `time.monotonic`; none means never.
        counted: whether its rows count in the statistics and towards the bound of waiting work. Rehearsals of a new generation do not; and
            in the embedded engine they give way: they run in batches of their own, in threads of low priority.
        times: filled in before the future completes, if the engine knows.
        on_run: hears of each run of a segment, if the engine itself runs them.
    """

    generation: Generation
    images: npt.NDArray[np.uint8]
    tasks: tuple[str, ...]
    deadline_seconds: float | None = None
    counted: bool = True
    times: RouteTimes | None = None
    on_run: OnRun | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentDistributions:
    """What the batches of a segment were like. Rehearsals are left out.

    Attributes:
        queue_seconds: how long each row waited for the segment.
        compute_seconds: how long each batch ran.
        batch_rows: rows in each batch.
        batch_questions: questions in each batch.
        batch_tasks: tasks that each batch was for.
    """

    queue_seconds: Distribution
    compute_seconds: Distribution
    batch_rows: Distribution
    batch_questions: Distribution
    batch_tasks: Distribution


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentStatistics:
    """What a segment has run since it was loaded. A row is one image or its hidden state.

    Attributes:
        name: the segment's.
        rows_requested: rows that tasks asked for: what would have run without sharing.
        rows_computed: rows that ran. A Triton counts rows that others asked it for too.
        executions: batches that ran.
        distributions: what they were like; none if it has not run, or elsewhere.
    """

    name: str
    rows_requested: int
    rows_computed: int
    executions: int
    distributions: SegmentDistributions | None = None

    @property
    def rows_saved(self) -> int:
        """Rows computed once for several tasks of one question."""
        return max(0, self.rows_requested - self.rows_computed)


class Engine(Protocol):
    """Computes logits with the segments of the generations it holds.

    **Generations.** `load` makes a generation answerable beside those loaded before, `unload` ends that. A question is answered
    wholly by the generation it names, also if that is unloaded meanwhile: `unload` returns at once, and what only this generation
    used is freed when its last question is done. A segment that several loaded generations name is held once; within a limit of memory it
    may be loaded when a question needs it, and if that fails, so does the question, with `SegmentUnavailableError`. `load` is all or
    nothing: if it raises, the engine holds and answers what it did before.

    **Answers.** What an image's logits are depends on the image, the route and the engine's device and threads alone; never on what
    else is asked, how rows are batched or which other generations are loaded. On CPU that holds to the bit. Within one question, what
    several routes share from the image on is computed once; rows of any questions, and of one question with several histories, may run
    in one batch.

    **Threads.** All methods may be called from any thread at any time. `answer` returns at once, `statistics` and `unload` nearly so;
    `load` and `close` block for as long as they need and disturb no answers. Futures are completed in threads of the engine: their
    callbacks must return quickly and must not call `load` or `close`.

    **Cancellation and deadlines.** `cancel` of an open future succeeds, and what the question still has waiting in the engine is dropped
    before it costs anything. A question whose deadline passes fails with `DeadlineError`, at the latest when it would next have cost
    something. Neither changes any other question's answer. An answer that is complete only after its deadline is not given.

    **Overload.** A question that would be late because of what waits before it, or for which there is no room, fails at once, as
    the table in `server.admission` says; what it says of time holds where costs are measured, in the embedded engine. Questions to
    the same tasks share what computes and the room to wait with questions to others, by flow (`server.fairness`): however many of
    one flow wait, those of another do not wait for all of them.

    **Failures.** A segment that fails on some rows fails their questions only, with `SegmentRunError`; other rows of the batch are answered
    as if nothing had happened. What computes may be elsewhere and be lost: if nothing else can answer, the error is
    `UnavailableError`. After `close`, and for what is open when it is called, the error is `EngineClosedError`. `answer` itself
    raises nothing of all this: errors are in the future.

    **Where Tritons compute** (`server.triton`), less holds in three points. What a Triton has been handed, at most
    `max_rows_in_flight` rows, runs to its end there though nobody awaits it: clients that cancel, or whose deadlines pass, crash Triton
    2.51. `statistics` ask the Tritons, for up to a second each; of rehearsals, rows are left out exactly and executions as
    if each had run alone. And `close` frees nothing at a Triton, where others may need it: what is not needed is unloaded by the server
    that runs next, or by none if Triton ends too.
    """

    @property
    def name(self) -> str:
        """What the engine is, for people: such as `embedded (onnxruntime 1.31.1, cpu)`."""
        ...

    def load(self, generation: Generation) -> None:
        """Makes a generation answerable. Loading what is loaded already does nothing.

        Raises:
            SegmentLoadError: a segment cannot be loaded, or is not what the generation says.
            GenerationRefusedError: something else of it cannot be loaded, or does not answer as it should.
            EndpointError, UnavailableError: what computes is elsewhere, and wrong or lost.
            EngineClosedError: the engine is closed.
        """
        ...

    def check(self, generation: Generation, tasks: tuple[str, ...], num_images: int, deadline_seconds: float | None) -> None:
        """Checks whether a question would be refused now, before its images are made. That it would not be is no promise.

        Args:
            generation: that answers.
            tasks: as `Question` has them.
            num_images: that it will have.
            deadline_seconds: as `Question` has it.

        Raises:
            DeadlineError, OverloadedError: `answer` would fail with it.
        """
        ...

    def answer(self, question: Question) -> concurrent.futures.Future[Logits]:
        """Starts to answer a question.

        Returns:
            A future of the logits. Its exceptions: `NotLoadedError`, `OverloadedError`, `DeadlineError`, `SegmentRunError`,
            `UnavailableError`, `EngineClosedError`.

        Raises:
            ValueError: no image, images of another type or shape, no task, a task twice or one that the generation does not have.
        """
        ...

    def unload(self, generation: Generation) -> None:
        """Ends a generation: it answers no new questions. Unloading what is not loaded does nothing."""
        ...

    def statistics(self) -> list[SegmentStatistics]:
        """Returns what each segment that is held has run, in ascending order of name."""
        ...

    def close(self) -> None:
        """Fails what is open, frees everything and ends the engine's threads. Closing again does nothing."""
        ...


def check_question(question: Question) -> None:
    """Checks what every engine demands of a question.

    Raises:
        ValueError: it breaks what `Question` says.
    """
    images = question.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"found images {images.dtype} {list(images.shape)}, expected uint8 [images, size, size, 3]")
    if not question.tasks or len(set(question.tasks)) != len(question.tasks):
        raise ValueError(f"found tasks {question.tasks!r}, expected one or more, each once")
    for name in question.tasks:
        task = question.generation.tasks.get(name)
        if task is None:
            raise ValueError(f"found task {name!r}, expected one of generation {question.generation.number}")
        if images.shape[1:3] != (task.image_size, task.image_size):
            raise ValueError(f"found images {list(images.shape)}, expected height and width {task.image_size} for {name!r}")
