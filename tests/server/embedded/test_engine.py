"""What is the embedded engine's own; what every engine promises is in tests/contract."""

from __future__ import annotations

import concurrent.futures
import gc
import pathlib
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from server.embedded.engine import EmbeddedEngine
from server.embedded.sessions import SegmentSession
from server.engine import Logits, Question, RouteTimes, SegmentDistributions, SegmentRun
from server.errors import DeadlineError, NotLoadedError, OverloadedError
from server.generation import Generation
from server.repository import Repository
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import ENGINE, Brake, ManualClock, wait_until


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


def test_what_is_late_is_not_computed_on_and_not_given(generation: Generation) -> None:
    clock = ManualClock()
    engine = EmbeddedEngine(ENGINE, clock)
    engine.load(generation)
    route = generation.tasks["digits"].route
    for place in (1, len(route) - 1):
        session = engine._memory.sessions[route[place]]
        run = session.run

        def late(rows: np.ndarray, run: Callable[[np.ndarray], np.ndarray] = run) -> np.ndarray:
            clock.now_seconds += 2
            return run(rows)

        before = {row.name: row.executions for row in engine.statistics()}
        session.run = late  # type: ignore[method-assign]
        deadline = clock.now_seconds + 1
        assert isinstance(
            engine.answer(Question(generation, random_images(1, 8), ("digits",), deadline)).exception(), DeadlineError
        )
        session.run = run  # type: ignore[method-assign]
        after = {row.name: row.executions for row in engine.statistics()}
        assert [after[name] - before[name] for name in route] == [1] * (place + 1) + [0] * (len(route) - place - 1)
    assert engine._questions.num_planned == 0
    engine.close()


def test_costs_are_measured_and_deadlines_refused_by_them(generation: Generation) -> None:
    clock = ManualClock()
    engine = EmbeddedEngine(ENGINE, clock)
    engine.load(generation)
    go_on = threading.Event()
    for session in engine._memory.sessions.values():

        def slow(rows: np.ndarray, run: Callable[[np.ndarray], np.ndarray] = session.run) -> np.ndarray:
            assert go_on.wait(60)
            clock.now_seconds += 1
            return run(rows)

        session.run = slow  # type: ignore[method-assign]

    def ask(seconds: float | None, task: str = "digits") -> concurrent.futures.Future[Logits]:
        deadline = None if seconds is None else clock.now_seconds + seconds
        return engine.answer(Question(generation, random_images(1, 8), (task,), deadline))

    go_on.set()
    num_pieces = len(generation.tasks["digits"].route)
    assert ask(None).exception() is None
    # A second for each piece, as it knows now: what cannot be done in time is tried where nothing else is to do, and not otherwise.
    assert isinstance(ask(num_pieces - 1.5).exception(), DeadlineError)
    go_on.clear()
    first = ask(None)
    with pytest.raises(DeadlineError, match="cannot be met: found"):
        ask(num_pieces - 1.5).result()
    with pytest.raises(DeadlineError, match="cannot be met"):
        engine.check(generation, ("digits",), 1, clock.now_seconds + num_pieces - 1.5)
    with pytest.raises(OverloadedError, match="seconds of work ahead") as caught:
        ask(num_pieces + 1).result()
    assert caught.value.retry_after_seconds > 1
    # Nothing of it is known but what it shares with the others.
    assert not ask(num_pieces * 4, "hebrew").done()
    engine.check(generation, ("digits",), 1, clock.now_seconds + 10 * num_pieces)
    go_on.set()
    assert first.exception() is None
    engine.close()


