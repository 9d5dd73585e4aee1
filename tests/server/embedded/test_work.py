"""Which of the embedded engine's workers computes what."""

from __future__ import annotations

import collections
import os
import pathlib
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

from server.background import NICENESS
from server.embedded.engine import EmbeddedEngine
from server.embedded.scheduler import MANY_TIMES
from server.embedded.sessions import SegmentSession
from server.engine import Question
from server.errors import EngineClosedError
from server.generation import Generation
from server.repository import Repository
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import ENGINE, Brake, wait_until

TWO_WORKERS = ENGINE.model_copy(update={"workers": 2})


@pytest.fixture
def generation(tmp_path: pathlib.Path) -> Generation:
    RepositoryBuilder(tmp_path).publish()
    return Repository(tmp_path).read()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The niceness of the thread of each batch, beside the name of the thread."""
    noted: list[tuple[str, int]] = []
    run = SegmentSession.run

    def note(session: SegmentSession, rows: np.ndarray) -> np.ndarray:
        noted.append((threading.current_thread().name, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return run(session, rows)

    monkeypatch.setattr(SegmentSession, "run", note)
    return noted


needs_priorities = pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")


@needs_priorities
def test_rehearsals_give_way_and_questions_do_not(generation: Generation, runs: list[tuple[str, int]]) -> None:
    engine = EmbeddedEngine(TWO_WORKERS)
    engine.load(generation)
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    for counted, niceness in ((True, usual), (False, min(19, usual + NICENESS))):
        runs.clear()
        for _ in range(10):
            engine.answer(Question(generation, random_images(3, 8), ("digits", "hebrew"), counted=counted)).result(timeout=20)
        assert {nice for _, nice in runs} == {niceness}
    engine.close()


@needs_priorities
def test_a_flood_beside_others_gives_way(generation: Generation, runs: list[tuple[str, int]]) -> None:
    engine = EmbeddedEngine(TWO_WORKERS)
    engine.load(generation)
    brake = Brake(engine)
    flood = [
        engine.answer(Question(generation, random_images(1, 8), ("digits",)))
        for _ in range(8 * ENGINE.max_batch_rows + 10 * MANY_TIMES)
    ]
    assert brake.entered.wait(60)
    quiet = engine.answer(Question(generation, random_images(1, 8), ("hebrew",)))
    brake.go_on.set()
    for future in (quiet, *flood):
        future.result(timeout=20)
    names = collections.Counter(name.split("-")[1] for name, _ in runs)
    assert names["floods"] > 0
    assert names["questions"] > 0
    engine.close()


def test_a_rehearsal_ends_beside_a_flood_that_does_not(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE)
    engine.load(generation)
    stop = threading.Event()

    def flood(task: str) -> None:
        while not stop.is_set():
            for future in [engine.answer(Question(generation, random_images(2, 8), (task,))) for _ in range(50)]:
                future.result(timeout=20)

    threads = [threading.Thread(target=flood, args=(task,)) for task in ("digits", "hebrew")]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            engine.answer(Question(generation, random_images(4, 8), ("digits", "greek"), counted=False)).result(timeout=20)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    engine.close()


@pytest.mark.parametrize("num_images", [1, 30])
def test_rehearsals_hold_no_question_up(generation: Generation, num_images: int) -> None:
    """Few images or many, though the rehearsals never end."""
    engine = EmbeddedEngine(TWO_WORKERS)
    engine.load(generation)
    brake = Brake(engine)
    rehearsals = [engine.answer(Question(generation, random_images(1, 8), ("digits",), counted=False)) for _ in range(4)]
    assert brake.entered.wait(60)
    # From here on only rehearsals are held.
    let_go = threading.Event()
    for name, session in engine._memory.sessions.items():
        session.run = _held(SegmentSession.run.__get__(session), let_go, name)
    asked = [engine.answer(Question(generation, random_images(num_images, 8), (task,))) for task in ("digits", "hebrew")]
    for future in asked:
        future.result(timeout=10)
    assert not any(future.done() for future in rehearsals)
    let_go.set()
    brake.go_on.set()
    for future in rehearsals:
        future.result(timeout=10)
    engine.close()


def _held(run: Callable[[np.ndarray], np.ndarray], let_go: threading.Event, name: str) -> Callable[[np.ndarray], np.ndarray]:
    def held(rows: np.ndarray) -> np.ndarray:
        if threading.current_thread().name.startswith("engine-rehearsals"):
            assert let_go.wait(20), name
        return run(rows)

    return held


def test_a_rehearsal_keeps_no_question_out(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE.model_copy(update={"max_waiting_rows": 64}))
    engine.load(generation)
    brake = Brake(engine)
    rehearsal = engine.answer(Question(generation, random_images(64, 8), ("digits", "hebrew"), counted=False))
    assert brake.entered.wait(60)
    asked = engine.answer(Question(generation, random_images(12, 8), ("digits",)))
    assert not asked.done()
    brake.go_on.set()
    assert len(asked.result(timeout=20)["digits"]) == 12
    assert len(rehearsal.result(timeout=20)["digits"]) == 64
    engine.close()


def test_closing_ends_rehearsals(generation: Generation) -> None:
    engine = EmbeddedEngine(TWO_WORKERS)
    engine.load(generation)
    brake = Brake(engine)
    rehearsals = [engine.answer(Question(generation, random_images(8, 8), ("digits",), counted=False)) for _ in range(20)]
    assert brake.entered.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_until(lambda: any(future.done() for future in rehearsals))
    brake.go_on.set()
    closing.join(20)
    assert {type(future.exception(timeout=20)) for future in rehearsals} == {EngineClosedError}
