"""What an inference engine is: `Engine`, whose docstring is the specification that every implementation is tested against."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from server.generation import Generation

Logits = Mapping[str, npt.NDArray[np.float32]]
"""[images, classes] float32 for each task asked for, by its name."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What an engine is asked.

    Attributes:
        generation: the generation that answers, whole.
        images: [images, size, size, 3] uint8, RGB; at least one; not changed while the question is open.
        tasks: names of tasks of the generation, each once, all of them taking images of this size; at least one.
        deadline_seconds: when the answer is of no more use, on the clock of `time.monotonic`; none means never.
        counted: whether its rows count in the statistics and towards the bound of waiting work. Rehearsals of a new generation do not.
    """

    generation: Generation
    images: npt.NDArray[np.uint8]
    tasks: tuple[str, ...]
    deadline_seconds: float | None = None
    counted: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class SegmentStatistics:
    """What a segment has run since it was loaded. A row is one image or its hidden state.

    Attributes:
        name: the segment's.
        rows_requested: rows that tasks asked for: what would have run without sharing.
        rows_computed: rows that ran. A Triton counts rows that others asked it for too.
        executions: batches that ran.
    """

    name: str
    rows_requested: int
    rows_computed: int
    executions: int

    @property
    def rows_saved(self) -> int:
        """Rows computed once for several tasks of one question."""
        return max(0, self.rows_requested - self.rows_computed)


class Engine(Protocol):
    """Computes logits with the segments of the generations it holds.

    **Generations.** `load` makes a generation answerable beside those loaded before, `unload` ends that. A question is answered
    wholly by the generation it names, also if that is unloaded meanwhile: `unload` returns at once, and what only this generation
    used is freed when its last question is done. A segment that several loaded generations name is held once. `load` is all or
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
    something. Neither changes any other question's answer.

    **Failures.** A segment that fails on some rows fails their questions only, with `SegmentRunError`; other rows of the batch are answered
    as if nothing had happened. More than the engine's bound of waiting work fails with `OverloadedError`, at once. What computes may be
    elsewhere and be lost: if nothing else can answer, the error is `UnavailableError`. After `close`, and for what is open when it is
    called, the error is `EngineClosedError`. `answer` itself raises nothing of all this: errors are in the future.

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