def test_a_quiet_task_runs_beside_a_flood(generation: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    sizes: list[int] = []
    run = SegmentSession.run

    def hold_up(session: SegmentSession, rows: np.ndarray) -> np.ndarray:
        sizes.append(len(rows))
        assert go_on.wait(60)
        return run(session, rows)

    monkeypatch.setattr(SegmentSession, "run", hold_up)
    engine = EmbeddedEngine(ENGINE)
    engine.load(generation)
    flood = [engine.answer(Question(generation, random_images(8, 8), ("greek",))) for _ in range(20)]
    wait_until(lambda: sizes == [8])
    quiet = engine.answer(Question(generation, random_images(1, 8), ("digits",)))
    wait_until(lambda: sizes == [8, 1])
    go_on.set()
    assert all(future.exception() is None for future in [*flood, quiet])
    engine.close()


def test_a_full_engine_has_room_for_a_quiet_task(generation: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    run = SegmentSession.run

    def hold_up(session: SegmentSession, rows: np.ndarray) -> np.ndarray:
        assert go_on.wait(60)
        return run(session, rows)

    monkeypatch.setattr(SegmentSession, "run", hold_up)
    engine = EmbeddedEngine(ENGINE.model_copy(update={"max_waiting_rows": 400}))
    engine.load(generation)
    flood = [engine.answer(Question(generation, random_images(1, 8), ("greek",))) for _ in range(200)]
    refused = [future for future in flood if future.done()]
    assert refused
    assert all(isinstance(future.exception(), OverloadedError) for future in refused)
    quiet = engine.answer(Question(generation, random_images(1, 8), ("digits",)))
    go_on.set()
    assert quiet.exception() is None
    assert all(future.exception() is None for future in flood if future not in refused)
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
        assert go_on.wait(60)
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
    sessions = [weakref.ref(session) for session in engine._memory.sessions.values()]
    engine.unload(generation)
    gc.collect()
    assert [session() for session in sessions] == [None] * len(sessions)
    engine.close()


def test_what_batches_were_like_is_noted(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE)
    engine.load(generation)
    brake = Brake(engine)
    runs: list[SegmentRun] = []
    times = RouteTimes()
    images = random_images(2, 8)
    first = engine.answer(Question(generation, images[:1], ("short",)))
    assert brake.entered.wait(60)
    # These wait for the same segment meanwhile, and run in one batch; but the last one, which nobody waits for, runs apart.
    asked = [
        engine.answer(Question(generation, images, (task,), times=times_, on_run=runs.append))
        for task, times_ in (("digits", times), ("greek", None))
    ]
    asked.append(engine.answer(Question(generation, images, ("digits", "hebrew"), counted=False)))
    brake.go_on.set()
    for future in (first, *asked):
        future.result(timeout=10)
    stem, trunk, top, head = generation.tasks["digits"].route

    def noted(name: str) -> SegmentDistributions | None:
        return next(segment.distributions for segment in engine.statistics() if segment.name == name)

    # The last batch is noted after its answer.
    wait_until(lambda: noted(head) is not None and noted(generation.tasks["greek"].route[-1]) is not None)
    of_stem = noted(stem)
    assert of_stem is not None
    assert (of_stem.batch_rows.count, of_stem.batch_rows.sum) == (2, 5)
    assert (of_stem.batch_questions.sum, of_stem.batch_tasks.sum) == (3, 3)
    assert of_stem.queue_seconds.count == 5
    assert of_stem.compute_seconds.count == 2
    assert noted(generation.tasks["hebrew"].route[-1]) is None
    assert {run.segment for run in runs} >= {stem, trunk, top, head}
    (of_stem_runs, of_head) = ([run for run in runs if run.segment == name] for name in (stem, head))
    assert [(run.num_rows, run.batch_rows, run.batch_questions) for run in of_stem_runs] == [(2, 4, 2)] * 2
    assert [(run.num_rows, run.batch_rows) for run in of_head] == [(2, 2)]
    assert of_head[0].ended_seconds >= of_head[0].started_seconds >= of_stem_runs[0].ended_seconds
    # Of digits' rows, which waited for the first of them all.
    told = times.of("digits")
    assert told is not None
    waited, computed = told
    assert waited >= of_stem_runs[0].waited_seconds > 0
    assert computed >= of_stem_runs[0].ended_seconds - of_stem_runs[0].started_seconds
    assert times.of("greek") is None
    engine.close()
