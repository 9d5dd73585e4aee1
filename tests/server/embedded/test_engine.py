"""What is the embedded engine's own; what every engine promises is in tests/contract."""

from __future__ import annotations

import gc
import pathlib
import threading
import weakref

import numpy as np
import pytest

from server.embedded.engine import EmbeddedEngine
from server.embedded.sessions import SegmentSession
from server.engine import Question
from server.errors import DeadlineError, NotLoadedError, OverloadedError
from server.generation import Generation
from server.repository import Repository
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import ENGINE, ManualClock


@pytest.fixture
def generation(tmp_path: pathlib.Path) -> Generation:
    RepositoryBuilder(tmp_path).publish()
    return Repository(tmp_path).read()


def test_too_much_waiting_is_refused_at_once(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE.model_copy(update={"max_waiting_rows": 64}))
    engine.load(generation)
    images = random_images(8, 8)
    futures = [engine.answer(Question(generation, images, ("digits",))) for _ in range(50)]
    errors = [future.exception() for future in futures]
    refused = [error for error in errors if error is not None]
    assert errors[0] is None
    assert refused
    assert all(isinstance(error, OverloadedError) and error.limit == 64 for error in refused)
    # What was refused or answered weighs nothing any more, and a question above the bound is answered when it is alone.
    assert engine.answer(Question(generation, random_images(64, 8), ("digits",))).exception() is None
    engine.close()


def test_deadlines_are_on_the_engines_clock(generation: Generation) -> None:
    clock = ManualClock()
    engine = EmbeddedEngine(ENGINE, clock)
    engine.load(generation)
    question = Question(generation, random_images(1, 8), ("digits",), deadline_seconds=clock.now_seconds + 1)
    assert engine.answer(question).exception() is None
    clock.now_seconds += 2
    assert isinstance(engine.answer(question).exception(), DeadlineError)
    engine.close()


def test_several_workers_answer_the_same(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE.model_copy(update={"workers": 3}))
    engine.load(generation)
    images = random_images(8, 8)
    tasks = ("digits", "greek", "hebrew", "short")
    first = engine.answer(Question(generation, images, tasks)).result()
    for future in [engine.answer(Question(generation, images, tasks)) for _ in range(50)]:
        assert all((future.result()[name] == first[name]).all() for name in tasks)
    engine.close()


def test_rows_of_one_question_with_several_histories_run_as_one_batch(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE)
    engine.load(generation)
    engine.answer(Question(generation, random_images(1, 8), ("digits", "hebrew"))).result()
    # Both come to it through weights of their own, and leave it to heads of their own.
    rejoined = generation.tasks["digits"].route[2]
    assert rejoined == generation.tasks["hebrew"].route[2]
    found = {segment.name: segment for segment in engine.statistics()}[rejoined]
    assert (found.rows_requested, found.rows_computed, found.executions) == (2, 2, 1)
    engine.close()


def test_batches_are_bounded_by_rows_and_by_bytes(generation: Generation) -> None:
    image_bytes = 8 * 8 * 3
    for bounds, batches in (
        ({"max_batch_rows": 4}, 4),
        ({"max_batch_bytes": 5 * image_bytes + 1}, 4),
        ({"max_batch_bytes": 4 * image_bytes - 1}, 6),
        ({"max_batch_rows": 2, "max_batch_bytes": 5 * image_bytes}, 8),
        ({"max_batch_bytes": 1}, 16),
    ):
        engine = EmbeddedEngine(ENGINE.model_copy(update=bounds))
        engine.load(generation)
        engine.answer(Question(generation, random_images(16, 8), ("digits",))).result()
        first = generation.tasks["digits"].route[0]
        assert {row.name: row.executions for row in engine.statistics()}[first] == batches
        engine.close()


def test_idle_workers_share_the_batches_of_one_question(generation: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=20)
    run = SegmentSession.run

    def wait_for_another(session: SegmentSession, rows: np.ndarray) -> np.ndarray:
        if session.segment.input.name == "image":
            together.wait()
        return run(session, rows)

    monkeypatch.setattr(SegmentSession, "run", wait_for_another)
    engine = EmbeddedEngine(ENGINE.model_copy(update={"workers": 2, "max_batch_rows": 8}))
    engine.load(generation)
    # Two batches, and each waits until the other runs too.
    assert len(engine.answer(Question(generation, random_images(16, 8), ("digits",))).result(timeout=30)["digits"]) == 16
    engine.close()


def test_nothing_of_a_question_is_kept(generation: Generation) -> None:
    """Not even until Python collects cycles: under load that would be late."""
    engine = EmbeddedEngine(ENGINE)
    engine.load(generation)
    images = random_images(1, 8)
    alive = weakref.ref(images)
    engine.answer(Question(generation, images, ("digits",))).result()
    # The worker lets go of a batch before it waits for the next.
    engine.answer(Question(generation, random_images(1, 8), ("digits",))).result()
    del images
    assert alive() is None
    engine.close()


def test_nothing_of_a_refused_question_is_kept(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE)
    images = random_images(1, 8)
    alive = weakref.ref(images)
    with pytest.raises(NotLoadedError):
        engine.answer(Question(generation, images, ("digits",))).result()
    del images
    assert alive() is None
    engine.close()


def test_a_rehearsal_is_let_in_however_much_waits(generation: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    run = SegmentSession.run

    def hold_up(session: SegmentSession, rows: np.ndarray) -> np.ndarray:
        assert go_on.wait(20)
        return run(session, rows)

    monkeypatch.setattr(SegmentSession, "run", hold_up)
    engine = EmbeddedEngine(ENGINE.model_copy(update={"max_waiting_rows": 1}))
    engine.load(generation)
    waiting = engine.answer(Question(generation, random_images(64, 8), ("digits",)))
    refused = engine.answer(Question(generation, random_images(1, 8), ("digits",)))
    rehearsal = engine.answer(Question(generation, random_images(1, 8), ("digits",), counted=False))
    with pytest.raises(OverloadedError):
        refused.result()
    go_on.set()
    assert len(rehearsal.result()["digits"]) == 1
    assert len(waiting.result()["digits"]) == 64
    engine.close()


def test_sessions_are_freed_with_their_last_generation(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE)
    engine.load(generation)
    sessions = [weakref.ref(session) for session in engine._sessions.values()]
    engine.unload(generation)
    gc.collect()
    assert [session() for session in sessions] == [None] * len(sessions)
    engine.close()
