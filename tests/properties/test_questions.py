"""Whatever is asked beside it and whoever leaves: a question gets the answer that its images get alone, to the bit, and each row runs once.

That splitting undoes merging shows here with real batches; what the scheduler promises of turns is in tests/server/embedded.
"""

from __future__ import annotations

import concurrent.futures
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from server.embedded.engine import EmbeddedEngine
from server.embedded.memory import SESSION_BYTES
from server.engine import Question
from server.generation import Generation
from server.repository import Repository
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import ENGINE

TASKS = ("digits", "greek", "hebrew", "short")
NUM_IMAGES = 12

ROOM: dict[str, dict[str, int]] = {
    "one worker": {},
    "workers and odd batches": {"workers": 3, "max_batch_rows": 3},
    "room for one route": {"workers": 2, "memory_limit_bytes": 4 * (SESSION_BYTES + 8192)},
}


class Asked:
    """An engine, and what each task answers to each image alone."""

    def __init__(self, generation: Generation, engine: EmbeddedEngine) -> None:
        self.generation = generation
        self.engine = engine
        self.images = random_images(NUM_IMAGES, 8, seed=7)

    @functools.cache  # noqa: B019
    def alone(self, task: str, image: int) -> np.ndarray:
        future = self.engine.answer(Question(self.generation, self.images[image : image + 1], (task,), counted=False))
        return future.result(timeout=30)[task]

    def rows_of_first_segment(self) -> int:
        first = self.generation.tasks["digits"].route[0]
        return next(segment.rows_computed for segment in self.engine.statistics() if segment.name == first)


@pytest.fixture(scope="module", params=ROOM)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder: pathlib.Path = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(folder).publish()
    generation = Repository(folder).read()
    engine = EmbeddedEngine(ENGINE.model_copy(update=ROOM[request.param]))
    engine.load(generation)
    yield Asked(generation, engine)
    engine.close()


QUESTIONS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(TASKS), min_size=1, unique=True), st.integers(0, NUM_IMAGES - 1), st.integers(1, NUM_IMAGES)
    ),
    min_size=1,
    max_size=12,
)


def ask_all(asked: Asked, questions: list[tuple[list[str], int, int]]) -> list[concurrent.futures.Future[Any]]:
    return [
        asked.engine.answer(Question(asked.generation, asked.images[first : first + count], tuple(tasks)))
        for tasks, first, count in questions
    ]


def check_answer(asked: Asked, question: tuple[list[str], int, int], logits: Any) -> None:
    tasks, first, count = question
    images = range(first, min(first + count, NUM_IMAGES))
    assert list(logits) == tasks
    for task in tasks:
        assert np.array_equal(logits[task], np.concatenate([asked.alone(task, image) for image in images]))


# This one first: in the other, rows of those who left may still run when it ends.
@hypothesis.given(questions=QUESTIONS)
@hypothesis.settings(max_examples=20)
def test_each_row_runs_once_and_gets_what_it_gets_alone(asked: Asked, questions: list[tuple[list[str], int, int]]) -> None:
    before = asked.rows_of_first_segment()
    for question, future in zip(questions, ask_all(asked, questions), strict=True):
        check_answer(asked, question, future.result(timeout=30))
    num_rows = sum(min(count, NUM_IMAGES - first) for _, first, count in questions)
    assert asked.rows_of_first_segment() - before == num_rows


@hypothesis.given(questions=QUESTIONS, leaving=st.sets(st.integers(0, 11)))
@hypothesis.settings(max_examples=20)
def test_whoever_leaves_changes_nobody_elses_answer(
    asked: Asked, questions: list[tuple[list[str], int, int]], leaving: set[int]
) -> None:
    futures = ask_all(asked, questions)
    for index in leaving & set(range(len(futures))):
        futures[index].cancel()
    for question, future in zip(questions, futures, strict=True):
        if not future.cancelled():
            check_answer(asked, question, future.result(timeout=30))
